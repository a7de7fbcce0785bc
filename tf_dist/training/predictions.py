"""Predictions for held-out rows, made by all ranks, in the order of the rows.

Legend: N rows, B rows of a micro-batch, W words of a row, U targets of a row, V classes, T target slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from tf_dist import progress
from tf_dist.data.rows import Rows
from tf_dist.data.sampler import share
from tf_dist.data.tokens import NO_SEQUENCE, NO_TARGET, Batch
from tf_dist.decoding.beam_search import BeamSearch
from tf_dist.decoding.decode import decode
from tf_dist.decoding.forward import CachedForward
from tf_dist.decoding.sampling import GREEDY, Sampling
from tf_dist.errors import UsageError
from tf_dist.models.incremental import NotIncremental
from tf_dist.models.row_layout import RowLayout
from tf_dist.parallel.mesh import DATA, Mesh
from tf_dist.runners.inference import Inference

Predict = Callable[[Inference, Batch], npt.NDArray[np.int32]]


def predictions(
    runner: Inference, mesh: Mesh, rows: int, held_out: Rows, count: int, predict: Predict
) -> npt.NDArray[np.int32]:
    """Predictions for the first ``count`` rows, the same on every rank; a collective.

    Rows are dealt to ranks in micro-batches, whose content does not depend on the number of ranks.

    Args:
        runner: of this rank.
        mesh: all ranks.
        rows: B.
        held_out: rows.
        count: N, at most their number.
        predict: maps rows (B, W) to predictions (B, U); a collective of the ranks that share a model.

    Returns:
        (N, U) int32.
    """
    batches = math.ceil(count / rows)
    indices = np.arange(batches * rows)
    indices[indices >= count] = -1
    mine = share(batches, mesh.at[DATA], mesh.shape[DATA])
    padding = np.full(rows, NO_SEQUENCE)
    places = [indices[k * rows : (k + 1) * rows] for k in mine]
    if runner.gathers_weights:  # a rank with fewer of them goes on with padding
        places += [padding] * (math.ceil(batches / mesh.shape[DATA]) - len(places))
    # Sums with zeros are exact: each row comes from one rank.
    everything = np.zeros((batches * rows, held_out.rows(padding)[1].shape[1]))
    with progress.task("predicting", len(places), "micro-batches") as task:
        for turn, at in enumerate(places):
            own = predict(runner, held_out.rows(at)[0])
            if mesh.reports_loss and turn < len(mine):
                everything[mine[turn] * rows : (mine[turn] + 1) * rows] = own
            task.advance()
    mesh.all.allreduce(everything.reshape(-1))
    return np.array(everything[:count], np.int32)


def best_classes(runner: Inference, x_BxW: Batch) -> npt.NDArray[np.int32]:
    """The class with the highest logit, of each target: (B, U)."""
    classes_BxU: npt.NDArray[np.int32] = np.argmax(runner.outputs(x_BxW), axis=-1).astype(np.int32)
    return classes_BxU


class Decoder:
    """Continues the separator after each row's source, token by token.

    Args:
        layout: of the rows.
        end: the token after which a row is complete.
        strategy: how the next token is chosen.
    """

    def __init__(self, layout: RowLayout, end: int, strategy: Sampling | BeamSearch = GREEDY) -> None:
        self._layout, self._end, self._strategy = layout, end, strategy
        self._forward: CachedForward | None = None

    def __call__(self, runner: Inference, x_BxW: Batch) -> npt.NDArray[np.int32]:
        """The tokens of rows, (B, T); -1 after the end; see `Predict`.

        Raises:
            UsageError: the model keeps no cache, and the strategy needs one.
        """
        if self._forward is None:
            try:
                self._forward = runner.cached_forward()
            except NotIncremental as why:
                if self._strategy != GREEDY:
                    raise UsageError(f"only greedy decoding works without a cache: {why}") from why
                return greedy(runner, x_BxW, self._layout, self._end)
        first, T = self._layout.source.words, self._layout.target.count
        prompts = np.concatenate([x_BxW[:, :first], np.full((len(x_BxW), 1), self._layout.separator)], axis=1)
        made = decode(self._forward, list(prompts), self._strategy, T, self._end, batch=len(prompts))
        ids_BxT = np.full((len(made), T), NO_TARGET, np.int32)
        for row, one in zip(ids_BxT, made, strict=True):
            row[: len(one.ids)] = one.ids
        return ids_BxT


def greedy(runner: Inference, x_BxW: Batch, layout: RowLayout, end: int) -> npt.NDArray[np.int32]:
    """The most probable token, one after the other, by a model without a cache: (B, T); -1 from the end on.

    Args:
        runner: of this rank.
        x_BxW: rows, of which the source is read.
        layout: of the rows.
        end: the token after which a row is complete.
    """
    first, T = layout.source.words, layout.target.count
    x_BxW = x_BxW.copy()
    x_BxW[:, first:] = layout.pad
    x_BxW[:, first] = layout.separator
    made_BxT = np.full((len(x_BxW), T), NO_TARGET, np.int32)
    open_B = np.full(len(x_BxW), True)
    for t in range(T):
        token_B = np.argmax(runner.outputs(x_BxW)[:, t], axis=-1)
        open_B &= token_B != end
        made_BxT[:, t] = np.where(open_B, token_B, NO_TARGET)
        if t + 1 == T or not (open_B.any() or runner.gathers_weights):
            break
        x_BxW[:, first + t + 1] = np.where(open_B, token_B, layout.pad)
    return made_BxT


def best_spans(runner: Inference, x_BxW: Batch, layout: RowLayout, longest: int) -> npt.NDArray[np.int32]:
    """The most probable first and last slot of an answer, (B, 2), after the separator of the question.

    Args:
        runner: of this rank.
        x_BxW: rows: a question, a separator, a context.
        layout: of the rows.
        longest: slots of an answer.
    """
    start_BxS, end_BxS = np.moveaxis(runner.outputs(x_BxW), 1, 0)
    S = start_BxS.shape[1]
    first_B = np.argmax(x_BxW == layout.separator, axis=1) + 1
    scores_BxSxS = start_BxS[:, :, None] + end_BxS[:, None, :]
    length_SxS = np.arange(S)[None, :] - np.arange(S)[:, None]
    scores_BxSxS[:, (length_SxS < 0) | (length_SxS >= longest)] = -np.inf
    scores_BxSxS[np.arange(S)[None, :] < first_B[:, None]] = -np.inf
    flat_B = np.argmax(scores_BxSxS.reshape(len(x_BxW), -1), axis=1)
    return np.stack(np.divmod(flat_B, S), axis=1).astype(np.int32)
