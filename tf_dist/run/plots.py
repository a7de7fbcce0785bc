"""Plots the loss curve of a run."""

from __future__ import annotations

from pathlib import Path

from tf_dist.atomic_io import replaced
from tf_dist.errors import LaunchError
from tf_dist.run.metrics_file import read_metrics

CURVES = (("loss", "training", "-"), ("val_loss", "validation", "o-"))


def loss_curve(metrics: Path, picture: Path, title: str) -> str:
    """Draw training and validation loss over steps from a ``metrics.jsonl``.

    Returns:
        Why it could not be drawn; empty if it was. A training does not fail for it.
    """
    try:
        rows = read_metrics(metrics) if metrics.exists() else []
        points = {
            key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key, _, _ in CURVES
        }
        if not any(points.values()):
            return f"{metrics} has no row with a loss"
        _draw(points, picture, title)
    except ModuleNotFoundError as error:
        if error.name == "matplotlib":
            return "matplotlib is not installed (pip install matplotlib)"
        return f"matplotlib cannot be loaded: {error}"
    except Exception as error:  # its settings, its fonts, its cache, a full disk
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
    return ""


def _draw(points: dict[str, list[tuple[int, float]]], picture: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")  # a cluster node has no screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    try:
        for key, label, style in CURVES:
            if points[key]:
                axes.plot(*zip(*points[key], strict=True), style, label=label, markersize=4)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        with replaced(picture, LaunchError, ".png") as temporary:  # never through a link
            figure.savefig(temporary, dpi=120)
    finally:
        pyplot.close(figure)
