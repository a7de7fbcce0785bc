"""Language modelling: each token is predicted from those before it (GPT, Radford et al. 2019)."""

from __future__ import annotations

from tf_dist.models.row_layout import TOKENS, Head
from tf_dist.tasks.base import Task


class CausalLM(Task):
    """Windows of running text -> the next token of each token."""

    name = "causal-lm"
    roles = ()
    architectures = ("decoder",)
    of_tables = False

    def head(self, classes: int) -> Head:
        """Logits of tokens, (B, T, V)."""
        return Head(TOKENS)
