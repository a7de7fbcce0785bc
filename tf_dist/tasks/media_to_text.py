"""Sound or an image to text: transcription and captions.

Legend: N rows, S source slots, M values of a slot, P slots that a recording or image fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tf_dist.data.images import patches, read_png
from tf_dist.data.media_files import file_of_row
from tf_dist.data.mel import log_mel
from tf_dist.data.packed_frames import pack_words, pad_words, stack_frames
from tf_dist.data.records import Record
from tf_dist.data.tokenizer import Tokenizer
from tf_dist.data.tokens import Batch
from tf_dist.data.wav import read_wav
from tf_dist.models.row_layout import Slots
from tf_dist.tasks.sound import mel_parameters
from tf_dist.tasks.text_to_text import TextToText

# Pixels are 0 to 1; models see -1 to 1.
PIXEL_CENTER, PIXEL_SCALE = 0.5, 2.0


class MediaToText(TextToText):
    """A file that a row names -> its text. Subclasses read the file."""

    roles = ("source", "target")

    def values_of(self, path: Path, where: str) -> npt.NDArray[np.float32]:
        """The slots of a file, (P, M); positions without a number are NaN."""
        raise NotImplementedError

    def texts(self, record: Record) -> list[str]:
        """The target; the source is a file."""
        return [record.values["target"]]

    def sources(self, records: Sequence[Record], tokenizer: Tokenizer) -> tuple[Batch, int]:
        """As in `Task`: slots of values, and padding."""
        layout, cut, words = self.layout(tokenizer.vocab_size), 0, []
        for record in records:
            path = file_of_row(record.folder / "table", record.values["source"], record.where)
            values = self.values_of(path, record.where)
            cut += max(0, len(values) - layout.source.count)
            packed = pack_words(values[: layout.source.count])
            words.append(pad_words(packed, layout.source.words))
        return np.stack(words), cut


class Transcribe(MediaToText):
    """Speech recognition: a WAV file -> its words."""

    name = "transcribe"
    metrics = ("wer", "cer")

    @property
    def source(self) -> Slots:
        """Slots of stacked log-mel frames."""
        return Slots(super().source.count, self.config.mels * self.config.stack_frames)

    def values_of(self, path: Path, where: str) -> npt.NDArray[np.float32]:
        """Log-mel frames, some stacked in each slot."""
        recording = read_wav(path, self.config.sample_rate, where)
        frames_FxM = log_mel(recording.samples_N, mel_parameters(self.config))
        return stack_frames(frames_FxM, self.config.stack_frames)


class Caption(MediaToText):
    """Image captions: a PNG file -> a text."""

    name = "caption"
    metrics = ("bleu", "exact_match")

    @property
    def source(self) -> Slots:
        """Slots of patches (Dosovitskiy et al. 2021); an image fills all of them."""
        side = self.config.image_size // self.config.patch_size
        return Slots(side * side, self.config.patch_size**2 * 3)

    def values_of(self, path: Path, where: str) -> npt.NDArray[np.float32]:
        """Patches, row by row."""
        size = self.config.image_size
        values_PxM = patches(read_png(path, size, size, where), self.config.patch_size)
        return (values_PxM - np.float32(PIXEL_CENTER)) * np.float32(PIXEL_SCALE)
