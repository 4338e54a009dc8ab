"""The shard cache of a node: every object is fetched once, whatever the number of ranks and loader processes.

A cached file appears by rename and is therefore complete. A fetch holds a file lock, which the kernel drops when its
holder dies. Its `.part` file has its full size from the start, so that fetches under way count against the ceiling.
A `.failed` file tells those who waited for the lock why the fetch gave up.

The modification time of a cached file says how much it is wanted: opening sets it to now, whoever knows the files' next
uses sets it further back the later they are (`stamp`), and the oldest leave first. So what is not known is LRU.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data.manifest import Shard
from data.s3 import BudgetSpentError, DataError, Folder

# Objects share a fixed set of lock files: a lock file may never be removed, and a run sees many shards.
_LOCKS = 256
_WAIT_S = 0.05


class Object(NamedTuple):
    """A file of a folder. size: bytes that it has according to the manifest; etag: the one that the store must have;
    version: what else tells it from an earlier object of the same name, which may still lie in the cache."""

    folder: Folder
    name: str
    size: int
    etag: str | None = None
    version: str = ""


def tar_of(shard: Shard, folders: dict[str, Folder]) -> Object:
    return Object(folders[shard.folder], shard.name, shard.bytes, shard.etag, shard.index_sha256)


def index_of(shard: Shard, folders: dict[str, Folder]) -> Object:
    return Object(folders[shard.folder], shard.index_name, shard.index_bytes, version=shard.index_sha256)


def cache_folder(directory: str | Path | None) -> Path:
    """data.cache_dir, or its default."""
    return Path(directory or Path(tempfile.gettempdir()) / "twinflow-cache").expanduser().absolute()


class ShardCache:
    """Files of remote folders on this node's disk, at most `max_bytes` of them; the least wanted leave first.

    directory: made on first use, default <temporary folder>/twinflow-cache; threads: of each process,
    which fetch parts of the object that somebody waits for, or an object each ahead of its use.
    Local folders pass straight through.
    """

    def __init__(self, directory: str | None, max_bytes: int, threads: int = 1) -> None:
        self.directory = cache_folder(directory)
        self.max_bytes, self.threads = max_bytes, threads

    def open(self, folder: Folder, name: str, size: int, *, etag: str | None = None, version: str = "") -> BinaryIO:
        """The object opened for reading, fetched first where needed (see Object). An open file survives its eviction.

        Raises DataError where the object has another size, cannot be fetched, or does not fit.
        """
        return self.get(Object(folder, name, size, etag, version))

    def get(self, item: Object) -> BinaryIO:
        """As `open`."""
        if (file := self.present(item)) is not None:
            return file
        path = self.path(item)
        self._make_directory()
        note, began = path.with_suffix(".failed"), time.time()
        with self._lock(self._lock_of(path)):
            # Another process may have fetched it while this one waited for the lock, or have tried in vain.
            if (file := _open_used(path)) is not None:
                return file
            _raise_noted(note, began)
            self._reserve(path.with_suffix(".part"), item)
            return self._fetch(item, path, self.threads)

    def present(self, item: Object) -> BinaryIO | None:
        """The object opened for reading where it lies on this machine already, else None."""
        if local := item.folder.local_path(item.name):
            return _open_local(local, item.size)
        return _open_used(self.path(item))

    def mark_used(self, item: Object, file: BinaryIO) -> None:
        """Say that the object, open as `file`, is still in use: what was used longest ago is evicted first."""
        if item.folder.local_path(item.name) is None:
            os.utime(file.fileno())

    def holds(self, item: Object) -> bool:
        """Whether `open` would find the object on this machine."""
        return item.folder.local_path(item.name) is not None or self.path(item).exists()

    def fetch(self, item: Object, wanted_ns: int, spare_ns: int) -> bool:
        """Fetch an object ahead of its use; False where only files stamped later than spare_ns could make room.

        wanted_ns: its stamp. Raises DataError as `open` does.
        """
        self._make_directory()
        path = self.path(item)
        with self._lock(self._lock_of(path)):
            if path.exists():
                return True
            if not self._reserve(path.with_suffix(".part"), item, spare_ns):
                return False
            self._fetch(item, path, threads=1).close()
            stamp(path, wanted_ns)
            return True

    def files(self) -> set[str]:
        """Names of the complete files in the cache's directory."""
        with contextlib.suppress(FileNotFoundError):
            return {entry.name for entry in os.scandir(self.directory) if entry.name.endswith(".object")}
        return set()

    def path(self, item: Object) -> Path:
        """Where the object lies while it is cached."""
        identity = (item.folder.identity, item.name, str(item.size), item.etag or "", item.version, _boot())
        return self.directory / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:40]}.object"

    def _fetch(self, item: Object, path: Path, threads: int) -> BinaryIO:
        """Fill the file that `_reserve` made and publish it; the caller holds its lock."""
        url, partial = item.folder.url_of(item.name), path.with_suffix(".part")
        try:
            with open(partial, "r+b") as target:
                received = item.folder.download(item.name, target, item.etag, item.size, threads)
            if received != item.size:
                raise DataError(
                    f"{url}: {received} bytes where the manifest says {item.size}; upload the shard again or write the "
                    "manifest again"
                )
            file = open(partial, "rb")  # noqa: SIM115 (the caller closes it)
            partial.rename(path)
            path.with_suffix(".failed").unlink(missing_ok=True)
            return file
        except OSError as error:
            raise self._cannot_cache(url, error) from error
        except BudgetSpentError as error:
            with contextlib.suppress(OSError):  # the note only saves the others' time
                path.with_suffix(".failed").write_text(str(error), encoding="utf-8")
            raise
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, item: Object, spare_ns: int | None = None) -> bool:
        """Make `partial` with its final size, evicting what is needed for it. spare_ns: False at once where files
        stamped later would have to leave."""
        url = item.folder.url_of(item.name)
        if item.size > self.max_bytes:
            raise DataError(
                f"{url}: its {item.size} bytes exceed the shard cache of {self.max_bytes} bytes; raise data.cache_gb"
            )
        try:
            partial.unlink(missing_ok=True)  # left by a process that died: this one holds its lock now
            while True:
                with self._lock("space"):
                    if self._evict(self.max_bytes - item.size, spare_ns, held=self._lock_of(partial)):
                        with open(partial, "wb") as file:
                            file.truncate(item.size)
                        return True
                if spare_ns is not None:
                    return False
                # Only fetches under way fill the cache; none of their holders waits for this process.
                time.sleep(_WAIT_S)
        except OSError as error:
            raise self._cannot_cache(url, error) from error

    def _evict(self, limit: int, spare_ns: int | None = None, held: str | None = None) -> bool:
        """Remove the least wanted files until at most `limit` bytes are left; whether that was possible. spare_ns:
        files stamped later stay, and nothing is removed where that does not do. held: lock that the caller holds."""
        files = []
        for entry in os.scandir(self.directory):
            if entry.name.endswith(".part") and self._abandoned(Path(entry.path), held):
                Path(entry.path).unlink(missing_ok=True)
            elif entry.name.endswith((".part", ".object")):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # published or withdrawn by its holder since the listing
                    continue
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(size for _, size, _ in files)
        leaving = [f for f in sorted(files) if f[2].endswith(".object") and (spare_ns is None or f[0] <= spare_ns)]
        if spare_ns is not None and used - sum(size for _, size, _ in leaving) > limit:
            return False
        for _, size, path in leaving:
            if used > limit:
                Path(path).unlink(missing_ok=True)
                used -= size
        return used <= limit

    def _abandoned(self, partial: Path, held: str | None) -> bool:
        """Whether the process that fetched this file is gone: its lock can be had, or is the one that the caller has."""
        if (name := self._lock_of(partial)) == held:
            return True
        with open(self.directory / f"{name}.lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    def _lock_of(self, path: Path) -> str:
        return f"{int(path.name[:8], 16) % _LOCKS:02x}"

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with open(self.directory / f"{name}.lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _cannot_cache(self, url: str, error: OSError) -> DataError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space, lower data.cache_gb or set data.cache_dir to another disk" if full else "check it"
        return DataError(f"{self.directory}: cannot cache {url}: {error.strerror or error}; {remedy}")

    def _make_directory(self) -> None:
        try:
            make_own(self.directory)
        except OSError as error:
            raise DataError(f"{self.directory}: {error.strerror or error}; set data.cache_dir") from error


def make_own(folder: Path) -> None:
    """Make a folder for what was fetched, unless it is there. DataError where it is another user's: whoever owns it
    decides what a run trains on."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder}: belongs to another user; set data.cache_dir to a folder of yours")


def stamp(path: Path, wanted_ns: int) -> None:
    """Set how much a cached file is wanted; nothing where it has left."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path, ns=(wanted_ns, wanted_ns))


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


@functools.cache
def _boot() -> str:
    """What tells this start of the machine from others. Fetched files are not brought to the disk (that would take
    longer than the fetch), so after a power cut one may be whole in size and empty in part."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""
