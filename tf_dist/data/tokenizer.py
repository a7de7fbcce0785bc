"""Text <-> token ids: bytes, characters, or byte-level BPE, behind one small interface.

A tokenizer is one JSON file. Ours for bytes and characters have a ``format`` key; any other file is
read as a Hugging Face ``tokenizer.json``, and BPE tokenizers are saved as one, so that other tools
can read them too.
"""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tf_dist.atomic_io import read_capped, write_whole
from tf_dist.config import BPE_DEFAULT_VOCAB
from tf_dist.data import foreign_tokenizer
from tf_dist.data.signatures import HEAD_BYTES, check_is_no_pointer
from tf_dist.errors import DataError, UsageError
from tf_dist.untrusted_files import parsed_json, shown

Ids = npt.NDArray[np.uint32]

FORMAT = "tf_dist tokenizer 1"
FILE_LIMIT_BYTES = 128 << 20
BYTES = 256
LONG_RUN = re.compile(r"\S{512}|\s{512}")
END_OF_TEXT = "<|endoftext|>"
# Names of the end-of-text token in well-known tokenizers, the most likely first.
END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "[SEP]", "<eos>")


class UnknownCharacter(DataError):
    """A text holds a character that a char tokenizer has no token for.

    Args:
        character: that one.
        at: its offset in the text, in characters.
        line: its line in the text, from 1.
    """

    def __init__(self, character: str, at: int, line: int) -> None:
        self.character, self.at, self.line = character, at, line
        super().__init__(self.said())

    def said(self, characters: int = 0, lines: int = 0) -> str:
        """The message, with offsets for a text that begins after so many characters and lines."""
        return (
            f"character {self.character!r} (U+{ord(self.character):04X}, character {characters + self.at} of "
            f"the text, line {lines + self.line}) is unknown to this char tokenizer. Train one on this "
            "corpus too, or use --tokenizer byte."
        )


