"""`CachedForward` of a model whose layers are on the ranks of a pipeline.

Legend: B rows, N new positions of a call, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_dist.models.incremental import IncrementalModel
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.p2p import P2PChannels
from tf_dist.parallel.pipeline_schedules import F, Message
from tf_dist.pipeline.stage import Stage
from tf_dist.runners.cached_forward import CachedSegment, select


class CachedPipeline:
    """`tf_dist.decoding.forward.CachedForward` of a pipeline: stages keep caches of their own layers.

    Activations of the new positions pass from stage to stage; the logits are broadcast. One stage computes
    at a time.

    Args:
        model: all layers, on every rank.
        stages: of this rank, by chunk.
        mesh: all ranks.
        messages: of this rank.
        seq_len: T.

    Raises:
        NotIncremental: on every rank: a layer does not say how it is computed for new positions only.
    """

    lockstep = False

    def __init__(
        self, model: Any, stages: dict[int, Stage], mesh: Mesh, messages: P2PChannels, seq_len: int
    ) -> None:
        whole = IncrementalModel(model)  # all layers: so that all ranks refuse the same
        whole.refuse_parts()
        self._stages, self._messages, self._comm = stages, messages, mesh.pipeline
        self.segments = {
            chunk: CachedSegment(stage.segment.model, stage.way.last) for chunk, stage in stages.items()
        }
        self._vocabulary = int(model.outputs[0].shape[-1])
        self.limit, self.longest = seq_len if whole.bounded else None, seq_len

    def begin(self, batch: int, length: int) -> dict[int, Any]:
        """As in `CachedForward`: the caches of each stage of this rank."""
        return {chunk: segment.begin(batch, length) for chunk, segment in self.segments.items()}

    def __call__(
        self, x_BxN: np.ndarray, start_B: np.ndarray, count_B: np.ndarray, state: dict[int, Any]
    ) -> tuple[np.ndarray, dict[int, Any]]:
        """As in `CachedForward`."""
        x: Any = x_BxN
        after: dict[int, Any] = {}
        for chunk, stage in self._stages.items():
            if not stage.way.first:
                message = Message(F, chunk - 1)
                self._messages.expect(message, (*x_BxN.shape, *stage.x.shape[2:]), stage.x.dtype, 1)
                x = self._messages.take(message)
            out, after[chunk] = self.segments[chunk](x, start_B, count_B, state[chunk])
            x = np.asarray(out)
            if not stage.way.last:
                self._messages.send(Message(F, chunk), x)
        logits_BxV = np.empty((len(x_BxN), self._vocabulary), np.float32)
        if self._comm.rank == self._comm.size - 1:
            np.copyto(logits_BxV, x)
        self._messages.settle()
        self._comm.broadcast(logits_BxV.reshape(-1), self._comm.size - 1)
        return logits_BxV, after

    def select(self, state: dict[int, Any], rows: np.ndarray) -> dict[int, Any]:
        """As in `CachedForward`."""
        return {chunk: select(caches, rows) for chunk, caches in state.items()}
