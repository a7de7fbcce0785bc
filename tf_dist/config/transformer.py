"""Options of a Transformer's layers: what decoders since 2019 differ in. The defaults are GPT-2's.

One set of options describes GPT-2, Llama, Qwen and BERT (`tf_dist/data/presets`), so that every kind of
parallelism, the exact sums and the checkpoints hold for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.config.model import ModelOptions
from tf_dist.config.rope_scaling import RopeScaling
from tf_dist.errors import UsageError

option = partial(options.option, group="transformer layers", on_resume="same")
of_attention = partial(options.option, group="attention", on_resume="same")

LAYERNORM, RMSNORM = "layernorm", "rmsnorm"
LEARNED, ROPE, NO_POSITIONS = "learned", "rope", "none"
PRE, POST = "pre", "post"
ALL_BIASES, QKV_BIASES, NO_BIASES = "all", "qkv", "none"
GATED = ("swiglu", "geglu")
# Width of a gated feed-forward network: 8/3 D has the parameters of an ungated one of 4 D (Shazeer 2020).
GATED_MULTIPLE = 64


@dataclass(frozen=True)
class TransformerOptions(options.Options):
    """The layers of a Transformer. Widths in units."""

    normalization: str = option(
        LAYERNORM, text="layernorm, or rmsnorm: without mean and offset", choices=(LAYERNORM, RMSNORM)
    )
    norm_epsilon: float = option(1e-5, text="added to the variance that a norm divides by", least=0)
    norm_order: str = option(
        PRE, text="norms before each sublayer, or after its sum (BERT)", choices=(PRE, POST)
    )
    activation: str = option(
        "gelu",
        text="of the feed-forward network; swiglu and geglu have a gate",
        choices=("gelu", "gelu-tanh", "relu", *GATED),
    )
    ffn_width: int = option(
        0, text="width of the feed-forward network; 0: 4 widths, with a gate 8/3 of one", least=0
    )
    position_embedding: str = of_attention(
        LEARNED,
        text="learned vectors, rope: rotated queries and keys, or none",
        choices=(LEARNED, ROPE, NO_POSITIONS),
    )
    rope_theta: float = of_attention(10_000.0, text="base of the wavelengths of rope", least=1)
    rope_scaling: str = of_attention(
        "",
        text="of rope: linear:FACTOR, or llama3:FACTOR:LOW:HIGH:TOKENS",
        metavar="RULE",
    )
    kv_heads: int = of_attention(
        0, text="heads of keys and values (grouped-query attention); 0: as many as heads", least=0
    )
    head_width: int = of_attention(0, text="width of a head; 0: width / heads", least=0)
    qk_norm: bool = of_attention(False, text="normalize queries and keys, a head at a time")
    bias: str = option(
        ALL_BIASES,
        text="biases of dense layers: all, those of queries, keys and values, or none",
        choices=(ALL_BIASES, QKV_BIASES, NO_BIASES),
    )
    sliding_window: int = of_attention(
        0, text="tokens that a token attends to, itself included; 0: all before it", least=0
    )

    def check(self) -> None:
        """Refuse a rule of scaling that is none, and one that scales nothing."""
        RopeScaling.parsed(self.rope_scaling)
        if self.rope_scaling and self.position_embedding != ROPE:
            raise UsageError(
                f"rope_scaling {self.rope_scaling} with position_embedding {self.position_embedding}: it "
                "scales rope. Use position_embedding rope"
            )

    def check_model(self, model: ModelOptions, task: str) -> None:
        """Refuse sizes that do not fit each other, or the model.

        Raises:
            UsageError: with sizes that do.
        """
        if model.model != "transformer":
            return
        heads = model.heads
        if not self.head_width and model.width % heads:
            raise UsageError(
                f"heads {heads} does not divide width {model.width}: every head has the same width. Or set "
                "head_width"
            )
        if self.kv_heads and heads % self.kv_heads:
            raise UsageError(
                f"kv_heads {self.kv_heads} does not divide heads {heads}: each is read by as many heads"
            )
        width = self.width_of_head(model.width, heads)
        if self.position_embedding == ROPE and width % 2:
            raise UsageError(
                f"position_embedding rope rotates pairs, and a head is {width} wide: use an even head_width"
            )
        if self.sliding_window and task != "causal-lm":
            raise UsageError(
                f"sliding_window {self.sliding_window} with task {task}: windows are of causal attention. "
                "Use sliding_window 0"
            )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has a gate."""
        return self.activation in GATED

    def width_of_head(self, width: int, heads: int) -> int:
        """K."""
        return self.head_width or width // heads

    def width_of_ffn(self, width: int) -> int:
        """Units of the feed-forward network of a model ``width`` wide."""
        if self.ffn_width:
            return self.ffn_width
        if not self.gated:
            return 4 * width
        return -(-8 * width // (3 * GATED_MULTIPLE)) * GATED_MULTIPLE

    def has_bias(self, of_queries: bool = False) -> bool:
        """Whether a dense layer has one; ``of_queries``: that of queries, keys and values."""
        return self.bias == ALL_BIASES or (of_queries and self.bias == QKV_BIASES)
