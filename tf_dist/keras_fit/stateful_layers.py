"""Layers whose state goes on from a batch to the next: they know its rows by their places."""

from __future__ import annotations

from typing import Any

from tf_dist.errors import UsageError


def refuse_stateful(model: Any, ranks: int) -> None:
    """Raise UsageError where a layer keeps a state for each row of the whole batch (``stateful=True``)."""
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            raise UsageError(
                f"layer {layer.name!r} has stateful=True: it keeps a state for each row of a batch, and each "
                f"of the {ranks} ranks has some of the rows only. Give the sequences whole, with "
                "stateful=False, or let one rank train: with tf_dist.independent(): model.fit(...)"
            )
