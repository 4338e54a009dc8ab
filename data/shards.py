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

from data.buckets import Bucket, bucket_table, merge_small, nearest_bucket
from data.images import Encoding, encode_image, image_size
from data.index import index_tar, write_index
from data.manifest import Shard
from data.pool import tick
from data.s3 import DataError
from data.sources import MAX_FILE, Columns, Item
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

    small_buckets: merge (into the nearest ratio), keep or drop buckets with fewer than min_bucket images.
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


class Seen(NamedTuple):
    """What the headers of an item say: displayed size [pixels], or why it is left out."""

    height: int
    width: int
    left_out: LeftOut | None = None


class ShardPlan(NamedTuple):
    """One shard to be. items: its items by their number in the source, which becomes their key."""

    name: str
    bucket: Bucket
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
            height, width = _size(item)
            seen.append(Seen(height, width, _filtered(item.name, height, width, fields, options)))
        except DataError as error:
            seen.append(Seen(0, 0, LeftOut(item.name, str(error).split(" (")[0], str(error))))
    return seen


def _size(item: Item) -> tuple[int, int]:
    """Most headers stand at the beginning; where that is not enough, all is read."""
    try:
        return image_size(item.image.read(MAX_FILE, most=_HEADER))
    except DataError:
        return image_size(item.image.read(MAX_FILE))


def _filtered(name: str, height: int, width: int, fields: dict[str, object], options: Options) -> LeftOut | None:
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
) -> tuple[dict[Bucket, list[int]], list[LeftOut]]:
    """Numbers of the items of every bucket, and what is left out for being in a small one."""
    table = bucket_table(options.resolution, options.bucket_step, options.max_aspect)
    chosen = {n: nearest_bucket(s.height, s.width, table) for n, s in enumerate(seen) if s.left_out is None}
    counts, left_out = Counter(chosen.values()), []
    if options.small_buckets == "merge":
        target = merge_small(counts, options.min_bucket)
        chosen = {n: target[bucket] for n, bucket in chosen.items()}
    elif options.small_buckets == "drop":
        small = {bucket for bucket, count in counts.items() if count < options.min_bucket}
        kind = f"in a bucket of fewer than {options.min_bucket} images"
        left_out = [LeftOut(names[n], kind, f"bucket {b}: {counts[b]} images") for n, b in chosen.items() if b in small]
        chosen = {n: bucket for n, bucket in chosen.items() if bucket not in small}
    members: dict[Bucket, list[int]] = {}
    for number, bucket in chosen.items():
        members.setdefault(bucket, []).append(number)
    return {bucket: members[bucket] for bucket in table if bucket in members}, left_out


def mean_bytes(task: tuple[Sequence[Item], Bucket, Options]) -> float | None:
    """Mean bytes that an item takes in its tar, over those that can be decoded; None where there is none."""
    items, bucket, options = task
    sizes = []
    for item in items:
        tick()
        try:
            members = encode_item(item, bucket, options)
        except DataError:
            continue
        sizes.append(sum(_BLOCK + -(-len(body) // _BLOCK) * _BLOCK for body in members.values()))
    return sum(sizes) / len(sizes) if sizes else None


def divide(bucket: Bucket, items: Sequence[tuple[int, Item]], mean: float, options: Options) -> list[ShardPlan]:
    """Shards of one bucket, equal in samples to within one and of 2/3 to 4/3 of the asked bytes (a small bucket: fewer)."""
    count = min(len(items), math.ceil(len(items) * mean / options.shard_bytes * 3 / 4))
    cuts = [n * len(items) // count for n in range(count + 1)]
    return [
        ShardPlan(f"{options.source}-{bucket}-{n:06d}.tar", bucket, tuple(items[cuts[n] : cuts[n + 1]]))
        for n in range(count)
    ]


def encode_item(item: Item, bucket: Bucket, options: Options) -> dict[str, bytes]:
    """Members of a sample by suffix: the image, .txt with its first caption, .json with all of them and its name."""
    fields = item.fields()
    captions = item.captions(options.columns, fields)
    suffix, image = encode_image(item.image.read(MAX_FILE), bucket, options.encoding)
    record: dict[str, object] = {"caption": captions[0], "name": item.name}
    if len(captions) > 1:
        record["captions"] = list(captions)
    return {suffix: image, "txt": captions[0].encode(), "json": json.dumps(record, ensure_ascii=False).encode()}


def make_shard(task: tuple[ShardPlan, Options, Store]) -> tuple[Shard | None, list[LeftOut]]:
    """Write and publish one shard and then its index, which certifies it. None where no item can be decoded."""
    import webdataset

    plan, options, store = task
    left_out = []
    path = store.scratch() / plan.name
    with open(path, "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        for number, item in plan.items:
            try:
                writer.write({"__key__": _key(number), **encode_item(item, plan.bucket, options)})
            except DataError as error:
                left_out.append(LeftOut(item.name, UNDECODABLE, str(error)))
            tick()
    if len(left_out) == len(plan.items):
        path.unlink()
        return None, left_out
    shard = write_index(path.parent, plan.name, index_tar(path), options.source, plan.bucket)
    etag = store.publish(path, plan.name)
    store.publish(path.parent / shard.index_name, shard.index_name)
    return Shard(**{name: getattr(shard, name) for name in Shard.__slots__} | {"etag": etag}), left_out


def left_out_of(plan: ShardPlan, keys: Sequence[str]) -> list[LeftOut]:
    """What a shard that is finished left out, by the keys in its index. Raises DataError where it is another shard."""
    expected = {_key(number): item for number, item in plan.items}
    if strange := [key for key in keys if key not in expected]:
        raise DataError(f"{plan.name}: holds {strange[0]!r}, which is not of this data set; choose another DEST")
    return [LeftOut(item.name, UNDECODABLE, UNDECODABLE) for key, item in expected.items() if key not in set(keys)]


def plan_digest(plans: Sequence[ShardPlan], options: Options) -> str:
    """SHA-256 of what decides the shards' content."""
    content = [[plan.name, [(number, item.name) for number, item in plan.items]] for plan in plans]
    return hashlib.sha256(json.dumps([content, repr(options)]).encode()).hexdigest()


def _key(number: int) -> str:
    return f"{number:09d}"
