"""What tasks of sound share: the parameters of their spectrograms."""

from __future__ import annotations

from tf_dist.config import Config
from tf_dist.data.mel import MelParameters


def mel_parameters(config: Config) -> MelParameters:
    """The spectrogram of a run."""
    return MelParameters(sample_rate=config.sample_rate, mels=config.mels)
