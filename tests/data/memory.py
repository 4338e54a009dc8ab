"""A remote folder in memory: the reader's means without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.buckets import Bucket
from data.index import Index
from data.manifest import Manifest, Shard
from data.s3 import DataError


class MemoryFolder:
    """downloads: names in the order in which they were asked for whole; reads: (name, start, size) of ranges;
    before: is called with the name before each."""

    def __init__(self, objects: dict[str, bytes], before: Callable[[str], None] = lambda name: None) -> None:
        self.url = self.identity = "memory://set"
        self.objects, self.before = objects, before
        self.downloads: list[str] = []
        self.reads: list[tuple[str, int, int | None]] = []
        self._lock = threading.Lock()

    def sizes(self, beginning: str = "") -> dict[str, int]:
        return {name: len(body) for name, body in self.objects.items() if name.startswith(beginning)}

    def read(self, name: str, start: int = 0, size: int | None = None, etag: str | None = None) -> bytes:
        with self._lock:
            self.reads.append((name, start, size))
        self.before(name)
        return self._body(name)[start:][:size]

    def download(self, name: str, target: BinaryIO, etag: str | None = None, size: int = 0, threads: int = 1) -> int:
        with self._lock:
            self.downloads.append(name)
        self.before(name)
        return target.write(self._body(name))

    def local_path(self, name: str) -> Path | None:
        return None

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _body(self, name: str) -> bytes:
        if name not in self.objects:
            raise DataError(f"{self.url_of(name)}: no such object")
        return self.objects[name]


def memory_set(samples: list[int], size: int = 100, buckets: int = 1) -> tuple[Manifest, MemoryFolder]:
    """A manifest of shards of the given sample counts, `size` bytes a sample and 10 an index, dealt to buckets in turn.
    The objects hold nothing but their size."""
    shards = tuple(
        Shard("memory://set", "set", f"{n}.tar", size * count, None, count, Bucket(8, 8 + n % buckets), 10, f"{n}")
        for n, count in enumerate(samples)
    )
    objects = {shard.name: bytes(shard.bytes) for shard in shards} | {shard.index_name: bytes(10) for shard in shards}
    return Manifest(shards, 3), MemoryFolder(objects)


def index(spans: list[list[tuple[int, int]]]) -> Index:
    """Samples with members a, b, ... at (offset, size)."""
    width = max(map(len, spans))
    array = np.full((len(spans), width, 2), -1, dtype=np.int64)
    for number, members in enumerate(spans):
        array[number, : len(members)] = np.array(members).reshape(-1, 2)
    return Index("0.tar", tuple("abcdef"[:width]), tuple(f"k{n}" for n in range(len(spans))), array)
