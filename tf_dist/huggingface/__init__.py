"""Model folders of Hugging Face, both ways: ``config.json``, ``model.safetensors``, ``tokenizer.json``.

No code comes from a folder and no other format of weights is read: there is no ``trust_remote_code``.
"""
