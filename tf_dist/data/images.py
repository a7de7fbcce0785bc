"""Read PNG files as pixels of a fixed size, and cut them into patches.

Shapes: H rows and W columns of pixels, 3 colors (red, green, blue); patches of p x p pixels, P of them.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tf_dist.atomic_io import read_capped
from tf_dist.data.png_chunks import check_png
from tf_dist.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

PNG_LIMIT_BYTES = 64 << 20
WHITE = 255


def read_png(path: Path, height: int, width: int, where: str = "") -> NDArray[np.uint8]:
    """The pixels of a PNG file, resized.

    Transparent pixels are laid over white. Grey becomes equal red, green and blue; of 16 bits the upper 8 are
    kept. The picture is stretched to the size that is asked for (bicubic, with antialiasing, in integer
    arithmetic, so all machines get the same pixels). Color profiles and gamma are ignored.

    Args:
        path: the file.
        height: H of the result.
        width: W of the result.
        where: row that names the file, for error messages.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: Pillow is missing, or the file cannot be read, is no PNG, is damaged, animated, or has too
            many pixels.
    """
    said = f"{where}: {path}" if where else str(path)
    try:
        data = read_capped(path, PNG_LIMIT_BYTES)
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from error
    check_png(data, said)
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"reading {said} needs Pillow: pip install 'tf_dist[tasks]'") from error
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            opaque = _over_white(image, said)
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, struct.error ...
        raise DataError(f"{said} is a damaged PNG file: {error}. Get a whole copy.") from error
    return np.asarray(opaque.resize((width, height), Image.Resampling.BICUBIC), np.uint8)


def patches(pixels_HxWx3: NDArray[np.uint8], p: int) -> NDArray[np.float32]:
    """Squares of p x p pixels, in reading order, as a Vision Transformer reads them.

    Dosovitskiy et al. 2021, arXiv:2010.11929. Values are pixel / 255, without a mean subtracted: 0 is black,
    1 is white. In float16 (`pack_words`) they are still exact enough to be the same pixels again.

    Args:
        pixels_HxWx3: of `read_png`.
        p: rows and columns of a patch.

    Returns:
        (P, p * p * 3) float32 in [0, 1], P = H / p * W / p; a patch is row by row, its colors innermost.

    Raises:
        UsageError: H or W is no multiple of p.
    """
    height, width, colors = pixels_HxWx3.shape
    _check_divides(height, width, p)
    tiles = pixels_HxWx3.reshape(height // p, p, width // p, p, colors).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(-1, p * p * colors).astype(np.float32) / np.float32(255)


def pixels_of_patches(
    values_PxM: NDArray[np.floating[Any]], height: int, width: int, p: int
) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of `patches` again; what is beyond [0, 1] is clipped.

    Raises:
        UsageError: H or W is no multiple of p, or these are not the patches of such a picture.
    """
    _check_divides(height, width, p)
    if values_PxM.shape != (height * width // p**2, p * p * 3):
        raise UsageError(
            f"values of shape {values_PxM.shape} are not patches of {p} x {p} pixels of a picture of "
            f"{height} x {width}"
        )
    tiles = np.asarray(values_PxM, np.float32).reshape(height // p, width // p, p, p, 3)
    whole = tiles.transpose(0, 2, 1, 3, 4).reshape(height, width, 3)
    return np.rint(np.clip(whole, 0, 1) * 255).astype(np.uint8)


def _check_divides(height: int, width: int, p: int) -> None:
    if p < 1 or height % p or width % p:
        raise UsageError(f"a picture of {height} x {width} pixels has no whole patches of {p} x {p}")


def _over_white(image: Image, said: str) -> Image:
    """A picture in red, green and blue, its transparent pixels over white."""
    from PIL import Image as pillow

    if getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{said} is animated. Save one frame of it as a PNG file.")
    if image.mode.startswith("I"):  # 16 bits of grey: Pillow would clip at 255
        if "transparency" in image.info:
            raise DataError(f"{said} has 16-bit grey with transparency. Save it with 8 bits.")
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    clear = image.convert("RGBA")
    white = pillow.new("RGBA", clear.size, (WHITE, WHITE, WHITE, 255))
    return pillow.alpha_composite(white, clear).convert("RGB")
