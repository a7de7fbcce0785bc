"""Log-mel spectrograms: short-time Fourier transform, Slaney's mel filters, logarithm.

Shapes: N samples, F frames, W samples of a window, K frequency bins, M mel bands.

Products are `numpy.einsum` in float64, and not BLAS, whose last bits can depend on the number of threads:
every process on machines of one kind gets the same bits. (NumPy's exp and log can differ in the last bit
between kinds of CPU; float16, which rows of tasks hold, hides nearly all of that.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tf_dist.errors import DataError, UsageError

# Magnitudes below are silence (as Tacotron 2 implementations clip).
SILENCE = 1e-5
# Natural logarithms of magnitudes are about -11.5 (SILENCE) to 1; models see (log + 5) / 4: -1.6 to 1.6.
LOG_CENTER, LOG_SCALE = -5.0, 4.0
# Beyond any recording: what an untrained model predicts must not overflow.
LOUDEST = 8.0
FRAMES_AT_ONCE = 1024
# Slaney's mel scale: linear below 1 kHz, 15 mels there; then each mel is a step of log(6.4) / 27.
LINEAR_HZ_PER_MEL = 200 / 3
KNEE_HZ, KNEE_MEL = 1000.0, 15.0
LOG_STEP = math.log(6.4) / 27


@dataclass(frozen=True)
class MelParameters:
    """What a log-mel spectrogram is computed with; both directions need the same.

    sample_rate: of the samples, in Hz.
    window_ms, hop_ms: length of a frame, and distance between starts of frames; rounded to whole samples.
    mels: number of bands.
    lowest_hz, highest_hz: range of the bands; highest_hz None is half the sample rate.
    """

    sample_rate: int = 16000
    window_ms: float = 25.0
    hop_ms: float = 10.0
    mels: int = 80
    lowest_hz: float = 0.0
    highest_hz: float | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` where the parameters fit no spectrogram."""
        if self.sample_rate < 1000 or self.hop < 1 or self.mels < 1:
            raise UsageError(f"{self}: sample_rate is at least 1000 Hz, hop_ms a sample, mels 1")
        if self.window < 2 * self.hop:
            raise UsageError(f"{self}: window_ms must be at least twice hop_ms, or samples are lost")
        if not 0 <= self.lowest_hz < self.top_hz <= self.sample_rate / 2:
            raise UsageError(f"{self}: 0 <= lowest_hz < highest_hz <= {self.sample_rate / 2:g} Hz")
        if not mel_filters(self).any(axis=1).all():
            raise UsageError(
                f"{self}: some of {self.mels} mel bands have no frequency bin. "
                "Choose fewer mels, or a longer window_ms"
            )

    @property
    def window(self) -> int:
        """W, samples of a frame."""
        return round(self.window_ms * self.sample_rate / 1000)

    @property
    def hop(self) -> int:
        """Samples between starts of frames."""
        return round(self.hop_ms * self.sample_rate / 1000)

    @property
    def fft_size(self) -> int:
        """The power of two that holds a window; the rest is zeros. K is half of it, plus one."""
        return 1 << max(self.window - 1, 1).bit_length()

    @property
    def top_hz(self) -> float:
        """Upper end of the highest band."""
        return self.sample_rate / 2 if self.highest_hz is None else self.highest_hz

    def frames(self, samples: int) -> int:
        """F of so many samples."""
        return 1 + samples // self.hop


