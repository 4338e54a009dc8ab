"""Folders that a run writes to: writable, large enough, fast enough, and where it must be, shared by all nodes."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from trainer.health.findings import GREEN, RED, YELLOW, Finding
from trainer.saving.durable import write_all

_PIECE = 1 << 20
_LEAST = 64 << 10
_SLOW = 20e6
"""Bytes a second below which a disk is called slow."""
_MARK = ".doctor-"
_SEEN_S = 5.0
"""Network file systems show a new file to other nodes after a while."""


def standing(path: Path) -> Path:
    """The nearest folder above or at `path` that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def folder(name: str, path: Path, knob: str, needed: float, why: str, size: int) -> Iterator[Finding]:
    """Write `size` bytes down to the disk below `path` and remove them. needed: bytes that the run will want there, for
    the reason `why`; knob: the key that sets the path."""
    check, place = f"disk {name}", standing(path)
    larger, elsewhere = f"free space there, or set {knob} to a larger disk", f"mend it, or set {knob} to another folder"
    try:
        free = shutil.disk_usage(place).free
        size = min(size, free // 4)  # others are writing there, too
        if size < _LEAST:
            yield Finding(check, RED, f"{place} is full: {free / 1e6:.1f} MB free", larger)
            return
        speed = _written(place, size)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        value = f"cannot write {size / 1e6:.0f} MB to {place}: {error.strerror}"
        yield Finding(check, RED, value, larger if full else elsewhere)
        return
    value = f"{path}: {speed / 1e6:.0f} MB/s with fsync, {free / 1e9:.1f} GB free"
    if free < needed:
        yield Finding(check, YELLOW, f"{value}, {needed / 1e9:.1f} GB wanted ({why})", larger)
    elif speed < _SLOW:
        yield Finding(check, YELLOW, value, f"set {knob} to a faster disk: saving and reading will hold the GPUs up")
    else:
        yield Finding(check, GREEN, value)


def _written(place: Path, size: int) -> float:
    """Bytes a second of a file of `size` bytes written with fsync."""
    target = place / f"{_MARK}{os.getpid()}-{secrets.token_hex(4)}"
    piece = memoryview(os.urandom(_PIECE))  # file systems may compress zeros
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        began = time.perf_counter()
        for begin in range(0, size, _PIECE):
            write_all(descriptor, piece[: size - begin])
        os.fsync(descriptor)
        return size / (time.perf_counter() - began)
    finally:
        os.close(descriptor)
        target.unlink()


class SharedMark:
    """A file that one node makes and all others must see. path: of the run's folder."""

    def __init__(self, path: Path) -> None:
        self._place = standing(path)
        self.file = self._place / f"{_MARK}{secrets.token_hex(8)}"

    def make(self) -> str:
        """Make it; its path, empty where that is impossible, which another check says."""
        try:
            self.file.touch(mode=0o644, exist_ok=False)
        except OSError:
            return ""
        return str(self.file)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)


def shared(mark: str) -> Iterator[Finding]:
    """Whether this node sees the mark of another."""
    deadline = time.monotonic() + _SEEN_S
    while not Path(mark).exists():
        if time.monotonic() > deadline:
            remedy = "put run.dir on a file system that all nodes share, mounted at the same place"
            yield Finding("run folder shared", RED, f"{Path(mark).parent} is not the one of rank 0", remedy)
            return
        if Path(mark).parent.is_dir():
            os.listdir(Path(mark).parent)  # refreshes what NFS remembers
        time.sleep(0.1)
    yield Finding("run folder shared", GREEN, f"{Path(mark).parent}")


def checkpoint_bytes(model: Path, averaged: bool) -> float:
    """Bytes of one checkpoint of a model folder trained whole in float32: parameters, two moments, and the average.
    0 where the folder holds no weights to count."""
    place = model / "transformer" if (model / "transformer").is_dir() else model
    elements = 0
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                count = 1
                for edge in content.get_slice(name).get_shape():
                    count *= edge
                elements += count
    return 4.0 * elements * (4 if averaged else 3)
