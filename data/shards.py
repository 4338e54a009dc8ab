"""The plan of a packed data set, and its execution: which item goes into which shard, and one shard written whole.

The plan follows from the source and the options alone, so that a packing that was killed goes on where it stood.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data.buckets import Bucket, Sizes, bucket_table, merge_small, nearest_bucket
from data.contents import Encoded
from data.images import Encoding, image_size
from data.index import index_tar, write_index
from data.manifest import Shard
from data.members import Encode, members_of
from data.pool import tick
from data.s3 import DataError
from data.sources import MAX_FILE, Columns, Item, Span
from data.store import Store

UNDECODABLE = "cannot be decoded as an image"
_BLOCK = 512
_HEADER = 1 << 18


class LeftOut(NamedTuple):
    """An item that is not packed, and why. kind: the reason without its numbers."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a packed data set. Sides in pixels; None: no limit.

    small_buckets: merge (into the nearest ratio), keep or drop buckets with fewer than min_bucket images. kind: images,
    captions (all of them in one bucket, resolution x resolution) or edits; encoded: latents and embeddings are stored in
    place of images.
    """

    source: str
    resolution: int = 512
    bucket_step: int = 64
    max_aspect: float = 2.0
    min_side: int = 0
    max_image_aspect: float | None = None
    columns: Columns = field(default_factory=Columns)
    min_score: float | None = None
    small_buckets: str = "merge"
    min_bucket: int = 256
    encoding: Encoding = field(default_factory=Encoding)
    shard_bytes: int = 192_000_000
    kind: str = "images"
    encoded: Encoded | None = None


class Seen(NamedTuple):
    """What the headers of an item say: displayed sizes [pixels], or why it is left out."""

    sizes: Sizes
    left_out: LeftOut | None = None


class ShardPlan(NamedTuple):
    """One shard to be. items: its items by their number in the source, which becomes their key."""

    name: str
    sizes: Sizes
    items: tuple[tuple[int, Item], ...]


def look(task: tuple[Sequence[Item], Options]) -> list[Seen]:
    """Read headers and captions of some items; nothing is decoded."""
    items, options = task
    seen = []
    for item in items:
        tick()
        try:
            fields = item.fields()
            item.captions(options.columns, fields)
            sizes = _sizes(item, options)
            seen.append(Seen(sizes, _filtered(item.name, sizes.image, fields, options)))
        except DataError as error:
            seen.append(Seen(Sizes(Bucket(0, 0)), LeftOut(item.name, str(error).split(" (")[0], str(error))))
    return seen


def _sizes(item: Item, options: Options) -> Sizes:
    if item.image is None:
        return Sizes(Bucket(options.resolution, options.resolution))
    image = _size(item.image)
    if options.kind != "edits":
        return Sizes(image)
    if item.source is None:
        raise DataError("no source image")
    try:
        return Sizes(image, _size(item.source))
    except DataError as error:
        raise DataError(f"its source image: {error}") from error


def _size(image: Span) -> Bucket:
    """Most headers stand at the beginning; where that is not enough, all is read."""
    try:
        return Bucket(*image_size(image.read(MAX_FILE, most=_HEADER)))
    except DataError:
        return Bucket(*image_size(image.read(MAX_FILE)))


def _filtered(name: str, size: Bucket, fields: dict[str, object], options: Options) -> LeftOut | None:
    height, width = size
    aspect = max(height, width) / min(height, width)
    if min(height, width) < options.min_side:
        return LeftOut(name, f"a side below {options.min_side} pixels", f"{height}x{width} pixels")
    if options.max_image_aspect is not None and aspect > options.max_image_aspect:
        return LeftOut(name, f"aspect above {options.max_image_aspect:g}", f"{height}x{width} pixels")
    if options.min_score is not None:
        column = options.columns.score
        try:
            score = float(str(fields.get(column or "")))
        except ValueError:
            return LeftOut(name, f"no number in {column}", f"{column} is {fields.get(column or '')!r:.80}")
        if not score >= options.min_score:  # so that NaN is left out
            return LeftOut(name, f"{column} below {options.min_score:g}", f"{column} is {score:g}")
    return None


def assign(
    seen: Sequence[Seen], names: Sequence[str], options: Options
) -> tuple[dict[Sizes, list[int]], list[LeftOut]]:
    """Numbers of the items of every bucket, and what is left out for being in a small one."""
    table = bucket_table(options.resolution, options.bucket_step, options.max_aspect)
    chosen = {n: _nearest(one.sizes, table) for n, one in enumerate(seen) if one.left_out is None}
    counts, left_out = Counter(chosen.values()), []
    if options.small_buckets == "merge":
        target = merge_small(counts, options.min_bucket)
        chosen = {n: target[bucket] for n, bucket in chosen.items()}
    elif options.small_buckets == "drop":
        small = {bucket for bucket, count in counts.items() if count < options.min_bucket}
        kind = f"in a bucket of fewer than {options.min_bucket} images"
        left_out = [LeftOut(names[n], kind, f"bucket {b}: {counts[b]} images") for n, b in chosen.items() if b in small]
        chosen = {n: bucket for n, bucket in chosen.items() if bucket not in small}
    numbers: dict[Sizes, list[int]] = {}
    for number, bucket in chosen.items():
        numbers.setdefault(bucket, []).append(number)
    place = {bucket: n for n, bucket in enumerate(table)}
    ordered = sorted(
        numbers, key=lambda sizes: (place[sizes.image], -1 if sizes.source is None else place[sizes.source])
    )
    return {sizes: numbers[sizes] for sizes in ordered}, left_out


def _nearest(sizes: Sizes, table: Sequence[Bucket]) -> Sizes:
    source = None if sizes.source is None else nearest_bucket(*sizes.source, table)
    return Sizes(nearest_bucket(*sizes.image, table), source)


def mean_bytes(task: tuple[Sequence[Item], Sizes, Options], encode: Encode | None = None) -> float | None:
    """Mean bytes that an item takes in its tar, over those that can be decoded; None where there is none."""
    items, sizes, options = task
    totals = []
    for item in items:
        tick()
        try:
            found = members_of(item, sizes, options.columns, options.encoding, encode)
        except DataError:
            continue
        totals.append(sum(_BLOCK + -(-len(body) // _BLOCK) * _BLOCK for body in found.values()))
    return sum(totals) / len(totals) if totals else None


def divide(sizes: Sizes, items: Sequence[tuple[int, Item]], mean: float, options: Options) -> list[ShardPlan]:
    """Shards of one bucket, equal in samples to within one and of 2/3 to 4/3 of the asked bytes (a small bucket: fewer)."""
    count = min(len(items), math.ceil(len(items) * mean / options.shard_bytes * 3 / 4))
    cuts = [n * len(items) // count for n in range(count + 1)]
    return [
        ShardPlan(f"{options.source}-{sizes}-{n:06d}.tar", sizes, tuple(items[cuts[n] : cuts[n + 1]]))
        for n in range(count)
    ]


def make_shard(
    task: tuple[ShardPlan, Options, Store], encode: Encode | None = None
) -> tuple[Shard | None, list[LeftOut]]:
    """Write and publish one shard and then its index, which certifies it. None where no item can be decoded."""
    import webdataset

    plan, options, store = task
    left_out = []
    path = store.scratch() / plan.name
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for number, item in plan.items:
            try:
                found = members_of(item, plan.sizes, options.columns, options.encoding, encode)
                writer.write({"__key__": _key(number), **found})
            except DataError as error:
                left_out.append(LeftOut(item.name, UNDECODABLE, str(error)))
            tick()
    if len(left_out) == len(plan.items):
        path.unlink()
        return None, left_out
    image, source = plan.sizes
    shard = write_index(path.parent, plan.name, index_tar(path), options.source, image, source_bucket=source)
    etag = store.publish(path, plan.name)
    store.publish(path.parent / shard.index_name, shard.index_name)
    return Shard(**{name: getattr(shard, name) for name in Shard.__slots__} | {"etag": etag}), left_out


def left_out_of(plan: ShardPlan, keys: Sequence[str]) -> list[LeftOut]:
    """What a shard that is finished left out, by the keys in its index. Raises DataError where it is another shard."""
    expected = {_key(number): item for number, item in plan.items}
    if strange := [key for key in keys if key not in expected]:
        raise DataError(f"{plan.name}: holds {strange[0]!r}, which is not of this data set; choose another DEST")
    there = set(keys)
    return [LeftOut(item.name, UNDECODABLE, UNDECODABLE) for key, item in expected.items() if key not in there]


def plan_digest(plans: Sequence[ShardPlan], options: Options) -> str:
    """SHA-256 of what decides the shards' content."""
    content = [[plan.name, [(number, item.name) for number, item in plan.items]] for plan in plans]
    return hashlib.sha256(json.dumps([content, repr(options)]).encode()).hexdigest()


def _key(number: int) -> str:
    return f"{number:09d}"
