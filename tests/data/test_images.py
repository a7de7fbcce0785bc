"""PNG files: pixels, patches, what is refused; pictures of rows for people."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest

from tf_dist.data.images import patches, pixels_of_patches, read_png
from tf_dist.data.packed_frames import pack_words, unpack_words
from tf_dist.data.png_chunks import ADAM7
from tf_dist.errors import DataError, UsageError

WHERE = "row 3 of stamps.csv (line 4)"


@pytest.fixture
def pillow():
    return pytest.importorskip("PIL.Image")


@pytest.fixture
def saved(tmp_path, pillow):
    """``saved(values, **options)``: the path of a PNG file with these pixels."""

    def save(values, **options):
        path = tmp_path / "a.png"
        pillow.fromarray(values).save(path, **options)
        return path

    return save


def noise(height, width, colors=3):
    return np.random.default_rng(1).integers(0, 256, (height, width, colors), np.uint8)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header(width, height):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def test_pixels_of_the_same_size_are_unchanged(saved):
    found = read_png(saved(noise(5, 7)), 5, 7)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, noise(5, 7))


def test_transparent_pixels_are_over_white(saved):
    values = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    assert read_png(saved(values), 1, 3).tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]


def test_a_palette_with_a_transparent_color(tmp_path, pillow):
    image = pillow.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=1)
    assert read_png(tmp_path / "a.png", 1, 2).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_grey_of_8_and_16_bits(saved):
    assert read_png(saved(np.array([[0, 128, 255]], np.uint8)), 1, 3)[0, :, 0].tolist() == [0, 128, 255]
    deep = saved(np.array([[0, 0x1234, 0xFFFF]], np.uint16))
    assert read_png(deep, 1, 3).tolist() == [[[0] * 3, [0x12] * 3, [0xFF] * 3]]


def test_resized(saved):
    values = np.zeros((16, 8, 3), np.uint8)
    values[:8] = 255  # white above black
    found = read_png(saved(values), 4, 6)
    assert found.shape == (4, 6, 3)
    assert (found[0] > 240).all() and (found[3] < 15).all()


PIXELS = zlib.compress(b"\0" + b"\1\2\3" * 2)
END = chunk(b"IEND", b"")
MARK = b"\x89PNG\r\n\x1a\n"
BROKEN = {
    "a JPEG": (b"\xff\xd8\xff\xe0" + b"x" * 40, "is not a PNG file"),
    "nothing": (b"", "is not a PNG file"),
    "a header alone": (MARK + header(2, 1), "damaged PNG"),
    "cut off": (MARK + header(2, 1) + chunk(b"IDAT", PIXELS)[:-9], "it is cut off"),
    "a wrong checksum": (MARK + header(2, 1)[:-1] + b"?" + chunk(b"IDAT", PIXELS) + END, "damaged PNG"),
    "not compressed": (MARK + header(2, 1) + chunk(b"IDAT", b"x" * 20) + END, "damaged PNG"),
    "too few pixels": (MARK + header(2, 9) + chunk(b"IDAT", PIXELS) + END, "fewer pixels than its header"),
    "too many pixels": (MARK + header(1, 1) + chunk(b"IDAT", PIXELS) + END, "more pixels than its header"),
    "no end": (MARK + header(2, 1) + chunk(b"IDAT", PIXELS), "it is cut off"),
    "a bomb": (MARK + header(50000, 40000) + chunk(b"IDAT", PIXELS) + END, "50,000 x 40,000 pixels"),
    "a bomb behind": (
        MARK + header(2, 1) + header(5000, 4000) + chunk(b"IDAT", PIXELS) + END,
        "not one header",
    ),
    "a bomb of text": (
        MARK
        + header(2, 1)
        + chunk(b"zTXt", b"k\0\0" + zlib.compress(b" " * (2 << 20)))
        + chunk(b"IDAT", PIXELS)
        + END,
        "damaged PNG",
    ),
}


@pytest.mark.parametrize(("data", "said"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_said_with_file_and_row(tmp_path, pillow, data, said):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(DataError, match=said) as caught:
        read_png(path, 8, 8, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: {path}")


def test_the_file_of_these_faults_is_sound_without_them(tmp_path, pillow):
    (tmp_path / "a.png").write_bytes(MARK + header(2, 1) + chunk(b"IDAT", PIXELS) + END)
    assert read_png(tmp_path / "a.png", 1, 2).tolist() == [[[1, 2, 3], [1, 2, 3]]]


@pytest.mark.parametrize("height", range(1, 10))
@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_all_kinds_of_pixels_have_the_expected_number_of_bytes(tmp_path, pillow, kind, height):
    image = pillow.fromarray(noise(height, 11)).convert("L" if kind == "I;16" else kind)
    if kind == "I;16":
        image = pillow.fromarray(np.asarray(image).astype(np.uint16) * 257)
    image.save(tmp_path / "a.png")
    assert read_png(tmp_path / "a.png", height, 11).shape == (height, 11, 3)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2), (5, 5), (8, 8), (9, 4), (17, 3)])
def test_interlaced_pictures_are_whole(tmp_path, pillow, width, height):
    raw = b"".join(
        (b"\0" + bytes([7]) * 3 * len(range(column, width, columns))) * len(range(row, height, rows))
        for column, row, columns, rows in ADAM7
        if column < width
    )
    interlaced = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1))
    (tmp_path / "a.png").write_bytes(MARK + interlaced + chunk(b"IDAT", zlib.compress(raw)) + END)
    assert (read_png(tmp_path / "a.png", height, width) == 7).all()


def test_animations_are_refused(tmp_path, pillow):
    frames = [pillow.fromarray(noise(4, 4) // part) for part in (1, 2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="is animated"):
        read_png(tmp_path / "a.png", 4, 4)


def test_files_and_libraries_that_are_not_there(tmp_path, saved, monkeypatch):
    with pytest.raises(DataError, match=r"row 3 .*cannot read .*No such file"):
        read_png(tmp_path / "b.png", 4, 4, WHERE)
    path = saved(noise(4, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"needs Pillow: pip install 'tf_dist\[tasks\]'"):
        read_png(path, 4, 4)


# Patches -------------------------------------------------------------------------------------------


def test_patches_are_in_reading_order():
    pixels = noise(4, 6)
    found = patches(pixels, 2)
    assert found.shape == (6, 12) and found.dtype == np.float32
    for index in range(6):
        row, column = index // 3 * 2, index % 3 * 2
        expected = pixels[row : row + 2, column : column + 2].reshape(-1) / 255
        np.testing.assert_allclose(found[index], expected, rtol=1e-6)


def test_pixels_survive_words_of_float16():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    words = pack_words(patches(pixels, 4))
    np.testing.assert_array_equal(pixels_of_patches(unpack_words(words, 48), 16, 16, 4), pixels)
    assert (pixels_of_patches(np.full((1, 12), 7.0), 2, 2, 2) == 255).all()


def test_patches_that_cannot_be():
    with pytest.raises(UsageError, match="4 x 6 pixels has no whole patches of 4 x 4"):
        patches(noise(4, 6), 4)
    with pytest.raises(UsageError, match="are not patches of 2 x 2"):
        pixels_of_patches(np.zeros((5, 12)), 4, 6, 2)


# Pictures for people -------------------------------------------------------------------------------


def test_pictures_are_drawn(tmp_path, pillow):
    pytest.importorskip("matplotlib")
    from tf_dist.data.mel import MelParameters
    from tf_dist.data.pictures import caption_picture, spectrogram_picture

    mel = np.zeros((30, 80), np.float32)
    mel[20:] = np.nan  # padding
    spectrogram_picture(mel, MelParameters(), "costs $5, or $6 \\frac{", tmp_path / "mel.png")
    caption_picture(noise(8, 8), "true: a $1 cat\nours: a $1_{ dog", tmp_path / "cat.png")
    for name in ("mel.png", "cat.png"):
        with pillow.open(io.BytesIO((tmp_path / name).read_bytes())) as image:
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 10
    with pytest.raises(DataError, match="cannot write"):
        caption_picture(noise(8, 8), "", tmp_path / "no folder" / "a.png")
    assert not list(tmp_path.glob(".tmp*"))


def test_pictures_without_matplotlib(tmp_path, monkeypatch):
    from tf_dist.data.pictures import caption_picture

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"pip install 'tf_dist\[plots\]'"):
        caption_picture(noise(2, 2), "", tmp_path / "a.png")
