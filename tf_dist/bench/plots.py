"""Bar and line plots of benchmark results, saved beside their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OURS, OTHERS, MARKED = "#1f77b4", "#b0b0b0", "#d62728"
COLOURS = (OURS, "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#e7ba52", "#444444")


class Bars(NamedTuple):
    """A panel of horizontal bars: title, a label and a value for each, and which are ours."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]
    ours: Sequence[bool]


class Lines(NamedTuple):
    """A panel of lines: title, the names of both axes, and points (x, y) by the name of each line.

    Axes named in ``log`` (x, xy) are logarithmic; ``level`` is marked by a line across; ``ticks`` are of x.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log: str = ""
    level: float | None = None
    ticks: Sequence[float] = ()


def bars(path: Path, what: str, panels: Sequence[Bars]) -> Path:
    """Save panels of bars, one above the other; ours are coloured. ``what`` the values are, with unit."""
    figure, axes = _figure([0.9 + 0.3 * len(panel.labels) for panel in panels], 9.0)
    for axis, panel in zip(axes, panels, strict=True):
        colours = [OURS if ours else OTHERS for ours in panel.ours]
        drawn = axis.barh(range(len(panel.labels)), panel.values, color=colours)
        axis.bar_label(drawn, labels=[_short(value) for value in panel.values], padding=3, fontsize=8)
        axis.set_yticks(range(len(panel.labels)), panel.labels, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.tick_params(axis="x", labelsize=8)
    axes[-1].set_xlabel(what, fontsize=9)
    return _save(figure, path)


def stacked(path: Path, what: str, terms: Sequence[str], rows: Mapping[str, Sequence[float]]) -> Path:
    """Save one bar for each row, made of its terms."""
    figure, (axis,) = _figure([1.6 + 0.35 * len(rows)], 9.0)
    start = [0.0] * len(rows)
    for number, term in enumerate(terms):
        values = [row[number] for row in rows.values()]
        axis.barh(range(len(rows)), values, left=start, label=term, color=_colour(number))
        start = [begun + value for begun, value in zip(start, values, strict=True)]
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(what, fontsize=9)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path)


def lines(path: Path, panels: Sequence[Lines]) -> Path:
    """Save panels of lines, one above the other."""
    figure, axes = _figure([3.2] * len(panels), 7.5)
    for axis, panel in zip(axes, panels, strict=True):
        for number, (name, points) in enumerate(panel.lines.items()):
            style = "--" if number >= len(COLOURS) else "-"
            look = {"marker": "o", "markersize": 3, "color": _colour(number), "linestyle": style}
            axis.plot(*zip(*points, strict=True), label=name, **look)
        if "x" in panel.log:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.4g}")
        if "y" in panel.log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        if panel.ticks:
            axis.set_xticks(list(panel.ticks))
        if panel.level is not None:
            axis.axhline(panel.level, color=MARKED, linewidth=0.8, linestyle="--")
        axis.set_xlabel(panel.x, fontsize=9)
        axis.set_ylabel(panel.y, fontsize=9)
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.tick_params(labelsize=8, which="both")
        axis.grid(alpha=0.3)
        many = len(panel.lines) > len(COLOURS)  # they would cover what they explain
        axis.legend(fontsize=8, **({"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if many else {}))
    return _save(figure, path)


def grid(path: Path, title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Path:
    """Save a grid of words; in each row, words that differ from the first have another colour."""
    figure, (axis,) = _figure([0.9 + 0.28 * len(rows)], 9.0)
    axis.axis("off")
    axis.set_title(title, fontsize=10, loc="left")
    colours = [["#dbe9f6" if word == row[0] else "#f6c6c6" for word in row] for row in rows.values()]
    drawn = axis.table(
        cellText=[list(row) for row in rows.values()],
        cellColours=colours,
        rowLabels=list(rows),
        colLabels=list(columns),
        bbox=(0.42, 0.0, 0.58, 1.0),
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    return _save(figure, path)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _figure(heights: Sequence[float], width: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(heights),
        1,
        figsize=(width, sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": list(heights)},
        layout="constrained",
    )
    return figure, axes[:, 0]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
