"""Pseudo-perplexity of a masked language model: each token is predicted from all others of its window.

Salazar et al. (2020), *Masked Language Model Scoring*. One forward pass for each token: for evaluation, of
some windows.

Legend: N windows, B rows of a micro-batch, T tokens of a window, V ids.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tf_dist import progress
from tf_dist.data.rows import Rows
from tf_dist.data.sampler import share
from tf_dist.data.tokens import NO_TARGET, Batch
from tf_dist.metrics.perplexity import pseudo_perplexity
from tf_dist.models.row_layout import RowLayout
from tf_dist.parallel.mesh import DATA, Mesh
from tf_dist.runners.runner import ModelRunner

KEY = "val_pseudo_perplexity"


class PseudoPerplexity:
    """A metric for `tf_dist.training.trainer.Trainer.metrics`.

    Args:
        windows: of held-out text, without noise.
        layout: of the rows: has the ids of special tokens.
        count: N, windows that are scored, the first ones.
    """

    def __init__(self, windows: Rows, layout: RowLayout, count: int) -> None:
        self._windows, self._layout = windows, layout
        self._count = min(count, len(windows))

    def __call__(self, runner: ModelRunner, mesh: Mesh, rows: int, held_out: Rows) -> dict[str, float]:
        """The pseudo-perplexity of the windows, the same on every rank; a collective."""
        mine = share(self._count, mesh.at[DATA], mesh.shape[DATA])
        turns = -(-self._count // mesh.shape[DATA]) if runner.gathers_weights else len(mine)
        sums_Nx2 = np.zeros((self._count, 2))
        with progress.task("scoring windows", turns, "windows") as task:
            for turn in range(turns):
                # Without a window of its own, a rank goes on with another one that counts for nothing.
                number = mine[turn] if turn < len(mine) else 0
                x_1xT, next_1xT = self._windows.rows([number])
                losses_T = self._losses(runner, x_1xT, rows)
                present_T = next_1xT[0] != NO_TARGET
                if mesh.reports_loss and turn < len(mine):
                    sums_Nx2[number] = losses_T[present_T].sum(), present_T.sum()
                task.advance()
        mesh.all.allreduce(sums_Nx2.reshape(-1))
        return {KEY: pseudo_perplexity(sums_Nx2[:, 0].tolist(), sums_Nx2[:, 1].astype(int).tolist())}

    def _losses(self, runner: ModelRunner, x_1xT: Batch, rows: int) -> npt.NDArray[np.float64]:
        """-log p of each token of a window, in nats, (T,)."""
        T = x_1xT.shape[1]
        losses_T = np.zeros(T)
        for first in range(0, T, rows):
            places = np.minimum(np.arange(first, first + rows), T - 1)
            x_BxT = np.repeat(x_1xT, rows, axis=0)
            x_BxT[np.arange(rows), places] = self._layout.mask
            logits_BxV = runner.outputs(x_BxT)[np.arange(rows), places].astype(np.float64)
            highest_Bx1 = logits_BxV.max(axis=1, keepdims=True)
            total_B = highest_Bx1[:, 0] + np.log(np.exp(logits_BxV - highest_Bx1).sum(axis=1))
            losses_T[places] = total_B - logits_BxV[np.arange(rows), x_1xT[0, places]]
        return losses_T
