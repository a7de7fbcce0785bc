"""Log-mel spectrograms and back: bands, round trips by Griffin-Lim, the same bits in every process."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tf_dist.data.griffin_lim import griffin_lim, istft, spectral_convergence, waveform
from tf_dist.data.mel import (
    MelParameters,
    band_edges_hz,
    hz_to_mel,
    log_mel,
    mel_filters,
    mel_magnitudes,
    mel_of,
    mel_to_hz,
    stft,
)
from tf_dist.errors import DataError, UsageError

ROOT = Path(__file__).parents[2]
TELEPHONE, WIDE = MelParameters(sample_rate=8000), MelParameters(sample_rate=16000)
both_rates = pytest.mark.parametrize("parameters", [TELEPHONE, WIDE], ids=["8 kHz", "16 kHz"])


def seconds(parameters, length=1.0):
    return np.arange(int(length * parameters.sample_rate)) / parameters.sample_rate


def tone(parameters, hz=440.0):
    return 0.5 * np.sin(2 * np.pi * hz * seconds(parameters))


def chirp(parameters):
    """From 200 Hz to 1800 Hz in a second."""
    t = seconds(parameters)
    return 0.5 * np.sin(2 * np.pi * (200 * t + 800 * t**2))


def test_sizes():
    assert (TELEPHONE.window, TELEPHONE.hop, TELEPHONE.fft_size) == (200, 80, 256)
    assert (WIDE.window, WIDE.hop, WIDE.fft_size) == (400, 160, 512)
    for samples in (1, 79, 80, 81, 8000):
        assert log_mel(np.ones(samples), TELEPHONE).shape == (TELEPHONE.frames(samples), 80)
    odd = MelParameters(sample_rate=11000, window_ms=25)  # 275 samples
    assert odd.window % 2 and log_mel(np.ones(1100), odd).shape == (odd.frames(1100), 80)


def test_the_mel_scale_is_slaneys():
    # What librosa's documentation prints for mel_frequencies(n_mels=40).
    found = mel_to_hz(np.linspace(0, hz_to_mel(np.array(11025.0)), 40))
    np.testing.assert_allclose(found[[1, 11, 12, 13, 39]], [85.317, 938.49, 1024.856, 1119.114, 11025], 1e-5)
    hz = np.array([0, 440, 999.9, 1000, 3000, 8000.0])
    np.testing.assert_allclose(mel_to_hz(hz_to_mel(hz)), hz)


@both_rates
def test_filters_have_unit_area(parameters):
    # Each triangle has area 1 over Hz; sampled at the bins, wide ones come close to that.
    bin_hz = parameters.sample_rate / parameters.fft_size
    area = mel_filters(parameters).sum(axis=1) * bin_hz
    np.testing.assert_allclose(area[60:], 1, atol=0.15)
    assert mel_filters(parameters).shape == (80, parameters.fft_size // 2 + 1)


@both_rates
@pytest.mark.parametrize("hz", [150, 440, 1000, 2500, 3700])
def test_a_tone_peaks_in_its_band(parameters, hz):
    loudest = log_mel(tone(parameters, hz), parameters)[50].argmax()
    edges = band_edges_hz(parameters)
    assert edges[loudest] < hz < edges[loudest + 2]


def test_the_transform_is_the_definition():
    samples = np.random.default_rng(1).standard_normal(1000)
    padded = np.concatenate([np.zeros(100), samples, np.zeros(100)])
    n = np.arange(200)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 200)
    for frame, k in ((0, 5), (3, 17), (12, 128)):
        expected = np.sum(padded[frame * 80 : frame * 80 + 200] * window * np.exp(-2j * np.pi * k * n / 256))
        assert stft(samples, TELEPHONE)[frame, k] == pytest.approx(expected)


def test_levels():
    assert log_mel(np.zeros(800), TELEPHONE) == pytest.approx((np.log(1e-5) + 5) / 4)
    quiet, loud = (
        log_mel(tone(TELEPHONE) / 10, TELEPHONE)[50].max(),
        log_mel(tone(TELEPHONE), TELEPHONE)[50].max(),
    )
    assert loud - quiet == pytest.approx(np.log(10) / 4, abs=1e-5)
    assert -2 < log_mel(tone(TELEPHONE), TELEPHONE).min() and loud < 2
    expected = mel_of(np.abs(stft(tone(WIDE), WIDE)), WIDE)
    np.testing.assert_allclose(
        mel_magnitudes(log_mel(tone(WIDE), WIDE)), np.maximum(expected, 1e-5), rtol=1e-5
    )


def test_long_recordings_are_computed_in_parts():
    samples = np.random.default_rng(1).standard_normal(80 * 2500)
    whole = mel_of(np.abs(stft(samples, TELEPHONE)), TELEPHONE)
    np.testing.assert_allclose(mel_magnitudes(log_mel(samples, TELEPHONE)), whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"window_ms": 15}, "twice hop_ms"),
        ({"mels": 0}, "mels 1"),
        ({"mels": 400}, "mel bands have no frequency bin"),
        ({"highest_hz": 9000.0}, "highest_hz <= 8000 Hz"),
        ({"hop_ms": 0.0}, "hop_ms a sample"),
    ],
)
def test_parameters_that_cannot_be(wrong, said):
    with pytest.raises(UsageError, match=said):
        MelParameters(**wrong)


# And back ------------------------------------------------------------------------------------------


@both_rates
def test_the_inverse_transform_is_exact_with_phases(parameters):
    samples = np.random.default_rng(1).standard_normal(parameters.hop * 30)
    np.testing.assert_allclose(istft(stft(samples, parameters), parameters), samples, atol=1e-10)


@both_rates
@pytest.mark.parametrize("sound", [tone, chirp])
def test_griffin_lim_finds_phases(parameters, sound):
    wanted = np.abs(stft(sound(parameters), parameters))
    errors = {}
    for iterations, momentum in ((1, 0.99), (60, 0.0), (60, 0.99)):
        found = griffin_lim(wanted, parameters, iterations=iterations, momentum=momentum)
        errors[iterations, momentum] = spectral_convergence(np.abs(stft(found, parameters)), wanted)
    assert errors[60, 0.99] < 0.08 < errors[1, 0.99]
    assert errors[60, 0.99] < 0.7 * errors[60, 0.0]  # the fast variant is worth it


@both_rates
@pytest.mark.parametrize("sound", [tone, chirp])
def test_sounds_survive_the_round_trip(parameters, sound):
    before = log_mel(sound(parameters), parameters)
    samples = waveform(before, parameters)
    assert samples.dtype == np.float32 and len(samples) == (len(before) - 1) * parameters.hop
    after = log_mel(samples, parameters)
    assert spectral_convergence(mel_magnitudes(after), mel_magnitudes(before)) < 0.12


def test_the_round_trip_through_float16_is_as_good():
    before = log_mel(chirp(TELEPHONE), TELEPHONE)
    after = log_mel(waveform(before.astype(np.float16), TELEPHONE), TELEPHONE)
    assert spectral_convergence(mel_magnitudes(after), mel_magnitudes(before)) < 0.12


def test_the_pitch_of_a_tone_comes_back():
    samples = waveform(log_mel(tone(WIDE, 1000), WIDE), WIDE)
    assert np.abs(np.fft.rfft(samples)).argmax() * 16000 / len(samples) == pytest.approx(1000, abs=15)


def test_what_an_untrained_model_predicts_has_a_waveform():
    assert np.isfinite(waveform(np.full((5, 80), 1e6), TELEPHONE, iterations=2)).all()


def test_what_has_no_waveform():
    for wrong in (np.zeros((1, 80)), np.zeros((5, 79)), np.zeros(80)):
        with pytest.raises(DataError, match="two frames or more of 80 mel bands"):
            waveform(wrong, TELEPHONE)
    with pytest.raises(DataError, match="NaN"):
        waveform(np.full((5, 80), np.nan), TELEPHONE)
    with pytest.raises(DataError, match="no samples"):
        log_mel(np.zeros(0), TELEPHONE)


DIGEST = """
import hashlib, numpy as np
from tf_dist.data.griffin_lim import waveform
from tf_dist.data.mel import MelParameters, log_mel
parameters = MelParameters(sample_rate=8000)
samples = np.random.Generator(np.random.PCG64(3)).random(8000) - 0.5
mel = log_mel(samples, parameters)
print(hashlib.sha256(mel.tobytes() + waveform(mel, parameters, iterations=5).tobytes()).hexdigest())
"""


def test_the_same_bits_in_every_process():
    digests = set()
    for threads in ("1", "2"):
        names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        settings = os.environ | dict.fromkeys(names, threads) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=settings, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    assert len(digests) == 1 and len(digests.pop()) == hashlib.sha256().digest_size * 2
