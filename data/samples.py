"""Members of a shard -> one decoded sample."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from data.index import Index
from data.manifest import Shard
from data.s3 import DataError

IMAGES = ("png", "jpg", "jpeg", "webp")
# Only these: PIL's reader of PostScript, for one, starts a program.
_FORMATS = ("PNG", "JPEG", "WEBP")
# Nothing larger is read into memory, whatever an index says. 16 bytes hold any pixel of these formats uncompressed.
_MOST_TEXT_BYTES = 1 << 20
_SPARE_IMAGE_BYTES, _MOST_BYTES_PER_PIXEL = 16 << 20, 16


class SampleError(DataError):
    """One sample cannot be decoded; others of its shard may. The message names shard and key."""


@dataclass(frozen=True)
class Sample:
    """pixels: float32 [C, H, W] in [-1, 1]; caption: its text; key: its name in the shard."""

    key: str
    pixels: npt.NDArray[np.float32]
    caption: str


def read_sample(file: int, shard: Shard, index: Index, number: int, channels: int) -> Sample:
    """Sample `number` of the shard open as file descriptor `file`.

    Raises SampleError where a member is missing, no image, not of the bucket's size or not a caption; DataError where
    the shard itself cannot be read.
    """
    key, members = index.keys[number], index.members(number)
    where = f"{shard.url}, sample {key}"
    image = next((extension for extension in IMAGES if extension in members), None)
    if image is None:
        raise SampleError(f"{where}: no image among its members {sorted(members)}; expected one of {', '.join(IMAGES)}")
    most = _SPARE_IMAGE_BYTES + _MOST_BYTES_PER_PIXEL * shard.bucket[0] * shard.bucket[1]
    body = _read(file, members[image], f"{where}.{image}", most)
    return Sample(key, decode_image(body, shard, channels, f"{where}.{image}"), _caption(file, members, where))


def decode_image(body: bytes, shard: Shard, channels: int, where: str) -> npt.NDArray[np.float32]:
    """Pixels [C, H, W] float32 in [-1, 1] of an encoded image. Raises SampleError naming `where`."""
    try:
        with Image.open(io.BytesIO(body), formats=_FORMATS) as image:
            # The header alone says the size: nothing larger than its bucket is ever decompressed.
            if (image.height, image.width) != tuple(shard.bucket):
                raise SampleError(
                    f"{where}: image of {image.height}x{image.width} pixels in a shard of {shard.bucket}; pack it again"
                )
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    except SampleError:
        raise
    except UnidentifiedImageError as error:
        # Its own text holds an address in memory, and a sample must be bad for the same reason everywhere.
        raise SampleError(
            f"{where}: cannot be decoded as an image (none of {', '.join(_FORMATS)}); pack it again"
        ) from error
    except Exception as error:  # bytes from outside make the decoders raise almost anything
        raise SampleError(f"{where}: cannot be decoded as an image ({error}); pack it again") from error
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return np.ascontiguousarray(array / np.float32(127.5) - np.float32(1))


def _caption(file: int, members: dict[str, tuple[int, int]], where: str) -> str:
    try:
        if "txt" in members:
            return _read(file, members["txt"], f"{where}.txt", _MOST_TEXT_BYTES).decode("utf-8").strip()
        if "json" in members:
            caption = json.loads(_read(file, members["json"], f"{where}.json", _MOST_TEXT_BYTES))["caption"]
            if not isinstance(caption, str):
                raise TypeError(f"a {type(caption).__name__} in place of a text")
            return caption
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleError(f"{where}: unreadable caption ({error!r}); pack it again") from error
    raise SampleError(f"{where}: no caption; expected a .txt member, or a .json member with 'caption'")


def _read(file: int, span: tuple[int, int], where: str, most: int) -> bytes:
    offset, size = span
    if size > most:
        raise SampleError(f"{where}: {size} bytes where at most {most} are taken; pack it again")
    try:
        body = os.pread(file, size, offset)
    except OSError as error:
        raise DataError(
            f"{where}: cannot be read at offset {offset} ({error.strerror or error}); check the disk"
        ) from error
    if len(body) != size:
        raise DataError(
            f"{where}: {len(body)} of {size} bytes at offset {offset}; the shard is cut short, copy it again"
        )
    return body
