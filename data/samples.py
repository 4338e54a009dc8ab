"""Members of a shard -> one decoded sample.

images    <key>.png|jpg|jpeg|webp, <key>.txt and/or <key>.json
captions  <key>.txt and/or <key>.json alone
edits     as images, and <key>.source.png|jpg|jpeg|webp
encoded   in place of images: <key>.latent.npy [C, h, w], of edits also <key>.reference.npy; for the caption of number n
          <key>.text.npy [S, D] and .mask.npy [S] (n = 0) or <key>.text.n.npy and .mask.n.npy, where the encoder has
          them pooled.npy [P] too; of edits the null condition as null.npy, null_mask.npy and null_pooled.npy

A .json member may hold "captions": a list, of which one is drawn in every own epoch.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from data.arrays import Array, read_npy
from data.buckets import Bucket
from data.contents import Contents, Draw, Encoded
from data.images import to_pixels
from data.index import Index
from data.manifest import Shard
from data.s3 import DataError

IMAGES = ("png", "jpg", "jpeg", "webp")
# Only these: PIL's reader of PostScript, for one, starts a program.
_FORMATS = ("PNG", "JPEG", "WEBP")
# Nothing larger is read into memory, whatever an index says. 16 bytes hold any pixel of these formats uncompressed.
_MOST_TEXT_BYTES = 1 << 20
_MOST_ARRAY_BYTES = 256 << 20
_SPARE_IMAGE_BYTES, _MOST_BYTES_PER_PIXEL = 16 << 20, 16

Pixels = npt.NDArray[np.float32]
Members = dict[str, tuple[int, int]]
_NOTHING_DRAWN = Draw()


class SampleError(DataError):
    """One sample cannot be decoded; others of its shard may. The message names shard and key."""


@dataclass(frozen=True)
class Sample:
    """key: its name in the shard; caption: its text. pixels: float32 [C, H, W] in [-1, 1], source_pixels the same of the
    source image of an edit; None where the set has none. arrays: of an encoded sample, by the names latent, reference,
    text, mask, pooled, null, null_mask and null_pooled, as stored."""

    key: str
    caption: str
    pixels: Pixels | None = None
    source_pixels: Pixels | None = None
    arrays: dict[str, Array] = field(default_factory=dict)


def read_sample(
    file: int, shard: Shard, index: Index, number: int, contents: Contents, draw: Draw = _NOTHING_DRAWN
) -> Sample:
    """Sample `number` of the shard open as file descriptor `file`.

    Raises SampleError where a member is missing or not what `contents` says; DataError where the shard itself cannot be
    read.
    """
    key, members = index.keys[number], index.members(number)
    where = f"{shard.url}, sample {key}"
    captions = read_captions(file, members, where)
    name = f"{shard.source}/{key}"
    chosen = draw.choose("caption", name, len(captions)) if len(captions) > 1 else 0
    if contents.encoded is not None:
        arrays = _arrays(file, members, shard, contents.kind, contents.encoded, chosen, where)
        return Sample(key, captions[chosen], arrays=arrays)
    if contents.kind == "captions":
        return Sample(key, captions[chosen])
    pixels = _image(file, members, "", shard.bucket, contents.channels, where)
    source = None
    if contents.kind == "edits":
        assert shard.source_bucket is not None, "the manifest of edits names the size of sources"
        source = _image(file, members, "source.", shard.source_bucket, contents.channels, where)
    if draw.flip and draw.choose("flip", name, 2):
        pixels = np.ascontiguousarray(pixels[..., ::-1])
        source = None if source is None else np.ascontiguousarray(source[..., ::-1])
    return Sample(key, captions[chosen], pixels, source)


def decode_image(body: bytes, bucket: Bucket, channels: int, where: str) -> Pixels:
    """Pixels [C, H, W] float32 in [-1, 1] of an encoded image. Raises SampleError naming `where`; a lack of memory, which
    is this machine's and must not choose a stand-in, as MemoryError."""
    try:
        with Image.open(io.BytesIO(body), formats=_FORMATS) as image:
            # The header alone says the size: nothing larger than its bucket is ever decompressed.
            if (image.height, image.width) != tuple(bucket):
                raise SampleError(
                    f"{where}: image of {image.height}x{image.width} pixels in a shard of {bucket}; pack it again"
                )
            return to_pixels(image.convert("L" if channels == 1 else "RGB"))
    except (SampleError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        # Its own text holds an address in memory, and a sample must be bad for the same reason everywhere.
        raise SampleError(
            f"{where}: cannot be decoded as an image (none of {', '.join(_FORMATS)}); pack it again"
        ) from error
    except Exception as error:  # bytes from outside make the decoders raise almost anything
        raise SampleError(f"{where}: cannot be decoded as an image ({error}); pack it again") from error


def read_captions(file: int, members: Members, where: str) -> tuple[str, ...]:
    """All captions of a sample: "captions" of its .json, else its .txt, else "caption" of its .json.

    Raises SampleError where there is none that can be read.
    """
    try:
        text = None
        if "txt" in members:
            text = _read(file, members["txt"], f"{where}.txt", _MOST_TEXT_BYTES).decode("utf-8").strip()
        if "json" in members:
            found = _json_captions(_read(file, members["json"], f"{where}.json", _MOST_TEXT_BYTES), text is None)
            if text is None or len(found) > 1:
                return found
        if text is not None:
            return (text,)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleError(f"{where}: unreadable caption ({error!r}); pack it again") from error
    raise SampleError(f"{where}: no caption; expected a .txt member, or a .json member with 'caption' or 'captions'")


def _json_captions(body: bytes, needed: bool) -> tuple[str, ...]:
    """needed: whether these are the sample's only captions; a .json beside a .txt may be about something else."""
    try:
        content = json.loads(body)
        if isinstance(content, list):
            content = {"captions": content}
        found = content["captions"] if content.get("captions") else content["caption"]
        captions = tuple(found) if isinstance(found, list) else (found,)
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise TypeError(f"a {type(found).__name__} in place of a text")
        return captions
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if needed:
            raise TypeError(str(error)) from error
        return ()


def _image(file: int, members: Members, prefix: str, bucket: Bucket, channels: int, where: str) -> Pixels:
    name = next((prefix + extension for extension in IMAGES if prefix + extension in members), None)
    if name is None:
        wanted = ", ".join(prefix + extension for extension in IMAGES)
        what = "source image" if prefix else "image"
        raise SampleError(f"{where}: no {what} among its members {sorted(members)}; expected one of {wanted}")
    most = _SPARE_IMAGE_BYTES + _MOST_BYTES_PER_PIXEL * bucket[0] * bucket[1]
    return decode_image(_read(file, members[name], f"{where}.{name}", most), bucket, channels, f"{where}.{name}")


def _arrays(
    file: int, members: Members, shard: Shard, kind: str, encoded: Encoded, caption: int, where: str
) -> dict[str, Array]:
    """The arrays of a sample with its caption of number `caption`, checked against what the manifest says."""
    suffix = f".{caption}.npy" if caption else ".npy"
    wanted: dict[str, tuple[str, str, tuple[int | None, ...]]] = {
        "text": (f"text{suffix}", encoded.dtype, (None, encoded.text_width)),
        "mask": (f"mask{suffix}", "bool", (None,)),
    }
    if kind != "captions":
        wanted["latent"] = ("latent.npy", encoded.dtype, _latent_shape(shard.bucket, encoded))
    if kind == "edits":
        assert shard.source_bucket is not None, "the manifest of edits names the size of sources"
        wanted["reference"] = ("reference.npy", encoded.dtype, _latent_shape(shard.source_bucket, encoded))
        wanted["null"] = ("null.npy", encoded.dtype, (None, encoded.text_width))
        wanted["null_mask"] = ("null_mask.npy", "bool", (None,))
    for name, member in (("pooled", f"pooled{suffix}"), ("null_pooled", "null_pooled.npy")):
        if member in members:
            wanted[name] = (member, encoded.dtype, (None,))
    arrays = {}
    for name, (member, dtype, shape) in wanted.items():
        if member not in members:
            raise SampleError(f"{where}: no {member} among its members {sorted(members)}; pack it again")
        body = _read(file, members[member], f"{where}.{member}", _MOST_ARRAY_BYTES)
        try:
            arrays[name] = read_npy(body, dtype, shape, f"{where}.{member}")
        except DataError as error:
            raise SampleError(str(error)) from error
    for text, mask in (("text", "mask"), ("null", "null_mask")):
        if text in arrays and len(arrays[text]) != len(arrays[mask]):
            raise SampleError(f"{where}: {text} and {mask} differ in length; pack it again")
    return arrays


def _latent_shape(bucket: Bucket, encoded: Encoded) -> tuple[int, int, int]:
    return encoded.latent_channels, bucket[0] // encoded.pixels_per_latent, bucket[1] // encoded.pixels_per_latent


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
