"""``tokenizer.json`` for our tokenizers of bytes and characters; those of BPE are such files already."""

from __future__ import annotations

from typing import Any

from tf_dist.data.tokenizer import BYTES, END_OF_TEXT, ByteTokenizer, CharTokenizer, Tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The file that the library `tokenizers` reads, with the same ids for every text."""
    if isinstance(tokenizer, ByteTokenizer):
        return _of_vocabulary(_of_bytes(), byte_level=True)
    if isinstance(tokenizer, CharTokenizer):
        ids = {character: number for number, character in enumerate(tokenizer.characters, 1)}
        return _of_vocabulary({END_OF_TEXT: tokenizer.end_of_text, **ids}, byte_level=False)
    return tokenizer.to_json()


def _of_bytes() -> dict[str, int]:
    """Ids of bytes by the characters that byte-level BPE writes for them (Radford et al. 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in plain]
    written = {byte: chr(byte) for byte in plain}
    written.update({byte: chr(BYTES + at) for at, byte in enumerate(others)})
    return {written[byte]: byte for byte in range(BYTES)} | {END_OF_TEXT: BYTES}


def _of_vocabulary(ids: dict[str, int], byte_level: bool) -> str:
    """A tokenizer without merges: every byte or character is a token."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    made: Any = Inner(models.BPE(ids, [], fuse_unk=False))
    if byte_level:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return str(made.to_str())
