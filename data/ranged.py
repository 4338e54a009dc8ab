"""Members of remote shards by ranged requests, for a node whose cache cannot hold the shards that it reads side by side.

A shard opened so is a file in memory with its full size and holes where nothing was asked for: what reads members of a
shard by offset need not know the difference.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self

from data.index import Index
from data.manifest import Shard
from data.s3 import Folder
from data.samples import SampleError

# Nothing larger is read into memory for one sample, whatever an index says.
_MOST = 1 << 30
# Members of a tar lie a header and its padding apart: fewer requests are worth these bytes.
_GAP = 1024


class Source(Protocol):
    """A shard that members can be read from."""

    def descriptor(self, number: int) -> int:
        """A file descriptor in which the members of sample `number` stand at their offsets. Raises DataError."""


class WholeShard:
    """A shard that lies on this machine."""

    def __init__(self, file: int) -> None:
        self._file = file

    def descriptor(self, number: int) -> int:
        return self._file


class RangedShard:
    """A shard of which samples are fetched when they are asked for, all members of each; a context manager.

    `wanted` are asked for at once, in the threads of `pool`; others, such as stand-ins, when they are needed.
    """

    def __init__(self, folder: Folder, shard: Shard, index: Index, wanted: list[int], pool: ThreadPoolExecutor) -> None:
        self._folder, self._shard, self._index = folder, shard, index
        self._file = os.memfd_create(shard.name.rsplit("/", 1)[-1][:200])
        os.ftruncate(self._file, shard.bytes)
        self._fetches: dict[int, Future[None]] = {}
        for samples, start, size in coalesced(index, wanted):
            if size > _MOST:
                continue
            fetch = pool.submit(self._fetch, start, size)
            self._fetches |= dict.fromkeys(samples, fetch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for fetch in self._fetches.values():
            fetch.cancel()
        for fetch in self._fetches.values():
            if not fetch.cancelled():
                fetch.exception()  # the file must not be closed, and its number used again, under a fetch
        os.close(self._file)

    def descriptor(self, number: int) -> int:
        if number in self._fetches:
            self._fetches[number].result()
        else:
            for _, start, size in coalesced(self._index, [number]):
                if size > _MOST:
                    where = f"{self._shard.url}, sample {self._index.keys[number]}"
                    raise SampleError(f"{where}: its members span {size} bytes where at most {_MOST} are taken")
                self._fetch(start, size)
        return self._file

    def _fetch(self, start: int, size: int) -> None:
        body = self._folder.read(self._shard.name, start, size, self._shard.etag)
        while body:
            written = os.pwrite(self._file, body, start)
            body, start = body[written:], start + written


def coalesced(index: Index, samples: list[int]) -> list[tuple[list[int], int, int]]:
    """Ranges that hold all members of the samples: (samples, start, bytes), each sample in one of them.

    Members and samples at most a tar header apart share a range.
    """
    spans = []
    for number in set(samples):
        members = list(index.members(number).values())
        if members:
            start = min(offset for offset, _ in members)
            spans.append((start, max(offset + size for offset, size in members), number))
    ranges: list[tuple[list[int], int, int]] = []
    for start, end, number in sorted(spans):
        if ranges and start - sum(ranges[-1][1:]) <= _GAP:
            numbers, first, size = ranges[-1]
            ranges[-1] = ([*numbers, number], first, max(size, end - first))
        else:
            ranges.append(([number], start, end - start))
    return ranges
