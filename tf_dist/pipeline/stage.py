"""A pipeline stage as compiled functions: forward, backward, and the gradient of its weights separately.

Legend: B rows of a micro-batch, T tokens, G random generators of the full model, P parameters of the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf
from keras.src.backend.common.stateless_scope import StatelessScope
from keras.src.random.seed_generator import global_seed_generator

from tf_dist.errors import UsageError
from tf_dist.pipeline.graph_partition import GraphCuts, Values
from tf_dist.pipeline.model_partition import ModelSegment, one_or_all
from tf_dist.runners.loss import loss_and_sums
from tf_dist.runners.replica import concat


@dataclass(frozen=True)
class StageVariant:
    """How a stage is compiled.

    first: it takes token ids, and has no gradient to send. last: it computes the loss. split: the gradient of
    the weights is a separate step (zero-bubble). recompute: the backward pass begins with a forward pass, so
    that only the stage's input is saved. at_once: the last stage's forward pass is part of its backward pass,
    which follows immediately.
    """

    first: bool
    last: bool
    split: bool = False
    recompute: bool = False
    at_once: bool = False


class StageInputs(NamedTuple):
    """Inputs of a micro-batch: targets (B, U), how many count, generator states (G, 2), rows (B, T)."""

    y_BxT: tf.Tensor
    count: Any
    states: Any
    rows_BxT: tf.Tensor | None = None


class Stage:
    """The compiled functions of a segment, for micro-batches of B rows.

    Args:
        segment: whose weights exist.
        generators: the states of all random generators of the full model, in its order.
        shape: of its input, (B, T) or (B, T, ...).
        seq_len: T.
        targets: of a row.
        way: how it is compiled.
        runs: groups of its trainable variables, by index; each has its gradients in one vector.

    Raises:
        UsageError: its random numbers would depend on previous stages.
    """

    def __init__(
        self,
        segment: ModelSegment,
        generators: Sequence[Any],
        shape: Sequence[int],
        seq_len: int,
        targets: int,
        way: StageVariant,
        runs: Sequence[range],
    ) -> None:
        self.segment, self.way = segment, way
        self._generators, self._runs = generators, runs
        model = segment.model
        self.x = tf.TensorSpec(shape, tf.int32 if way.first else model.inputs[0].dtype)
        out = model.outputs[0]
        self.out_shape = (shape[0], *(size or seq_len for size in out.shape[1:]))
        self.out_dtype = tf.as_dtype(out.dtype)
        self._dy = tf.TensorSpec(self.out_shape, self.out_dtype)
        self._targets = tf.TensorSpec((shape[0], targets), tf.int32)
        self._rows = tf.TensorSpec((shape[0], seq_len), tf.int32)
        self._trace()
        self._without_gradients: dict[str, Any] = {}

    # Training ------------------------------------------------------------------------------------

    def forward(self, x: Any, given: StageInputs) -> tuple[Any, Values]:
        """The activations for the next stage; of the last one loss, targets and correct predictions, (3,).

        Returns:
            These, or None if `backward` computes them; and the values saved for the backward pass.
        """
        inputs = [x, *given][: len(self._inputs)]
        if self.way.at_once:
            return None, dict(zip(self._inputs, inputs, strict=True))
        (out,), kept = self._kept.run(0, inputs, {})
        return out, dict(zip(self._inputs, inputs, strict=True)) if self.way.recompute else kept

    def backward(self, kept: Values, dy: Any) -> tuple[Any, Any, list[Any], Values]:
        """The gradient of the stage's input, and of its weights unless that is a separate step.

        Args:
            kept: from `forward`.
            dy: the gradient of its activations; None on the last stage.

        Returns:
            The gradient of the input (None on the first stage); loss, targets and correct predictions if
            `forward` returned none; a gradient for each run of variables; the values that `weights` needs.
        """
        given = [] if dy is None else [dy]
        if self._again is None:
            made, kept = self._kept.run(1, given, kept)
        else:
            made, kept = self._again.run(0, [*(kept[name] for name in self._inputs), *given], {})
        dx = None if self.way.first else made.pop(0)
        sums = made.pop(0) if self.way.at_once else None
        return dx, sums, made, kept

    def weights(self, kept: Values) -> list[Any]:
        """The gradient of each run of variables, if that is a separate step."""
        cuts, number = (self._kept, 2) if self._again is None else (self._again, 1)
        return cuts.run(number, [], kept)[0]

    def _trace(self) -> None:
        """Trace forward and backward as one graph, and split it.

        With recomputation, the forward pass still produces everything that it would save, and drops it: with
        fewer outputs TensorFlow fuses more, and rounds differently.
        """
        way = self.way
        states = tf.TensorSpec((len(self._generators), 2), tf.int64)
        signature = [self.x, self._targets, tf.TensorSpec((), tf.float32), states]
        signature += [self._rows] if self.segment.reads_rows else []
        taken = len(signature)
        signature += [] if way.last else [self._dy]
        found: dict[str, Any] = {}

        def graph(*inputs: Any) -> Any:
            found.update(self._graph(*inputs))
            return found["out"]

        self.traced = tf.compat.v1.wrap_function(graph, signature)
        inputs = self.traced.graph.inputs[: len(signature)]
        self._inputs = [tensor.name for tensor in inputs[:taken]]
        back = ([] if way.first else [found["dx"]]) + ([found["out"]] if way.at_once else [])
        backward = [back, found["dw"]] if way.split else [back + found["dw"]]
        nothing: list[list[Any]] = [[]] * (len(backward) - 1)
        self._again: GraphCuts | None = None
        if way.recompute or way.at_once:
            self._again = GraphCuts(self.traced, [inputs, *nothing], backward)
        if not way.at_once:
            steps = [inputs[:taken], inputs[taken:], *nothing]
            self._kept = GraphCuts(self.traced, steps, [[found["out"]], *backward])

    def _graph(self, x: Any, y_BxT: tf.Tensor, count: Any, states: Any, *more: Any) -> dict[str, Any]:
        """Outputs, and gradients of the input and of each run of variables.

        Args:
            x: see `forward`.
            y_BxT: see `StageInputs`, as the next two.
            count: of targets.
            states: of generators.
            more: the rows, if the segment reads them; the gradient of its output, unless it is the last one.
        """
        came = [x, more[0]] if self.segment.reads_rows else x
        dy = None if self.way.last else more[-1]
        pairs = [(one, tf.cast(states[i], one.dtype)) for i, one in enumerate(self._generators)]
        variables = [variable.value for variable in self.segment.trainable]
        # Not assigned to the generators: no step of a split graph may depend on side effects of another one.
        scope = StatelessScope(pairs, collect_losses=True, initialize_variables=False)
        shared = id(global_seed_generator().state)
        begin = scope.state_mapping[shared]
        with tf.GradientTape() as tape, scope:
            if not self.way.first:
                tape.watch(x)
            if self.way.last:
                target, out = loss_and_sums(self.segment.model, came, y_BxT, training=True)
                count = out[1]
            else:
                target = out = self.segment.model(came, training=True)
            own = scope.losses + [v.regularizer(v.value) for v in self.segment.trainable if v.regularizer]
            # As in `Replica`: losses added by layers count once per target.
            targets = [target, sum(own) * count] if own else [target]
        if not self.way.first and scope.state_mapping[shared] is not begin:
            raise UsageError(
                f"a layer of stage {self.segment.model.name!r} draws by keras.random without a generator: "
                "what it draws depends on all that was drawn before, in other stages. Give it one "
                "(self.seed_generator = keras.random.SeedGenerator(), and seed=self.seed_generator)"
            )
        seeds = None if dy is None else [dy, tf.ones(())][: len(targets)]
        sources = [*variables, *([] if self.way.first else [x])]
        zero = tf.UnconnectedGradients.ZERO
        parts = tape.gradient(targets, sources, output_gradients=seeds, unconnected_gradients=zero)
        parts = [tf.convert_to_tensor(part) for part in parts]
        dw = [concat([parts[place] for place in run]) for run in self._runs]
        return {"out": out, "dx": parts[-1], "dw": dw}

    # Without gradients ---------------------------------------------------------------------------

    def evaluate(self, x: Any, y_BxT: tf.Tensor, rows_BxT: tf.Tensor) -> Any:
        """The results of `forward`, without dropout, saving nothing."""
        came, specs = [tf.convert_to_tensor(x)], [self.x]
        if self.segment.reads_rows:
            came, specs = [*came, tf.convert_to_tensor(rows_BxT)], [*specs, self._rows]
        if not self.way.last:
            return self._compiled("evaluate", self._outputs, *specs)(*came)
        function = self._compiled("evaluate", self._sums, self._targets, *specs)
        return function(tf.convert_to_tensor(y_BxT), *came)

    def logits(self, x: Any, row_1xT: Any) -> Any:
        """The activations of one row; of the last stage its logits, float32."""
        came, specs = [x], [self.x]
        if self.segment.reads_rows:
            came, specs = [x, row_1xT], [*specs, self._rows]
        of_a_row = [tf.TensorSpec((1, *one.shape[1:]), one.dtype) for one in specs]
        return self._compiled("logits", self._logits if self.way.last else self._outputs, *of_a_row)(*came)

    def _compiled(self, name: str, graph: Callable[..., Any], *signature: Any) -> Any:
        """A function that is traced on first use."""
        if name not in self._without_gradients:
            self._without_gradients[name] = tf.function(graph, signature).get_concrete_function()
        return self._without_gradients[name]

    def _outputs(self, *came: Any) -> Any:
        return self.segment.model(one_or_all(came), training=False)

    def _logits(self, *came: Any) -> Any:
        return tf.cast(self._outputs(*came), tf.float32)

    def _sums(self, y_BxT: tf.Tensor, *came: Any) -> Any:
        return loss_and_sums(self.segment.model, one_or_all(came), y_BxT, training=False)[1]
