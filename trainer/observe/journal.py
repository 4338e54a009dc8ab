"""The run's own record: <run>/journal.jsonl, one JSON object a line, only ever appended to.

Everything a tracking server is told stands here first, so a server that is down, slow or lost takes nothing with it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE = "journal.jsonl"
_WARN_EVERY_S = 60.0


@dataclass(frozen=True)
class Entry:
    """One line: its content (empty where unreadable) and the offset of the byte after it."""

    content: dict[str, Any]
    end: int


class Journal:
    """Append-only writer, safe to call from several threads of one process. Lines are flushed to the system at once.

    Opening it removes a last line that a killed process left unfinished. Where the disk refuses (full, quota) lines
    wait in memory and are written with the next one; a warning says so once a minute.
    """

    def __init__(self, run_dir: str | Path, now: Callable[[], float] = time.time) -> None:
        self.path = Path(run_dir) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._now = now
        self._lock = threading.Lock()
        self._pending: list[bytes] = []
        self._warned = -math.inf
        self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 (lives as long as the run)
        os.ftruncate(self._file.fileno(), _whole_lines(self._file.fileno()))

    def append(self, kind: str, **content: Any) -> None:
        """Record one entry, stamped with the time in milliseconds. Numbers that are not finite become strings."""
        entry = {"kind": kind, "time": int(self._now() * 1000), **content}
        line = json.dumps(_finite(entry), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._pending.append(line)
            self._write()

    def close(self) -> None:
        """Write what still waits, or warn that it is lost."""
        with self._lock:
            self._write()
            if self._pending:
                log.warning("%s: %d lines could not be written and are lost", self.path, len(self._pending))
            self._file.close()

    def _write(self) -> None:
        data = b"".join(self._pending)
        if not data:
            return
        size, written = os.fstat(self._file.fileno()).st_size, 0
        try:
            while written < len(data):
                written += os.write(self._file.fileno(), data[written:])
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)  # no half line may stay; shrinking needs no space
            if time.monotonic() - self._warned >= _WARN_EVERY_S:
                self._warned = time.monotonic()
                log.warning(
                    "%s cannot be written (%s): %d lines wait in memory; free space there",
                    self.path,
                    error,
                    len(self._pending),
                )
            return
        self._pending.clear()


def read(run_dir: str | Path, start: int = 0, most_bytes: int | None = None) -> Iterator[Entry]:
    """Entries from offset `start` on, complete lines only; about `most_bytes` at once.

    A line that is no JSON object (a damaged disk, a foreign hand) is reported and left out.
    """
    path = Path(run_dir) / FILE
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        end = start
        for line in file:
            if not line.endswith(b"\n"):
                return  # being written
            end += len(line)
            yield Entry(_parsed(line, path, end), end)
            if most_bytes is not None and end - start >= most_bytes:
                return


def _parsed(line: bytes, path: Path, end: int) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    if isinstance(content, dict):
        return content
    log.warning("%s: the line that ends at byte %d is no JSON object and is left out", path, end)
    return {}


def _whole_lines(descriptor: int) -> int:
    """Size of a file up to its last newline."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 65536)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _finite(value: Any) -> Any:
    """Strict JSON has no NaN: "nan", "inf" and "-inf" are written instead, which float() reads back."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
