"""Self-attention of a Transformer: projections to heads, positions, scores, and the projection back.

Legend: B rows, T tokens, N new ones, D width, H heads, G heads of keys and values, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tf_dist.config.rope_scaling import RopeScaling
from tf_dist.config.transformer import ROPE, TransformerOptions
from tf_dist.models import attention, kv_cache
from tf_dist.models.body_sizes import GPT2, described
from tf_dist.models.fast_layers import RMSNormalization, rms_norm
from tf_dist.models.incremental import Span
from tf_dist.models.kernel_groups import set_groups
from tf_dist.models.rotary import RotaryEmbedding, Rotation

Heads = tuple[Any, Any, Any]


@keras.saving.register_keras_serializable("tf_dist")
class CausalSelfAttention(layers.Layer):
    """Causal self-attention: a token attends to itself and to those before it (Vaswani et al. 2017).

    Args:
        heads: H; must divide the width of the input, or ``kind`` says the width of a head.
        dropout: fraction of attention weights dropped in training.
        output_stddev: standard deviation of the output projection's initial weights.
        attend: queries, keys and values, (B, H, T, K) each, -> attention output; without dropout. Given
            ``window=W`` where there is one.
        kind: heads of keys and values, width of a head, norms, biases, positions and window.
        places: positions of the T tokens, where ranks partition rows; None: 0 to T - 1.
    """

    def __init__(
        self,
        heads: int,
        dropout: float,
        output_stddev: float,
        attend: Callable[..., Any] = attention.attention,
        kind: TransformerOptions | dict[str, Any] = GPT2,
        places: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.heads, self.dropout, self.output_stddev = heads, dropout, output_stddev
        self.attend, self.places = attend, places
        self.kind = TransformerOptions(**kind) if isinstance(kind, dict) else kind
        self.kv_heads = self.kind.kv_heads or heads
        self.own_heads, self.own_kv_heads = heads, self.kv_heads
        self.biased = False

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the projections: for queries, keys and values together or in two, and for the output."""
        width = input_shape[-1]
        assert width is not None
        kind, heads = self.kind, self.heads
        self.head_width = kind.width_of_head(width, heads)
        if self.kv_heads == heads:
            self.query_key_value = self._to_heads(3 * heads, 3, "query_key_value")
            self.query_key_value.build(input_shape)
            set_groups(self.query_key_value.kernel, 3)
        else:
            self.query = self._to_heads(heads, 1, "query")
            self.key_value = self._to_heads(2 * self.kv_heads, 2, "key_value")
            self.query.build(input_shape)
            self.key_value.build(input_shape)
            set_groups(self.key_value.kernel, 2)
        self.output_projection = self._contracting(
            width, use_bias=kind.has_bias(), kernel_initializer=_normal(self.output_stddev),
            name="output_projection",
        )  # fmt: skip
        self.attention_dropout = layers.Dropout(self.dropout)
        self.output_projection.build((*input_shape[:-1], self.head_width * self.own_heads))
        if kind.qk_norm:
            self.query_norm, self.key_norm = (
                RMSNormalization(epsilon=kind.norm_epsilon, name=f"{of}_norm") for of in ("query", "key")
            )
            for norm in (self.query_norm, self.key_norm):
                norm.build((None, None, None, self.head_width))
        if kind.position_embedding == ROPE:
            scaling = RopeScaling.parsed(kind.rope_scaling)
            self.rotary = RotaryEmbedding(self.head_width, kind.rope_theta, scaling)

    def _to_heads(self, heads: int, groups: int, name: str) -> layers.Layer:
        return self._expanding(
            heads * self.head_width, groups, use_bias=self.kind.has_bias(of_queries=True),
            kernel_initializer=_normal(0.02), name=name,
        )  # fmt: skip

    # Overridden with tensor parallelism (`tf_dist.layers.attention`): a rank has own_heads of the heads,
    # projections to and from these, their part of the dropout mask of all, and gains that all ranks have.
    def _expanding(self, units: int, groups: int = 1, **options: Any) -> layers.Layer:
        return layers.Dense(units, **options)

    def _contracting(self, units: int, **options: Any) -> layers.Layer:
        return layers.Dense(units, **options)

    def _drop(self, weights_BxHxTxT: Any) -> Any:
        return self.attention_dropout(weights_BxHxTxT, training=True)

    def _replicated(self, weight: Any) -> Any:
        return tf.convert_to_tensor(weight)

    def call(self, x_BxTxD: Any, bias: Any = None, training: bool = False) -> Any:
        """Return the attention output, (B, T, D).

        Args:
            x_BxTxD: the input.
            bias: of the scores, see `tf_dist.models.attention.biased_attention`: it says which tokens see
                which. None: causal.
            training: whether dropout is active.
        """
        self.biased = bias is not None
        rotation, window = self._rotation(x_BxTxD.shape[1]), self.kind.sliding_window
        q_BxHxTxK, k_BxGxTxK, v_BxGxTxK = self._project(x_BxTxD, rotation)
        k_BxHxTxK, v_BxHxTxK = (attention.repeat_heads(one, self.own_heads) for one in (k_BxGxTxK, v_BxGxTxK))
        if bias is not None and window:
            bias = self._in_window(bias, x_BxTxD.shape[1])
        if training and self.dropout:
            attended_BxHxTxK = attention.attention_with_dropout(
                q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, self._drop, bias, window
            )
        elif bias is not None:
            attended_BxHxTxK = attention.biased_attention(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, bias)
        else:
            windowed = {"window": window} if window else {}
            attended_BxHxTxK = self.attend(q_BxHxTxK, k_BxHxTxK, v_BxHxTxK, **windowed)
        return self.output_projection(attention.join_heads(attended_BxHxTxK))

    def _project(self, x_BxTxD: Any, rotation: Rotation | None) -> Heads:
        """Queries (B, H, T, K), keys and values (B, G, T, K), normalized and rotated."""
        if self.kv_heads == self.heads:
            q, k, v = attention.split_heads(self.query_key_value(x_BxTxD), self.own_heads)
        else:
            (q,) = attention.split_heads(self.query(x_BxTxD), self.own_heads, 1)
            k, v = attention.split_heads(self.key_value(x_BxTxD), self.own_kv_heads, 2)
        if self.kind.qk_norm:
            q, k = (
                rms_norm(one, self._replicated(norm.scale), norm.epsilon)
                for one, norm in ((q, self.query_norm), (k, self.key_norm))
            )
        return (q, k, v) if rotation is None else (rotation.of(q), rotation.of(k), v)

    def _rotation(self, tokens: int) -> Rotation | None:
        if self.kind.position_embedding != ROPE:
            return None
        return self.rotary.at(np.arange(tokens) if self.places is None else self.places)

    def _in_window(self, bias: Any, tokens: int) -> Any:
        hidden_TxT = attention.older(np.arange(tokens), np.arange(tokens), self.kind.sliding_window)
        return bias if hidden_TxT is None else tf.minimum(bias, tf.constant(hidden_TxT, bias.dtype))

    # Incremental (`tf_dist.models.incremental`): keys and values are kept.
    bounded = True

    def begin(self, batch: int, length: int) -> kv_cache.KeyValueCache | tuple[kv_cache.KeyValueCache, Any]:
        """Return the cache of ``batch`` rows, for up to ``length`` positions; with a bias, that of each."""
        cache = kv_cache.empty(batch, self.own_kv_heads, length, self.head_width, self.compute_dtype)
        return (cache, kv_cache.no_bias(batch, length)) if self.biased else cache

    def step(self, x_BxNxD: Any, bias: Any = None, *, cache: Any, span: Span) -> tuple[Any, Any]:
        """Return the attention output of new positions, (B, N, D), and the cache with them."""
        if self.biased:
            return self._biased_step(x_BxNxD, bias, cache, span)
        q_BxHxNxK, cache = self._cached(x_BxNxD, cache, span)
        if bias is None:
            bias = self._causal(x_BxNxD, cache, span, q_BxHxNxK.dtype)
        return self._attended(q_BxHxNxK, cache, bias), cache

    def _biased_step(
        self, x_BxNxD: Any, bias: Any, given: tuple[kv_cache.KeyValueCache, Any], span: Span
    ) -> tuple[Any, Any]:
        """A step where a bias says who sees whom: of new positions, or at first of all that will come."""
        cache, keys_Bx1x1xL = given
        q_BxHxNxK, cache = self._cached(x_BxNxD, cache, span)
        new, length = x_BxNxD.shape[1], cache.k_BxHxLxK.shape[2]
        if bias is None:
            bias_Bx1xNxL = keys_Bx1x1xL + self._causal(x_BxNxD, cache, span, tf.float32)
        elif isinstance(bias, kv_cache.BiasOfAll):
            bias_Bx1xNxL = kv_cache.padded_bias(bias.bias[:, :, :new, :new], length, attention.MASKED)
            keys_Bx1x1xL = kv_cache.padded_bias(bias.bias[:, :, -1:, :new], length, 0.0)
        else:
            bias_Bx1xNxL = kv_cache.padded_bias(bias, length, attention.MASKED)
            if self.kind.sliding_window:
                bias_Bx1xNxL = tf.minimum(
                    bias_Bx1xNxL, self._causal(x_BxNxD, cache, span, bias_Bx1xNxL.dtype)
                )
        return self._attended(q_BxHxNxK, cache, bias_Bx1xNxL), (cache, keys_Bx1x1xL)

    def _cached(
        self, x_BxNxD: Any, cache: kv_cache.KeyValueCache, span: Span
    ) -> tuple[Any, kv_cache.KeyValueCache]:
        """Queries of new positions, (B, H, N, K), and the cache with their keys and values."""
        rotated = self.kind.position_embedding == ROPE
        rotation = self.rotary.at_each(span.positions(x_BxNxD.shape[1])) if rotated else None
        q_BxHxNxK, k_BxGxNxK, v_BxGxNxK = self._project(x_BxNxD, rotation)
        return q_BxHxNxK, cache.written(k_BxGxNxK, v_BxGxNxK, span)

    def _causal(self, x_BxNxD: Any, cache: kv_cache.KeyValueCache, span: Span, dtype: Any) -> Any:
        length = cache.k_BxHxLxK.shape[2]
        return kv_cache.causal_bias(span, x_BxNxD.shape[1], length, dtype, self.kind.sliding_window)

    def _attended(self, q_BxHxNxK: Any, cache: kv_cache.KeyValueCache, bias_Bx1xNxL: Any) -> Any:
        bias_Bx1xNxL = keras.ops.cast(bias_Bx1xNxL, q_BxHxNxK.dtype)
        attended_BxHxNxK = kv_cache.cached_attention(q_BxHxNxK, cache, bias_Bx1xNxL)
        return self.output_projection(attention.join_heads(attended_BxHxNxK))

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "heads": self.heads,
            "dropout": self.dropout,
            "output_stddev": self.output_stddev,
            **described(self.kind),
        }


def _normal(stddev: float) -> keras.initializers.Initializer:
    return keras.initializers.RandomNormal(stddev=stddev)
