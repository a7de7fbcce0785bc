"""Language modelling: each token is predicted from those before it (GPT, Radford et al. 2019)."""

from __future__ import annotations

from tf_dist.config.data import PACKED
from tf_dist.data.documents import PackedRows
from tf_dist.data.rows import Rows
from tf_dist.models.row_layout import TOKENS, Head, RowLayout
from tf_dist.tasks.base import Task


class CausalLM(Task):
    """Windows of running text -> the next token of each token; of packed documents, within its document."""

    name = "causal-lm"
    roles = ()
    architectures = ("decoder",)
    of_tables = False

    def head(self, classes: int) -> Head:
        """Logits of tokens, (B, T, V)."""
        return Head(TOKENS)

    def rows(self, rows: Rows, layout: RowLayout, seed: int) -> Rows:
        """The windows; of packed documents, the end of one predicts nothing."""
        return PackedRows(rows, self.config.end_of_text) if self.config.documents == PACKED else rows
