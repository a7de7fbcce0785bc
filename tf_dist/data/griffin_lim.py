"""Waveforms from spectrograms: mel pseudo-inverse, then fast Griffin-Lim for the phases.

Shapes as in `tf_dist.data.mel`: N samples, F frames, W samples of a window, K frequency bins, M mel bands.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from tf_dist.data.mel import MelParameters, hann, mel_filters, mel_magnitudes, stft
from tf_dist.errors import DataError

ITERATIONS = 60
# Of the fast variant; 0 is the algorithm of 1984.
MOMENTUM = 0.99
TINY = 1e-12


def waveform(
    log_mel_FxM: NDArray[np.floating[Any]],
    parameters: MelParameters,
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Samples whose log-mel spectrogram is close to the given one.

    Mel bands become frequency bins by the pseudo-inverse of the filters, negative values by zero; phases
    come from `griffin_lim`. What the mel bands do not resolve is lost.

    Args:
        log_mel_FxM: of `log_mel`, or predicted by a model.
        parameters: as of `log_mel`.
        iterations: of Griffin-Lim.
        seed: of the first phases.

    Returns:
        (F - 1) * hop samples, float32. `write_wav` clips what is beyond full scale.

    Raises:
        DataError: fewer than two frames, another number of bands, or values that are NaN or infinite.
    """
    values_FxM = np.asarray(log_mel_FxM, np.float64)
    if values_FxM.ndim != 2 or len(values_FxM) < 2 or values_FxM.shape[1] != parameters.mels:
        raise DataError(
            f"a waveform needs two frames or more of {parameters.mels} mel bands, not {values_FxM.shape}"
        )
    if not np.isfinite(values_FxM).all():
        raise DataError("a mel spectrogram with NaN or infinity has no waveform. Remove padded frames first")
    magnitudes_FxK = np.einsum(
        "fm,km->fk", mel_magnitudes(values_FxM), _mel_pseudo_inverse(parameters), optimize=False
    )
    return griffin_lim(np.maximum(magnitudes_FxK, 0), parameters, iterations=iterations, seed=seed)


def griffin_lim(
    magnitudes_FxK: NDArray[np.float64],
    parameters: MelParameters,
    *,
    iterations: int = ITERATIONS,
    momentum: float = MOMENTUM,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Samples whose STFT has magnitudes close to the given ones.

    Griffin and Lim 1984: project in turn on spectrograms with these magnitudes, and on spectrograms of
    signals. The fast variant (Perraudin, Balazs and Søndergaard 2013) adds ``momentum`` times the last
    change: ``t_n = c_n + momentum * (c_n - c_(n-1))``.

    Args:
        magnitudes_FxK: of frames, not negative.
        parameters: of the STFT.
        iterations: at least 1; each is an inverse and a forward STFT.
        momentum: 0 to 1.
        seed: of the first phases, which are random.

    Returns:
        (F - 1) * hop samples, float32.
    """
    draws = np.random.Generator(np.random.PCG64(seed)).random(magnitudes_FxK.shape)
    estimate = magnitudes_FxK * np.exp(2j * np.pi * draws)
    before = np.zeros_like(estimate)
    for _ in range(iterations):
        consistent = stft(istft(estimate, parameters), parameters)
        faster = consistent + momentum * (consistent - before)
        estimate = magnitudes_FxK * (faster / np.maximum(np.abs(faster), TINY))
        before = consistent
    return istft(estimate, parameters).astype(np.float32)


def istft(spectra_FxK: NDArray[np.complex128], parameters: MelParameters) -> NDArray[np.float64]:
    """The (F - 1) * hop samples whose STFT is closest in least squares (Griffin and Lim 1984, equation 6)."""
    window_W = hann(parameters)
    frames_FxW = np.fft.irfft(spectra_FxK, n=parameters.fft_size)[:, : parameters.window]
    total = _overlapped(frames_FxW * window_W, parameters)
    weights = _overlapped(np.broadcast_to(window_W**2, frames_FxW.shape), parameters)
    half, samples = parameters.window // 2, (len(frames_FxW) - 1) * parameters.hop
    inner = slice(half, half + samples)
    return total[inner] / np.maximum(weights[inner], TINY)


def spectral_convergence(magnitudes_FxK: NDArray[np.float64], wanted_FxK: NDArray[np.float64]) -> float:
    """``||wanted - magnitudes|| / ||wanted||`` in Frobenius norms: 0 is perfect (Sturmel and Daudet 2011)."""
    difference, scale = (np.sqrt(np.sum(np.square(a))) for a in (wanted_FxK - magnitudes_FxK, wanted_FxK))
    return float(difference / max(scale, TINY))


def _overlapped(frames_FxW: NDArray[np.float64], parameters: MelParameters) -> NDArray[np.float64]:
    """Overlap-add: frame f begins at sample f * hop. In blocks of a hop, so that no loop is over frames."""
    hop, count = parameters.hop, len(frames_FxW)
    blocks = -(-parameters.window // hop)
    padded = np.pad(frames_FxW, ((0, 0), (0, blocks * hop - parameters.window)))
    total = np.zeros((count + blocks, hop))
    for block in range(blocks):
        total[block : block + count] += padded[:, block * hop : (block + 1) * hop]
    return total.reshape(-1)


@lru_cache(maxsize=8)
def _mel_pseudo_inverse(parameters: MelParameters) -> NDArray[np.float64]:
    """Moore-Penrose inverse (K, M) of the mel filters."""
    with threadpool_limits(1, "blas"):  # the same last bits, however many threads a process has
        inverse_KxM: NDArray[np.float64] = np.asarray(np.linalg.pinv(mel_filters(parameters)), np.float64)
    inverse_KxM.flags.writeable = False
    return inverse_KxM
