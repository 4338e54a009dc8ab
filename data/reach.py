"""What the rows of a node read of remote data, and whether it reads whole shards or members by ranges.

Whole shards take few requests and are shared by the node's ranks. They are worth their bytes only where the cache can
hold what is read side by side, and where the rows use what they fetch. So a node reads members by ranges where the
shards read side by side do not fit, or where whole shards would cost more than WASTE times the bytes used and two
shards a stream on top: a lane that several nodes share, a shard cut by two lanes that cannot be kept from one to the
other, a few steps of a large set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.manifest import Manifest
from data.order import Order, Visits
from data.permutation import Floats, Integers

WASTE = 1.1
# A run that ends before its epoch may leave so much unused: fewer requests are worth it [bytes].
_SMALL = 10**9


@dataclass(frozen=True)
class Reach:
    """What `rows` of the global batch read in an epoch, or in the run's steps of one. Bytes count indexes too.

    shards: read side by side, streams x lanes that cross the rows, of at most side_by_side bytes; touched, used, fetched:
    bytes of the different shards, of their samples that these rows use, and bytes that whole shards would download;
    kept: whether a shard that two lanes share can stay from the first to the second; ranged: members are read by ranges.
    """

    rows: range
    cache_bytes: int
    shards: int
    side_by_side: int
    touched: int
    used: int
    fetched: int
    kept: bool
    ranged: bool

    def __str__(self) -> str:
        way = "members are read by ranges" if self.ranged else f"whole shards, {self.fetched / 1e9:.3g} GB in all"
        return (
            f"rows {self.rows.start} to {self.rows.stop - 1} use {self.used / 1e9:.3g} GB of {self.touched / 1e9:.3g} GB "
            f"of shards in an epoch (or in this run), {self.shards} shards side by side of at most "
            f"{self.side_by_side / 1e9:.3g} GB, shard cache {self.cache_bytes / 1e9:.3g} GB: {way}"
        )


def reach(order: Order, manifest: Manifest, remote: set[str], rows: range, steps: range, cache_bytes: int) -> Reach:
    """Reach of the rows from steps.start on. remote: folders that are not on this machine, the only ones that count."""
    size = shard_bytes(manifest, remote)
    epoch = order.epoch(steps.start)
    visits = order.visits(epoch, rows)
    part = _part_within(visits, order, epoch, steps)
    if int(size[np.unique(visits.shard[part > 0])].sum()) <= _SMALL:
        part = np.ones(len(part))
    shard, share, part = visits.shard[part > 0], visits.share[part > 0], part[part > 0]
    largest = [int(size[stream.shards].max()) for stream in order.streams]
    lanes = [
        min(len(stream.shards), _crossing(rows, order.global_batch_size // lanes))
        for stream, lanes in zip(order.streams, order.lanes, strict=True)
    ]
    different, times = np.unique(shard, return_counts=True)
    touched, visited = int(size[different].sum()), int(size[shard].sum())
    used = int((size[shard] * share * part).sum())
    side_by_side = sum(count * most for count, most in zip(lanes, largest, strict=True))
    room = cache_bytes - side_by_side - max(largest)  # one is on its way while another is still read
    kept = touched <= cache_bytes or int(size[different[times > 1]].sum()) <= room
    fetched = touched if kept else visited
    spare = 2 * sum(largest)
    fits = touched <= cache_bytes or room >= 0
    return Reach(
        rows=rows,
        cache_bytes=cache_bytes,
        shards=sum(count for count, most in zip(lanes, largest, strict=True) if most),
        side_by_side=side_by_side,
        touched=touched,
        used=used,
        fetched=fetched,
        kept=kept,
        ranged=bool(touched) and not (fits and fetched <= WASTE * used + spare),
    )


def shard_bytes(manifest: Manifest, remote: set[str]) -> Integers:
    """Bytes that each shard takes in the cache with its index; 0 for shards that are not in a remote folder."""
    shards = manifest.shards
    return np.array([(s.bytes + s.index_bytes) * (s.folder in remote) for s in shards], dtype=np.int64)


def _part_within(visits: Visits, order: Order, epoch: int, steps: range) -> Floats:
    """Part of each visit that the steps cover. A run that goes beyond the epoch is judged by a whole one."""
    begin, end = order.steps_through(epoch - 1), order.steps_through(epoch)
    if steps.stop >= end:
        return np.ones(len(visits.shard))
    first, stop = max(steps.start, begin), min(steps.stop, end)
    covered = np.minimum(visits.last + 1, stop) - np.maximum(visits.first, first)
    return np.maximum(covered, 0) / (visits.last + 1 - visits.first)


def _crossing(rows: range, width: int) -> int:
    """Lanes of `width` rows that cross `rows`."""
    return -(-rows.stop // width) - rows.start // width
