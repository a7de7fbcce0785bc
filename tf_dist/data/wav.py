"""Read WAV files as mono samples, and write them.

Shapes: N samples, C channels. Samples are float32, full scale is -1 to 1.
"""

from __future__ import annotations

import io
import wave
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tf_dist.atomic_io import read_capped, write_whole
from tf_dist.errors import DataError

# 90 minutes of 16-bit mono at 48 kHz. A row of a task is seconds long.
WAV_LIMIT_BYTES = 1 << 29
# soundfile's names of what is read. Others (A-law, ADPCM) are refused, not approximated.
SUBTYPES = {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"}
# A program that writes to a pipe does not know the size of what it will have written.
UNKNOWN_SIZES = (0, 0xFFFFFFFF)
FULL_SCALE = 32768


class Recording(NamedTuple):
    """Samples of a WAV file.

    samples_N: mono, float32, full scale -1 to 1.
    sample_rate: in Hz.
    channels: of the file; of more than one, ``samples_N`` is the mean. Callers count these files, and say so.
    """

    samples_N: NDArray[np.float32]
    sample_rate: int
    channels: int


def read_wav(path: Path, sample_rate: int, where: str = "") -> Recording:
    """The samples of a WAV file: PCM of 8, 16, 24 or 32 bits, or float.

    Args:
        path: the file.
        sample_rate: that it must have, in Hz; nothing is resampled.
        where: row that names the file, for error messages.

    Raises:
        DataError: soundfile is missing, the file cannot be read, is no WAV file, is cut off, has another
            encoding or sample rate, no samples, or samples that are not finite.
    """
    said = f"{where}: {path}" if where else str(path)
    try:
        data = read_capped(path, WAV_LIMIT_BYTES)
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from error
    _check_is_whole(data, said)
    samples_NxC = _decoded(data, sample_rate, said)
    if not len(samples_NxC):
        raise DataError(f"{said} has no samples. Remove it, or record it again.")
    if not np.isfinite(samples_NxC).all():
        raise DataError(f"{said} has samples that are NaN or infinite. Export it again, as 16-bit PCM.")
    channels = samples_NxC.shape[1]
    mono_N = samples_NxC[:, 0] if channels == 1 else samples_NxC.mean(axis=1, dtype=np.float64)
    return Recording(np.ascontiguousarray(mono_N, np.float32), sample_rate, channels)


def write_wav(path: Path, samples_N: NDArray[np.floating[Any]], sample_rate: int) -> int:
    """Write mono samples as 16-bit PCM, atomically. What `read_wav` read of such a file is written unchanged.

    Args:
        path: of the file, replaced if it is there.
        samples_N: full scale -1 to 1.
        sample_rate: in Hz.

    Returns:
        How many samples were clipped, because they were beyond full scale.

    Raises:
        DataError: samples that are not finite, or the file cannot be written.
    """
    scaled_N = np.rint(np.asarray(samples_N, np.float64) * FULL_SCALE)
    if not np.isfinite(scaled_N).all():
        raise DataError(f"cannot write {path}: there are samples that are NaN or infinite")
    words_N = np.clip(scaled_N, -FULL_SCALE, FULL_SCALE - 1).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(sample_rate)
        writer.writeframes(words_N.tobytes())
    write_whole(path, file.getvalue())
    # 1.0 itself has no word of 16 bits: rounding it down by one is not clipping.
    return int(np.count_nonzero(np.abs(scaled_N) > FULL_SCALE))


def _decoded(data: bytes, sample_rate: int, said: str) -> NDArray[np.float32]:
    soundfile = _soundfile(said)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.format not in ("WAV", "WAVEX") or file.subtype not in SUBTYPES:
                raise DataError(
                    f"{said} holds {file.format} {file.subtype}, not PCM or float samples. "
                    "Convert it: sox IN.wav -e signed -b 16 OUT.wav"
                )
            if file.samplerate != sample_rate:
                raise DataError(
                    f"{said} has a sample rate of {file.samplerate:,} Hz, and {sample_rate:,} Hz is wanted. "
                    f"Convert it: sox IN.wav -r {sample_rate} OUT.wav"
                )
            samples_NxC: NDArray[np.float32] = file.read(dtype="float32", always_2d=True)
    except RuntimeError as error:  # LibsndfileError
        raise DataError(f"{said} cannot be decoded: {error}. Get a whole copy.") from error
    return samples_NxC


def _soundfile(said: str) -> ModuleType:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: no libsndfile
        raise DataError(
            f"reading {said} needs soundfile: pip install 'tf_dist[tasks]' (Python said: {error})"
        ) from error
    module: ModuleType = soundfile
    return module


def _check_is_whole(data: bytes, said: str) -> None:
    """Walk the chunks of a RIFF file: libsndfile takes what a cut file still has, without a word."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise DataError(f"{said} is not a WAV file (no RIFF header). Convert it: sox IN OUT.wav")
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            left = len(data) - at - 8
            if size > left and size not in UNKNOWN_SIZES:
                raise DataError(
                    f"{said} is cut off: {left:,} of {size:,} bytes of samples. Get a whole copy."
                )
            return
        at += 8 + size + size % 2
    raise DataError(f"{said} has no samples (no data chunk). Get a whole copy.")
