"""The shard cache of a node: every object is fetched once, whatever the number of ranks and loader processes.

A cached file appears by rename and is therefore complete. A fetch holds a file lock, which the kernel drops when its
holder dies. Its `.part` file has its full size from the start, so that fetches under way count against the ceiling.
A `.failed` file tells those who waited for the lock why the fetch gave up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.s3 import BudgetSpentError, DataError, Folder

# Objects share a fixed set of lock files: a lock file may never be removed, and a run sees many shards.
_LOCKS = 256
_WAIT_S = 0.05


class ShardCache:
    """Files of remote folders on this node's disk, at most `max_bytes` of them; the longest unused leave first.

    directory: made on first use, default <temporary folder>/twinflow-cache. Local folders pass straight through.
    """

    def __init__(self, directory: str | None, max_bytes: int) -> None:
        self.directory = Path(directory or Path(tempfile.gettempdir()) / "twinflow-cache").expanduser().absolute()
        self.max_bytes = max_bytes

    def open(self, folder: Folder, name: str, size: int, *, etag: str | None = None, version: str = "") -> BinaryIO:
        """The object opened for reading, fetched first where needed. An open file survives its eviction.

        size: bytes that it has according to the manifest; etag: the one that the store must have; version: what else
        tells it from an earlier object of the same name, which may still lie in the cache. Raises DataError where the
        object has another size, cannot be fetched, or does not fit.
        """
        if local := folder.local_path(name):
            return _open_local(local, size)
        path = self._path(folder.identity, name, str(size), etag or "", version)
        if (file := _open_used(path)) is not None:
            return file
        self._make_directory()
        note, began = path.with_suffix(".failed"), time.time()
        with self._lock(self._lock_of(path)):
            # Another process may have fetched it while this one waited for the lock, or have tried in vain.
            if (file := _open_used(path)) is not None:
                return file
            _raise_noted(note, began)
            try:
                return self._fetch(folder, name, size, etag, path)
            except BudgetSpentError as error:
                with contextlib.suppress(OSError):  # the note only saves the others' time
                    note.write_text(str(error), encoding="utf-8")
                raise

    def _fetch(self, folder: Folder, name: str, size: int, etag: str | None, path: Path) -> BinaryIO:
        url, partial = folder.url_of(name), path.with_suffix(".part")
        try:
            self._reserve(partial, size, url)
            with open(partial, "r+b") as target:
                received = folder.download(name, target, etag)
            if received != size:
                raise DataError(
                    f"{url}: {received} bytes where the manifest says {size}; upload the shard again or write the "
                    "manifest again"
                )
            file = open(partial, "rb")  # noqa: SIM115 (the caller closes it)
            partial.rename(path)
            path.with_suffix(".failed").unlink(missing_ok=True)
            return file
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free space, lower data.cache_gb or set data.cache_dir to another disk" if full else "check it"
            raise DataError(f"{self.directory}: cannot cache {url}: {error.strerror or error}; {remedy}") from error
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, size: int, url: str) -> None:
        """Make `partial` with its final size, evicting what is needed for it."""
        if size > self.max_bytes:
            raise DataError(
                f"{url}: its {size} bytes exceed the shard cache of {self.max_bytes} bytes; raise data.cache_gb"
            )
        partial.unlink(missing_ok=True)  # left by a process that died: this one holds its lock now
        while True:
            with self._lock("space"):
                if self._evict(self.max_bytes - size):
                    with open(partial, "wb") as file:
                        file.truncate(size)
                    return
            # Only fetches under way fill the cache; none of their holders waits for this process.
            time.sleep(_WAIT_S)

    def _evict(self, limit: int) -> bool:
        """Remove the longest unused files until at most `limit` bytes are left; whether that was possible."""
        files = []
        for entry in os.scandir(self.directory):
            if entry.name.endswith(".part") and self._abandoned(Path(entry.path)):
                Path(entry.path).unlink(missing_ok=True)
            elif entry.name.endswith((".part", ".object")):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # published or withdrawn by its holder since the listing
                    continue
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used > limit and path.endswith(".object"):
                Path(path).unlink(missing_ok=True)
                used -= size
        return used <= limit

    def _abandoned(self, partial: Path) -> bool:
        """Whether the process that fetched this file is gone: its lock can be had."""
        with open(self.directory / f"{self._lock_of(partial)}.lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def _path(self, *identity: str) -> Path:
        return self.directory / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:40]}.object"

    def _lock_of(self, path: Path) -> str:
        return f"{int(path.name[:8], 16) % _LOCKS:02x}"

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with open(self.directory / f"{name}.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.directory.stat().st_uid != os.getuid():
                # Whoever owns the folder decides what a run trains on.
                raise DataError(f"{self.directory}: belongs to another user; set data.cache_dir to a folder of yours")
        except OSError as error:
            raise DataError(f"{self.directory}: {error.strerror or error}; set data.cache_dir") from error


def _open_used(path: Path) -> BinaryIO | None:
    """The cached file, marked as used now; None where it is absent."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except FileNotFoundError:
        return None
    os.utime(file.fileno())
    return file


def _raise_noted(note: Path, began: float) -> None:
    """Raise what another process noted since `began`: each spending a budget in turn would add up to a hang."""
    with contextlib.suppress(FileNotFoundError):
        if note.stat().st_mtime >= began:
            raise BudgetSpentError(note.read_text(encoding="utf-8"))


def _open_local(path: Path, size: int) -> BinaryIO:
    try:
        file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check data.manifest") from error
    if (found := os.fstat(file.fileno()).st_size) != size:
        file.close()
        raise DataError(f"{path}: {found} bytes where the manifest says {size}; copy the shard again")
    return file
