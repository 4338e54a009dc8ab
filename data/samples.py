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


@dataclass(frozen=True)
class Sample:
    """pixels: float32 [C, H, W] in [-1, 1]; caption: its text; key: its name in the shard."""

    key: str
    pixels: npt.NDArray[np.float32]
    caption: str


def read_sample(file: int, shard: Shard, index: Index, number: int, channels: int) -> Sample:
    """Sample `number` of the shard open as file descriptor `file`.

    Raises DataError naming shard and key where a member is missing, cut short, no image, or not of the bucket's size.
    """
    key, members = index.keys[number], index.members(number)
    where = f"{shard.url}, sample {key}"
    image = next((extension for extension in IMAGES if extension in members), None)
    if image is None:
        raise DataError(f"{where}: no image among its members {sorted(members)}; expected one of {', '.join(IMAGES)}")
    pixels = decode_image(_read(file, members[image], where), shard, channels, f"{where}.{image}")
    return Sample(key, pixels, _caption(file, members, where))


def decode_image(body: bytes, shard: Shard, channels: int, where: str) -> npt.NDArray[np.float32]:
    """Pixels [C, H, W] float32 in [-1, 1] of an encoded image."""
    try:
        with Image.open(io.BytesIO(body)) as image:
            # The header alone says the size: nothing larger than its bucket is ever decompressed.
            if (image.height, image.width) != tuple(shard.bucket):
                raise DataError(
                    f"{where}: image of {image.height}x{image.width} pixels in a shard of {shard.bucket}; pack it again"
                )
            array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: cannot be decoded as an image ({error}); pack it again") from error
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return np.ascontiguousarray(array / np.float32(127.5) - np.float32(1))


def _caption(file: int, members: dict[str, tuple[int, int]], where: str) -> str:
    try:
        if "txt" in members:
            return _read(file, members["txt"], where).decode("utf-8").strip()
        if "json" in members:
            return str(json.loads(_read(file, members["json"], where))["caption"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: unreadable caption ({error!r}); pack it again") from error
    raise DataError(f"{where}: no caption; expected a .txt member, or a .json member with 'caption'")


def _read(file: int, span: tuple[int, int], where: str) -> bytes:
    offset, size = span
    body = os.pread(file, size, offset)
    if len(body) != size:
        raise DataError(
            f"{where}: {len(body)} of {size} bytes at offset {offset}; the shard is cut short, copy it again"
        )
    return body
