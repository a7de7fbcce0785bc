"""Learning rates by layer: a factor of each weight, as in fine-tuning of ULMFiT, BERT and ELECTRA.

With decay q, L blocks (layers named ``layer_0``, ``layer_0_...``, also behind a prefix such as ``encoder_``)
have q^(L - i) in block i, what lies before the first block (embeddings) has q^(L + 1), and what follows the
last one, the head, has 1 (Howard & Ruder 2018; Clark et al. 2020). A model without such names has a step for
each layer with weights. A tied embedding counts as an embedding; of an untied one the output matrix is head.

A factor multiplies the learning rate in the step of its weight, decoupled weight decay included, not the
gradient: to that Adam is invariant. It stands on the variable, so that any step that has the variable, or a
slice of it (`tf_dist.zero`), can find it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tf_dist.config.fine_tuning import FineTuningOptions
from tf_dist.models.patterns import chosen

BLOCK = re.compile(r"(?:.*_)?layer_\d+(?=_|$)")
HEAD = "/head"  # no layer's name: these have no slash
ATTRIBUTE = "tf_dist_lr_scale"


def lr_scale_of(variable: Any) -> float:
    """The factor of a variable's learning rate; 1 unless it was set."""
    return float(getattr(variable, ATTRIBUTE, 1.0))


def set_lr_scale(variable: Any, scale: float) -> None:
    """Set the factor of a variable's learning rate."""
    setattr(variable, ATTRIBUTE, scale)


def scale_learning_rates(weights: Sequence[Any], options: FineTuningOptions) -> None:
    """Set the factors of a model's trainable weights; none without such options.

    Args:
        weights: of the full model, in order, also frozen ones: they count as layers.
        options: of fine-tuning.

    Raises:
        UsageError: a pattern matches no trainable weight.
    """
    trained = [weight for weight in weights if weight.trainable]
    if options.layer_lr_decay != 1:
        decayed = dict(zip((w.path for w in weights), _decays(weights, options.layer_lr_decay), strict=True))
        for weight in trained:
            set_lr_scale(weight, decayed[weight.path])
    own = {}
    for pattern, factor in options.lr_factors():
        for place in chosen([weight.path for weight in trained], pattern, "--lr-scale"):
            own[place] = factor
    for place, factor in own.items():
        set_lr_scale(trained[place], lr_scale_of(trained[place]) * factor)


def _decays(weights: Sequence[Any], decay: float) -> list[float]:
    depths = layer_depths([weight.path for weight in weights])
    return [decay ** (max(depths) - depth) for depth in depths]


def layer_depths(paths: Sequence[str]) -> list[int]:
    """How deep in the model each weight lies: 0 before the first block, most in the head."""
    # The last product of an untied embedding is a weight of its layer, which stands first.
    layers = [HEAD if path.endswith("/reverse_embeddings") else path.split("/")[0] for path in paths]
    blocks = [_block(layer) for layer in layers]
    order = {block: i for i, block in enumerate(dict.fromkeys(filter(None, blocks)))}
    if not order:
        in_order = sorted(dict.fromkeys(layers), key=lambda layer: layer == HEAD)
        numbers = {layer: i for i, layer in enumerate(in_order)}
        return [numbers[layer] for layer in layers]
    last = max(i for i, block in enumerate(blocks) if block)
    depths, depth = [], 0
    for i, block in enumerate(blocks):
        if block:
            depth = 1 + order[block]
        depths.append(len(order) + 1 if i > last or layers[i] == HEAD else depth)
    return depths


def _block(layer: str) -> str:
    found = BLOCK.match(layer)
    return found[0] if found else ""
