"""WAV files: encodings, channels, and what is refused with file and row."""

import struct
import wave

import numpy as np
import pytest

from tf_dist.data.media_files import file_of_row
from tf_dist.data.wav import read_wav, write_wav
from tf_dist.errors import DataError

RATE = 8000
WHERE = "row 3 of sounds.csv (line 4)"


@pytest.fixture
def soundfile():
    return pytest.importorskip("soundfile")


def tone(samples=800):
    return (0.5 * np.sin(np.arange(samples) * 0.3)).astype(np.float32)


def riff(*chunks):
    body = b"".join(name + struct.pack("<I", size) + data for name, size, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def pcm(kind=1, channels=1, rate=RATE, bits=16):
    block = channels * bits // 8
    return b"fmt ", 16, struct.pack("<HHIIHH", kind, channels, rate, rate * block, block, bits)


def test_samples_of_16_bits_are_those_that_the_standard_library_wrote(tmp_path, soundfile):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(struct.pack("<5h", 0, 16384, -32768, 32767, -1))
    found = read_wav(path, RATE)
    assert found.samples_N.dtype == np.float32 and found.channels == 1 and found.sample_rate == RATE
    assert found.samples_N.tolist() == [0, 0.5, -1, 32767 / 32768, -1 / 32768]


@pytest.mark.parametrize(
    ("subtype", "step"),
    [
        ("PCM_U8", 2**-7),
        ("PCM_16", 2**-15),
        ("PCM_24", 2**-23),
        ("PCM_32", 2**-24),
        ("FLOAT", 0),
        ("DOUBLE", 0),
    ],
)
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
def test_encodings(tmp_path, soundfile, subtype, step, container):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(), RATE, subtype=subtype, format=container)
    assert np.abs(read_wav(path, RATE).samples_N - tone()).max() <= step


def test_channels_are_mixed_down_and_said(tmp_path, soundfile):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.stack([tone(), -tone(), tone()], axis=1), RATE, subtype="FLOAT")
    found = read_wav(path, RATE)
    assert found.channels == 3
    np.testing.assert_allclose(found.samples_N, tone() / 3, atol=1e-7)


def test_what_was_read_is_written_unchanged(tmp_path, soundfile):
    first, second = tmp_path / "a.wav", tmp_path / "b.wav"
    words = np.array([-32768, -5, 0, 7, 32767], np.int16)
    soundfile.write(first, words, RATE)
    assert write_wav(second, read_wav(first, RATE).samples_N, RATE) == 0
    assert (soundfile.read(second, dtype="int16")[0] == words).all()
    assert soundfile.info(second).samplerate == RATE and soundfile.info(second).subtype == "PCM_16"


def test_clipped_samples_are_counted(tmp_path):
    assert write_wav(tmp_path / "a.wav", np.array([0.5, 1.0, 1.5, -1.0, -2.0]), RATE) == 2
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert struct.unpack("<5h", file.readframes(5)) == (16384, 32767, 32767, -32768, -32768)
    with pytest.raises(DataError, match="NaN"):
        write_wav(tmp_path / "a.wav", np.array([np.nan]), RATE)


def test_an_unknown_size_is_read_to_the_end(tmp_path, soundfile):
    path = tmp_path / "a.wav"  # as programs write to a pipe
    path.write_bytes(riff(pcm(), (b"data", 0xFFFFFFFF, b"\0\x40" * 6)))
    assert read_wav(path, RATE).samples_N.tolist() == [0.5] * 6


BROKEN = {
    "not a WAV": (b"ID3 an mp3 perhaps", "is not a WAV file"),
    "nothing": (b"", "is not a WAV file"),
    "no data": (riff(pcm()), "no data chunk"),
    "cut off": (riff(pcm(), (b"data", 2000, b"\0" * 1000)), "is cut off: 1,000 of 2,000 bytes"),
    "no samples": (riff(pcm(), (b"data", 0, b"")), "has no samples"),
    "A-law": (riff(pcm(kind=6, bits=8), (b"data", 4, b"\0" * 4)), "ALAW, not PCM"),
    "no such encoding": (riff(pcm(kind=99), (b"data", 4, b"\0" * 4)), "cannot be decoded"),
    "NaN": (riff(pcm(kind=3, bits=32), (b"data", 4, struct.pack("<f", np.nan))), "NaN or infinite"),
    "other rate": (riff(pcm(rate=44100), (b"data", 4, b"\0" * 4)), "44,100 Hz, and 8,000 Hz is wanted"),
}


@pytest.mark.parametrize(("data", "said"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_said_with_file_and_row(tmp_path, soundfile, data, said):
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    with pytest.raises(DataError, match=said) as caught:
        read_wav(path, RATE, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: {path}")
    with pytest.raises(DataError, match=said):
        read_wav(path, RATE)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"row 3 of sounds.csv \(line 4\): cannot read .*No such file"):
        read_wav(tmp_path / "a.wav", RATE, WHERE)


def test_a_missing_library_is_said(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", tone(), RATE)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(DataError, match=r"needs soundfile: pip install 'tf_dist\[tasks\]'"):
        read_wav(tmp_path / "a.wav", RATE)


def test_a_row_names_files_of_its_folder(tmp_path):
    table = tmp_path / "sounds.csv"
    assert file_of_row(table, "en/a b.wav", WHERE) == tmp_path / "en" / "a b.wav"
    for name in ("/etc/passwd", "../a.wav", "en/../../a.wav", "", " ", "a\0.wav"):
        with pytest.raises(DataError, match=r"row 3 of sounds.csv \(line 4\) names"):
            file_of_row(table, name, WHERE)
