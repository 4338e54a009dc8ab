"""An item of a source -> the members of its sample: as it is, or what encoders make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

from data.buckets import Bucket, Sizes
from data.images import Encoding, encode_image, fitted_pixels
from data.samples import Pixels
from data.sources import MAX_FILE, Columns, Item, Span

Members = dict[str, bytes]


class Raw(NamedTuple):
    """What encoders are given of a sample. pixels: [C, H, W] float32 in [-1, 1], of edits source_pixels too."""

    captions: tuple[str, ...]
    pixels: Pixels | None
    source_pixels: Pixels | None


Encode = Callable[[Raw], Members]
"""A sample -> its members beside the captions, by suffix; a function of the sample alone."""


def members_of(item: Item, sizes: Sizes, columns: Columns, encoding: Encoding, encode: Encode | None) -> Members:
    """Members of an item by suffix: .txt with its first caption, .json with all of them and its name, and its images or
    what `encode` makes of them. Raises DataError where it cannot be packed."""
    captions = item.captions(columns, item.fields())
    images: Members = {}
    if encode is not None:
        channels = encoding.channels
        images = encode(
            Raw(captions, _pixels(item.image, sizes.image, channels), _pixels(item.source, sizes.source, channels))
        )
    else:
        for prefix, image, size in (("", item.image, sizes.image), ("source.", item.source, sizes.source)):
            if image is not None and size is not None:
                suffix, body = encode_image(image.read(MAX_FILE), size, encoding)
                images[f"{prefix}{suffix}"] = body
    record: dict[str, object] = {"caption": captions[0], "name": item.name}
    if len(captions) > 1:
        record["captions"] = list(captions)
    return {**images, "txt": captions[0].encode(), "json": json.dumps(record, ensure_ascii=False).encode()}


def _pixels(image: Span | None, size: Bucket | None, channels: int) -> Pixels | None:
    return None if image is None or size is None else fitted_pixels(image.read(MAX_FILE), size, channels)