class Tokenizer(abc.ABC):
    """Interface of tokenizers.

    ``end_of_text`` is the id that follows each document. No text encodes to it: a corpus
    that contains its name is still only text. It decodes to the empty string.
    """

    kind: str
    vocab_size: int
    end_of_text: int
    end_of_text_name: str = END_OF_TEXT

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, uint32, one array of shape (tokens of that text,) per text.

        Raises:
            DataError: a text that this tokenizer cannot encode.
        """

    @abc.abstractmethod
    def _decode(self, ids: Ids) -> str: ...

    @abc.abstractmethod
    def to_json(self) -> str:
        """The file that `save` writes."""

    def encode(self, text: str) -> Ids:
        """The ids of one text, uint32, shape (tokens,).

        Raises:
            DataError: as `encode_batch` does, or the text holds invalid UTF-8 (from a command line).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            number = ord(text[error.start])
            what = (
                f"byte 0x{number - 0xDC00:02x}" if 0xDC80 <= number < 0xDD00 else "half of a surrogate pair"
            )
            raise DataError(f"the text is not UTF-8: {what}, character {error.start} of {text!a}") from error
        return self.encode_batch([text])[0]

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ids, shape (tokens,). End-of-text becomes empty; invalid UTF-8 becomes U+FFFD.

        Raises:
            DataError: an id outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        wrong = array[(array < 0) | (array >= self.vocab_size)]
        if wrong.size:
            raise DataError(
                f"token id {wrong[0]} is outside this tokenizer's vocabulary of {self.vocab_size}. "
                "The tokens were made by another tokenizer."
            )
        return self._decode(array[array != self.end_of_text].astype(np.uint32))

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to ``path``, atomically."""
        write_whole(Path(path), self.to_json().encode())


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8: ids 0 to 255, and 256 for end-of-text."""

    kind = "byte"
    vocab_size = BYTES + 1
    end_of_text = BYTES

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer.encode_batch`."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def _decode(self, ids: Ids) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        return json.dumps({"format": FORMAT, "kind": self.kind})


class CharTokenizer(Tokenizer):
    """One token per character: 0 is end-of-text, then the corpus's characters in code point order."""

    kind = "char"
    end_of_text = 0

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters) + 1
        self._points = _code_points(self.characters)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer.encode_batch`."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Ids:
        points = _code_points(text)
        places = np.searchsorted(self._points, points)
        known = self._points[np.minimum(places, len(self._points) - 1)] == points
        if not known.all():
            at = int(np.argmin(known))
            raise UnknownCharacter(text[at], at, text.count("\n", 0, at) + 1)
        return (places + 1).astype(np.uint32)

    def _decode(self, ids: Ids) -> str:
        return self._points[ids.astype(np.int64) - 1].tobytes().decode("utf-32-le")

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        return json.dumps({"format": FORMAT, "kind": self.kind, "characters": self.characters})


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library, trained here or elsewhere.

    Args:
        inner: a ``tokenizers.Tokenizer``.
        name: for error messages.

    Raises:
        UsageError: it has no token that could end a text.
    """

    def __init__(self, inner: Any, name: str) -> None:
        self._inner = inner
        self.kind = type(inner.model).__name__.lower()
        # One more than the largest id: some files leave ids unused, and a model needs a row for each.
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ends = [inner.token_to_id(token) for token in END_OF_TEXT_NAMES]
        found = [number for number in ends if number is not None]
        if not found:
            tried = " ".join(END_OF_TEXT_NAMES)
            raise UsageError(f"{name} has no end-of-text token: none of {tried}. Add one to it, or use bpe.")
        self.end_of_text = found[0]
        self.end_of_text_name = str(inner.id_to_token(found[0]))
        inner.no_truncation()
        inner.no_padding()
        # A corpus may contain "<|endoftext|>" as text; only this class may write the token.
        inner.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer.encode_batch`."""
        # The fast variant skips the offsets of tokens; older releases lack it.
        encode = getattr(self._inner, "encode_batch_fast", self._inner.encode_batch)
        with foreign_tokenizer.no_panic("this tokenizer cannot encode the text"):
            encoded = encode(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def _decode(self, ids: Ids) -> str:
        with foreign_tokenizer.no_panic("this tokenizer cannot decode tokens"):
            return str(self._inner.decode(ids.tolist(), skip_special_tokens=True))

    def to_json(self) -> str:
        """See `Tokenizer.to_json`."""
        return str(self._inner.to_str())


def load_tokenizer(path: Path | str, *, follow: bool = True) -> Tokenizer:
    """Load the tokenizer saved at ``path``: ours, or any Hugging Face ``tokenizer.json``.

    Args:
        path: of the file.
        follow: whether it may be a link; False inside a run folder.

    Raises:
        DataError: no such file, or not a tokenizer.
        UsageError: a tokenizer without an end-of-text token.
    """
    path = Path(path)
    data = read_capped(path, FILE_LIMIT_BYTES, follow=follow)
    check_is_no_pointer(data[:HEAD_BYTES], str(path))
    try:
        fields = parsed_json(data)
    except ValueError as error:
        raise DataError(f"{path} is not a tokenizer: it is not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise DataError(f"{path} is not a tokenizer: it is JSON, but not an object.")
    if "format" in fields:
        return _ours(fields, path)
    from tokenizers import Tokenizer as Inner

    foreign_tokenizer.check(fields, path)
    with foreign_tokenizer.no_panic(f"{path} is not a tokenizer"):
        inner = Inner.from_str(data.decode())
        return HuggingFaceTokenizer(inner, str(path))


def _ours(fields: dict[str, Any], path: Path) -> Tokenizer:
    if fields["format"] != FORMAT:
        raise DataError(f"{path} has the format {shown(fields['format'])}; this version reads {FORMAT!r}.")
    if fields.get("kind") == "byte":
        return ByteTokenizer()
    characters = fields.get("characters")
    if fields.get("kind") == "char" and isinstance(characters, str) and foreign_tokenizer.is_text(characters):
        return CharTokenizer(characters)
    raise DataError(f"{path} is damaged: it is no byte tokenizer, and no char tokenizer with characters.")


def train_tokenizer(kind: str, documents: Iterable[str], vocab_size: int | None = 0) -> Tokenizer:
    """Train a tokenizer; the result depends on the documents only, not on the machine.

    Args:
        kind: ``byte``, ``char`` or ``bpe``.
        documents: the texts, or chunks of them; ignored for ``byte``.
        vocab_size: the number of ids, end-of-text included; for ``bpe`` at most that many (a small
            corpus may yield fewer). 0 or None: as many as needed, for ``bpe`` 2048.

    Raises:
        UsageError: an unknown kind, or a ``vocab_size`` too small; names the smallest valid one.
        DataError: there are no documents.
    """
    if kind not in ("byte", "char", "bpe"):
        raise UsageError(f"unknown tokenizer {kind!r}: byte, char, bpe, or the path of a tokenizer.json.")
    if kind != "char":
        check_vocab_size(kind, vocab_size, BYTES + 1)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return _train_char(documents, vocab_size)
    return _train_bpe(documents, vocab_size or BPE_DEFAULT_VOCAB)


def check_vocab_size(name: str, vocab_size: int | None, least: int) -> None:
    """Raise `UsageError` if a vocabulary size was given and is less than ``least``."""
    if vocab_size and vocab_size < least:
        raise UsageError(
            f"vocab_size {vocab_size} is too small for the tokenizer {name}: the least is {least}. "
            f"Use --vocab-size {least} or more, or 0."
        )


def _train_char(documents: Iterable[str], vocab_size: int | None) -> CharTokenizer:
    found: set[str] = set()
    for document in documents:
        found.update(document)
    if not found:
        raise DataError("no text to take characters from.")
    check_vocab_size("char", vocab_size, len(found) + 1)
    return CharTokenizer("".join(found))


def _in_short_runs(documents: Iterable[str]) -> Iterator[str]:
    """Split long runs without spaces (DNA, base64, Chinese), or of nothing but spaces.

    The library scans a complete word for each new token: minutes for words of a megabyte. Ordinary text
    trains the same tokens, and the trained tokenizer encodes any text the same way.
    """
    for document in documents:
        begin = 0
        for run in LONG_RUN.finditer(document):
            yield document[begin : run.end()]
            begin = run.end()
        if begin < len(document):
            yield document[begin:]


def _train_bpe(documents: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes are in the initial alphabet, so that no text is unknown.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_in_short_runs(documents), trainer=trainer)
    return HuggingFaceTokenizer(inner, "the new tokenizer")
