"""Speech synthesis: a text -> the mel frames of its recording, slot by slot (after Wang et al. 2017).

Legend: N rows, T target slots, r frames of a slot, M mel bands, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tf_dist.data.media_files import file_of_row
from tf_dist.data.mel import log_mel
from tf_dist.data.packed_frames import PADDING_WORD, pack_words, pad_words, stack_frames
from tf_dist.data.records import Record
from tf_dist.data.tokenizer import Tokenizer
from tf_dist.data.tokens import Batch
from tf_dist.data.wav import read_wav
from tf_dist.models.row_layout import FRAMES, Head, Slots
from tf_dist.tasks.base import EncodedRows, Task, Values
from tf_dist.tasks.sound import mel_parameters

# A slot's frames are followed by M values that all say whether it is the last one. So many, that the loss, a
# mean over values, weighs the end of speech as much as a frame.
GOES_ON, ENDS = -1.0, 1.0
# The value of silence in a spectrogram: what a last slot lacks.
SILENCE = -1.625


class Speak(Task):
    """A text -> a spectrogram, and by Griffin-Lim a recording."""

    name = "speak"
    roles = ("source", "target")
    architectures = ("encoder-decoder", "prefix-decoder")

    @property
    def target(self) -> Slots:
        """Slots of r frames and the flag of the end."""
        return Slots(
            self.config.target_len or self.config.seq_len, self.config.mels * (self.config.stack_frames + 1)
        )

    def head(self, classes: int) -> Head:
        """Frames, (B, T, (r + 1) M)."""
        return Head(FRAMES, self.target.width)

    def texts(self, record: Record) -> list[str]:
        """The source; the target is a file."""
        return [record.values["source"]]

    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, labels: Sequence[str]) -> EncodedRows:
        """As in `Task`: the text, then the slots so far (teacher forcing)."""
        layout, cut = self.layout(tokenizer.vocab_size), 0
        x_NxS, more = self.sources(records, tokenizer)
        sides: tuple[list[Any], list[Any]] = ([], [])
        for record in records:
            slots_PxV = self._slots(record)
            cut += max(0, len(slots_PxV) - layout.target.count)
            slots_PxV = slots_PxV[: layout.target.count]
            before_PxV = np.concatenate([np.zeros_like(slots_PxV[:1]), slots_PxV[:-1]])
            for side, values in zip(sides, (before_PxV, slots_PxV), strict=True):
                side.append(pad_words(pack_words(values), layout.target.words))
        x_NxT, y_NxT = (np.stack(side) for side in sides)
        return EncodedRows(np.concatenate([x_NxS, x_NxT], axis=1), y_NxT, {"source": more, "target": cut})

    def _slots(self, record: Record) -> npt.NDArray[np.float32]:
        """The stacked frames of a record's file, with the flag of the end."""
        path = file_of_row(record.folder / "table", record.values["target"], record.where)
        recording = read_wav(path, self.config.sample_rate, record.where)
        frames_FxM = log_mel(recording.samples_N, mel_parameters(self.config))
        stacked_PxrM = np.nan_to_num(stack_frames(frames_FxM, self.config.stack_frames), nan=SILENCE)
        ends_PxM = np.full((len(stacked_PxrM), self.config.mels), GOES_ON, np.float32)
        ends_PxM[-1] = ENDS
        return np.concatenate([stacked_PxrM, ends_PxM], axis=1)

    def frames_of(self, slots_TxV: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The frames (F, M) of predicted slots, up to the one that says that it is the last."""
        M = self.config.mels
        ends = np.flatnonzero(slots_TxV[:, -M:].mean(axis=1) > (GOES_ON + ENDS) / 2)
        kept = slots_TxV[: ends[0] + 1] if ends.size else slots_TxV
        return np.asarray(kept[:, :-M], np.float32).reshape(-1, M)

    def reference_of(self, values: Values) -> str:
        """The text that is to be heard."""
        return values["source"]


def next_slot(x_BxW: Batch, first: int, t: int, slots_BxV: npt.NDArray[Any]) -> None:
    """Write predicted slots into rows as the decoder's input of slot ``t``, from the word ``first`` on."""
    words = slots_BxV.shape[1] // 2
    start = first + t * words
    for row, values in zip(x_BxW, slots_BxV, strict=True):
        row[start : start + words] = pack_words(values[None])


def silent(x_BxW: Batch, first: int, slot_words: int) -> Batch:
    """Rows whose target is empty: a first slot of zeros, then padding."""
    x_BxW = x_BxW.copy()
    x_BxW[:, first:] = PADDING_WORD
    x_BxW[:, first : first + slot_words] = 0
    return x_BxW