def hz_to_mel(hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slaney's mel scale (Auditory Toolbox, 1998), as librosa's default."""
    linear = hz / LINEAR_HZ_PER_MEL
    return np.where(hz < KNEE_HZ, linear, KNEE_MEL + np.log(np.maximum(hz, KNEE_HZ) / KNEE_HZ) / LOG_STEP)


def mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of `hz_to_mel`."""
    above = KNEE_HZ * np.exp((np.maximum(mel, KNEE_MEL) - KNEE_MEL) * LOG_STEP)
    return np.where(mel < KNEE_MEL, mel * LINEAR_HZ_PER_MEL, above)


def band_edges_hz(parameters: MelParameters) -> NDArray[np.float64]:
    """M + 2 frequencies, equally far in mel: band m is a triangle from edge m to m + 2, its peak at m + 1."""
    ends = hz_to_mel(np.array([parameters.lowest_hz, parameters.top_hz]))
    return mel_to_hz(np.linspace(ends[0], ends[1], parameters.mels + 2))


@lru_cache(maxsize=8)
def mel_filters(parameters: MelParameters) -> NDArray[np.float64]:
    """Triangular filters (M, K) of unit area, as ``librosa.filters.mel`` makes them by default."""
    edges_hz = band_edges_hz(parameters)
    bins_hz = np.linspace(0, parameters.sample_rate / 2, parameters.fft_size // 2 + 1)
    left, peak, right = (edges_hz[i : i + parameters.mels, None] for i in range(3))
    rising, falling = (bins_hz - left) / (peak - left), (right - bins_hz) / (right - peak)
    filters_MxK = np.maximum(0, np.minimum(rising, falling)) * (2 / (right - left))
    filters_MxK.flags.writeable = False
    return filters_MxK


@lru_cache(maxsize=8)
def hann(parameters: MelParameters) -> NDArray[np.float64]:
    """Periodic Hann window (W)."""
    window_W = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(parameters.window) / parameters.window)
    window_W.flags.writeable = False
    return window_W


def stft(samples_N: NDArray[np.floating[Any]], parameters: MelParameters) -> NDArray[np.complex128]:
    """STFT (F, K). Frame f is centered at sample f * hop; beyond the ends are zeros."""
    return _spectra(_padded(samples_N, parameters), parameters)


def log_mel(samples_N: NDArray[np.floating[Any]], parameters: MelParameters) -> NDArray[np.float32]:
    """The log-mel spectrogram of samples, scaled for models.

    ``(ln(max(filters @ |STFT|, 1e-5)) + 5) / 4``: magnitudes and not powers, as Tacotron 2 (Shen et al.
    2018, arXiv:1712.05884), and one fixed scale, so that it can be inverted (`griffin_lim.waveform`).

    Args:
        samples_N: mono, full scale -1 to 1.
        parameters: its sample rate must be that of the samples.

    Returns:
        (F, M) float32, about -1.63 (silence) to 1.6 (a tone of full scale); F is ``parameters.frames(N)``.

    Raises:
        DataError: no samples.
    """
    if not len(samples_N):
        raise DataError("a spectrogram of no samples: remove the empty recording")
    total, hop = parameters.frames(len(samples_N)), parameters.hop
    padded = _padded(samples_N, parameters)
    found = np.empty((total, parameters.mels), np.float32)
    for start in range(0, total, FRAMES_AT_ONCE):  # long recordings in constant memory
        stop = min(start + FRAMES_AT_ONCE, total)
        part = padded[start * hop : (stop - 1) * hop + parameters.window]
        magnitudes_FxK = np.abs(_spectra(part, parameters))
        found[start:stop] = (
            np.log(np.maximum(mel_of(magnitudes_FxK, parameters), SILENCE)) - LOG_CENTER
        ) / LOG_SCALE
    return found


def mel_of(magnitudes_FxK: NDArray[np.float64], parameters: MelParameters) -> NDArray[np.float64]:
    """Mel magnitudes (F, M) of a spectrogram."""
    mel_FxM: NDArray[np.float64] = np.einsum(
        "fk,mk->fm", magnitudes_FxK, mel_filters(parameters), optimize=False
    )
    return mel_FxM


def mel_magnitudes(log_mel_FxM: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Mel magnitudes (F, M) of what `log_mel` returned or a model predicted."""
    logs = np.asarray(log_mel_FxM, np.float64) * LOG_SCALE + LOG_CENTER
    return np.exp(np.clip(logs, math.log(SILENCE), LOUDEST))


def _padded(samples_N: NDArray[np.floating[Any]], parameters: MelParameters) -> NDArray[np.float64]:
    """Half a window of zeros at both ends."""
    half = parameters.window // 2
    return np.pad(np.asarray(samples_N, np.float64), (half, parameters.window - half))


def _spectra(padded: NDArray[np.float64], parameters: MelParameters) -> NDArray[np.complex128]:
    frames_FxW = np.lib.stride_tricks.sliding_window_view(padded, parameters.window)[:: parameters.hop]
    spectra_FxK: NDArray[np.complex128] = np.fft.rfft(frames_FxW * hann(parameters), n=parameters.fft_size)
    return spectra_FxK
