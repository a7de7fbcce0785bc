"""Recordings that a model of ``--task speak`` makes of texts.

Legend: B rows, W words of a row, T slots, V values of a slot.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tf_dist.data.griffin_lim import waveform
from tf_dist.data.tokens import Batch
from tf_dist.data.wav import write_wav
from tf_dist.models.row_layout import RowLayout
from tf_dist.runners.inference import Inference
from tf_dist.tasks.sound import mel_parameters
from tf_dist.tasks.speak import Speak, next_slot, silent


def spoken(runner: Inference, x_BxW: Batch, layout: RowLayout) -> npt.NDArray[np.float32]:
    """The slots that a model predicts for texts, one after the other: (B, T, V)."""
    first, T, words = layout.source.words, layout.target.count, layout.target.words // layout.target.count
    x_BxW = silent(x_BxW, first, words)
    made_BxTxV = np.zeros((len(x_BxW), T, layout.target.width), np.float32)
    for t in range(T):
        made_BxTxV[:, t] = runner.outputs(x_BxW)[:, t]
        if t + 1 < T:
            next_slot(x_BxW, first, t + 1, made_BxTxV[:, t])
    return made_BxTxV


def write_recordings(
    runner: Inference, task: Speak, layout: RowLayout, x_NxW: Batch, rows: int, folder: Path, first: int = 0
) -> list[str]:
    """Write a WAV file for each row; on one rank, which has the whole model.

    Args:
        runner: of the rank.
        task: of the run.
        layout: of its rows.
        x_NxW: rows, of which the text is read.
        rows: B, of a micro-batch.
        folder: made if it is missing.
        first: number in the name of the first file.

    Returns:
        The names of the files in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters, names = mel_parameters(task.config), list[str]()
    for start in range(0, len(x_NxW), rows):
        own = x_NxW[start : start + rows]
        filled = np.concatenate([own, np.repeat(own[-1:], rows - len(own), axis=0)])
        for slots_TxV in spoken(runner, filled, layout)[: len(own)]:
            names.append(f"{first + len(names):05d}.wav")
            samples_N = waveform(task.frames_of(slots_TxV), parameters)
            write_wav(folder / names[-1], samples_N, parameters.sample_rate)
    return names
