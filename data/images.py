"""An image file of any size -> an image of its bucket, encoded for a shard."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.buckets import Bucket
from data.s3 import DataError

# Formats whose decoders stay inside Pillow: others start programs (EPS) or are video.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
MAX_PIXELS = 150_000_000
_COPIED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# A file with more than this carries something else than its pixels.
_MOST_BYTES_PER_PIXEL, _SPARE_BYTES = 8, 1 << 16
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", *_ALPHA)


class Encoding(NamedTuple):
    """channels: 1 (grey) or 3 (RGB); format: jpg, png or webp; quality: of jpg and webp, 1..100."""

    channels: int = 3
    format: str = "jpg"
    quality: int = 95


def image_size(body: bytes) -> tuple[int, int]:
    """(height, width) as displayed, from the header alone. Raises DataError saying why it is no image to train on."""
    try:
        with _open(body) as image:
            turned = _orientation(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def stored_size(body: bytes) -> tuple[int, int]:
    """(height, width) as stored. Raises DataError as image_size does, and where EXIF says that it is shown turned."""
    try:
        with _open(body) as image:
            if _orientation(image) > 1:
                raise DataError("EXIF says that it is shown turned, which readers of shards do not do")
            return image.height, image.width
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def encode_image(body: bytes, bucket: Bucket, encoding: Encoding) -> tuple[str, bytes]:
    """Suffix and bytes of an image resized and centre-cropped to `bucket`.

    A file that has its size, colours and a format of shards already is returned as it is. Transparent parts become
    white; the orientation of EXIF is applied. Raises DataError where the body cannot be decoded.
    """
    try:
        with _open(body) as image:
            turn = _orientation(image)  # before the pixels: PNG may have more of it behind them
            image.load()
            mode = "L" if encoding.channels == 1 else "RGB"
            fits = (image.height, image.width) == bucket and image.mode == mode and "transparency" not in image.info
            lean = len(body) <= _MOST_BYTES_PER_PIXEL * bucket.height * bucket.width + _SPARE_BYTES
            if fits and lean and turn == 1 and image.format in _COPIED:
                return _COPIED[image.format], body
            return encoding.format, _encoded(_fitted(_upright(image, mode, turn), bucket), encoding)
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def fitted_pixels(body: bytes, bucket: Bucket, channels: int) -> npt.NDArray[np.float32]:
    """Pixels [channels, H, W] in [-1, 1] of the same image before it is encoded. Raises as encode_image does."""
    try:
        with _open(body) as image:
            turn = _orientation(image)
            image.load()
            upright = _upright(image, "L" if channels == 1 else "RGB", turn)
            return to_pixels(upright if (upright.height, upright.width) == bucket else _fitted(upright, bucket))
    except DataError:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def to_pixels(image: Image.Image) -> npt.NDArray[np.float32]:
    """A grey or RGB image as [C, H, W] float32 in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return np.ascontiguousarray(array / np.float32(127.5) - np.float32(1))


def _open(body: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is ours
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"more than {MAX_PIXELS} pixels (a decompression bomb?)")
    if image.mode not in _PLAIN:
        raise DataError(f"pixels of type {image.mode}, which are not 8 bits a channel")
    return image


def _undecodable(error: Exception) -> DataError:
    """Decoders raise all kinds of errors on hostile bytes; only a lack of memory is this machine's fault."""
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, Image.DecompressionBombError):
        return DataError(f"more than {MAX_PIXELS} pixels (a decompression bomb?)")
    return DataError(f"cannot be decoded as an image ({type(error).__name__})")


def _orientation(image: Image.Image) -> int:
    # Asking a PNG without it decodes the whole image.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(_ORIENTATION, 1))


def _upright(image: Image.Image, mode: str, orientation: int) -> Image.Image:
    """In `mode`, on white where it is transparent, turned as EXIF says."""
    turn = _TURNS.get(orientation)
    if image.mode in _ALPHA or "transparency" in image.info:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def _fitted(image: Image.Image, bucket: Bucket) -> Image.Image:
    """Centre crop of the bucket's ratio, resampled once."""
    scale = min(image.height / bucket.height, image.width / bucket.width)
    height, width = min(image.height, bucket.height * scale), min(image.width, bucket.width * scale)
    top, left = (image.height - height) / 2, (image.width - width) / 2
    box = (left, top, min(image.width, left + width), min(image.height, top + height))
    return image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)


def _encoded(image: Image.Image, encoding: Encoding) -> bytes:
    body = io.BytesIO()
    if encoding.format == "jpg":
        # Full colour resolution: subsampled colour is a visible artefact at the sizes that models are trained on.
        image.save(body, format="JPEG", quality=encoding.quality, subsampling=0)
    elif encoding.format == "webp":
        image.save(body, format="WEBP", quality=encoding.quality)
    else:
        image.save(body, format="PNG")
    return body.getvalue()
