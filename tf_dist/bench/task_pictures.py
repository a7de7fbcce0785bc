"""Pictures of what models of tasks make: spectrograms of a text, spoken and recorded; an image's caption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tf_dist.config import Config
from tf_dist.data.images import read_png
from tf_dist.data.media_files import file_of_row
from tf_dist.data.mel import log_mel
from tf_dist.data.pictures import caption_picture, spectrogram_picture
from tf_dist.data.wav import read_wav
from tf_dist.tasks.sound import mel_parameters

# Sides of an image, for people.
PIXELS = 256


def draw(config: Config, table: Path, predictions: Path) -> list[Path]:
    """Draw the first prediction of a task of sound or images, beside its file; nothing of another task.

    Args:
        config: of the run.
        table: of its data, beside whose files are.
        predictions: as written by ``evaluate --predictions``.

    Returns:
        The PNG files.
    """
    with open(predictions) as file:
        row = json.loads(file.readline())
    if config.task == "speak":
        spoken = predictions.parent / row["prediction"]
        recorded = file_of_row(table, row["target"], str(predictions))
        return [
            _spectrogram(config, path, f"{row['reference']} ({who})", predictions.with_name(f"{who}.png"))
            for who, path in (("spoken", spoken), ("recorded", recorded))
        ]
    if config.task == "caption":
        return [_caption(row, table, predictions.with_name("caption.png"))]
    return []


def _spectrogram(config: Config, path: Path, text: str, picture: Path) -> Path:
    parameters = mel_parameters(config)
    samples_N = read_wav(path, config.sample_rate, str(path)).samples_N
    spectrogram_picture(log_mel(samples_N, parameters), parameters, text, picture)
    return picture


def _caption(row: Mapping[str, str], table: Path, picture: Path) -> Path:
    path = file_of_row(table, row["source"], str(table))
    caption = f"{row['prediction']}  (is: {row['reference']})"
    caption_picture(read_png(path, PIXELS, PIXELS, str(path)), caption, picture)
    return picture
