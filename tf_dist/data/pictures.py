"""Pictures of rows for people: a mel spectrogram with its text, an image with its caption."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tf_dist.atomic_io import replaced
from tf_dist.data.mel import MelParameters, band_edges_hz
from tf_dist.errors import DataError

DPI = 120
LINE_CHARACTERS = 80
HERTZ_TICKS = (100, 200, 500, 1000, 2000, 4000, 8000, 16000)


def spectrogram_picture(
    log_mel_FxM: NDArray[np.floating[Any]], parameters: MelParameters, text: str, picture: Path
) -> None:
    """Draw a log-mel spectrogram, time to the right, pitch upwards, with the spoken text above.

    Args:
        log_mel_FxM: of `log_mel`, or predicted; frames of NaN (padding) stay white.
        parameters: as of `log_mel`.
        text: that is spoken; drawn as it is.
        picture: PNG file to write.

    Raises:
        DataError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(picture, (8, 3.2))
    axes = figure.add_subplot()
    seconds = len(log_mel_FxM) * parameters.hop / parameters.sample_rate
    image = axes.imshow(
        np.asarray(log_mel_FxM, np.float32).T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, seconds, 0, parameters.mels),
    )
    peaks_hz = band_edges_hz(parameters)[1:-1]
    ticks = [hertz for hertz in HERTZ_TICKS if peaks_hz[0] <= hertz <= peaks_hz[-1]]
    # Band m is drawn from m to m + 1.
    axes.set_yticks([float(np.interp(hz, peaks_hz, np.arange(parameters.mels) + 0.5)) for hz in ticks])
    axes.set_yticklabels([f"{hertz:,}" for hertz in ticks])
    axes.set(xlabel="seconds", ylabel="Hz (mel scale)")
    axes.set_title(textwrap.fill(text, LINE_CHARACTERS), parse_math=False, fontsize="medium")
    figure.colorbar(image, ax=axes, label="log magnitude, scaled")
    _save(figure, picture)


def caption_picture(pixels_HxWx3: NDArray[np.uint8], caption: str, picture: Path) -> None:
    """Draw an image with its caption below.

    Args:
        pixels_HxWx3: of `read_png` or `pixels_of_patches`.
        caption: true or generated; drawn as it is, line feeds included.
        picture: PNG file to write.

    Raises:
        DataError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(picture, (4, 4))
    axes = figure.add_subplot()
    axes.imshow(pixels_HxWx3, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    lines = [textwrap.fill(line, LINE_CHARACTERS // 2) for line in caption.splitlines()]
    axes.set_xlabel("\n".join(lines), parse_math=False)
    _save(figure, picture)


def _figure(picture: Path, inches: tuple[float, float]) -> Any:
    """A figure without pyplot, which keeps global state and may look for a screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(f"drawing {picture} needs matplotlib: pip install 'tf_dist[plots]'") from error
    return Figure(figsize=inches, layout="constrained")


def _save(figure: Any, picture: Path) -> None:
    with replaced(picture, DataError, ".png") as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
