"""The loop: trainer, checkpoints, evaluation, text generation. The only room that knows all others."""
