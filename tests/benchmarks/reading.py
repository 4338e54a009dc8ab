"""What the reading benchmarks share: members read without decoding, and the stores' credentials."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from data.index import Index
from data.manifest import Shard
from tests.data import rclone

BUCKET = "set"


class Read(NamedTuple):
    """Members of a sample read. begin, end: monotonic clock, which all processes share [s]."""

    pid: int
    bytes: int
    begin: float
    end: float


def read_timed(file: int, shard: Shard, index: Index, sample: int) -> Read:
    """Read all members of a sample."""
    began = time.monotonic()
    size = sum(len(os.pread(file, size, offset)) for offset, size in index.members(sample).values())
    return Read(os.getpid(), size, began, time.monotonic())


def pread_members(members: list[tuple[str, int, int]]) -> list[Read]:
    """Read members given as (path, offset, size)."""
    files = {path: os.open(path, os.O_RDONLY) for path in {path for path, _, _ in members}}
    reads = []
    for path, offset, size in members:
        began = time.monotonic()
        got = len(os.pread(files[path], size, offset))
        reads.append(Read(os.getpid(), got, began, time.monotonic()))
    for file in files.values():
        os.close(file)
    return reads


def set_credentials() -> None:
    """Credentials of the stores that the benchmarks start, for this process and its children."""
    os.environ |= {"AWS_ACCESS_KEY_ID": rclone.KEY, "AWS_SECRET_ACCESS_KEY": rclone.SECRET}
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
