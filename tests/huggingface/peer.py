"""What `transformers` makes of model folders; run by an interpreter that has PyTorch.

    python peer.py '[["logits", "folder", "ids.npy", "logits.npy"], ...]'

Each job is a function below and its arguments. One process does many: importing PyTorch takes seconds.
"""

import json
import sys

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()


def make(kind, folder, fields, saving):
    """A model with random weights; also biases and gains, so that one that is left out is seen."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder, **saving)


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(folder, ids, out):
    """(B, T) -> (B, T, V)."""
    with torch.no_grad():
        np.save(out, opened(folder)(torch.from_numpy(np.load(ids)).long()).logits.numpy())


def generate(folder, ids, tokens, out):
    """Greedily: (B, T) -> (B, T + tokens)."""
    model = opened(folder)
    ids = torch.from_numpy(np.load(ids)).long()
    model.generation_config.update(do_sample=False, eos_token_id=None, pad_token_id=0)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens)
    np.save(out, made.numpy())


def encode(folder, text, out):
    """A text -> its ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    np.save(out, tokenizer(text, add_special_tokens=False)["input_ids"])


if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        {"make": make, "logits": logits, "generate": generate, "encode": encode}[name](*arguments)
