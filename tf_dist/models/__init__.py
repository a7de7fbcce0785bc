"""Plain Keras language models: token ids (B, T) int32 -> logits (B, T, V) float32. They never see a Comm."""
