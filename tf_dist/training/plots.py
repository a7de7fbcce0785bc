"""The loss curve of a run as a picture."""

from __future__ import annotations

import os
from pathlib import Path

from tf_dist.atomic_io import replaced
from tf_dist.errors import LaunchError
from tf_dist.training.metrics_file import read_metrics


def loss_curve(metrics: Path, picture: Path, title: str) -> bool:
    """Draw training and validation loss over steps from a ``metrics.jsonl``.

    Returns:
        Whether it was drawn: False without matplotlib, or without a line of metrics.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")  # a cluster node has no screen
        from matplotlib import pyplot
    except ImportError:
        return False
    rows = read_metrics(metrics) if os.path.lexists(metrics) else []
    if not rows:
        return False
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced(picture, LaunchError, ".png") as temporary:  # never through a link
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    return True
