"""Folders of an object store as folders on this machine's disk: one download a node, complete or absent.

The folder's name is a digest of what the store lists, so a changed source becomes another folder. A file lock lets one
process download while the others wait; a killed download goes on file by file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data.cache import cache_folder, make_own
from data.s3 import READ_BUDGET_S, DataError, safe_name
from data.store import S3Store, Stored, open_store

log = logging.getLogger(__name__)

THREADS = 8
_WAIT_S = 0.2
_SAY_S = 15.0


def mirror(
    url: str,
    wanted: Callable[[str], bool],
    cache_dir: str | None,
    endpoint_url: str | None,
    budget_s: float = READ_BUDGET_S,
) -> Path:
    """The folder `url` as one on this machine: itself where it is one, else a copy of the files that are wanted.

    Raises DataError: there are no such files, no space, or the store fails for longer than budget_s.
    """
    store = open_store(url, endpoint_url)
    if not isinstance(store, S3Store):
        return Path(store.url)
    store.read_budget_s = budget_s
    files = {name: entry for name, entry in sorted(store.files().items()) if safe_name(name) and wanted(name)}
    if not files:
        raise DataError(f"{store.url}: there are no model files; check the URL, and that the upload finished")
    described = "\n".join([store.identity, *(f"{name} {e.bytes} {e.etag}" for name, e in files.items())])
    folder = cache_folder(cache_dir) / "models" / hashlib.sha256(described.encode()).hexdigest()[:16]
    try:
        make_own(folder.parent)
        partial = folder.with_name(f"{folder.name}.partial")
        with _sole(folder, lambda: _said(store.url, files, partial)):
            if not _complete(folder, files):
                shutil.rmtree(folder, ignore_errors=True)
                _download(store, files, partial)
                partial.rename(folder)
    except OSError as error:
        where = error.filename or folder
        raise DataError(
            f"{where}: {error.strerror or error}; free space, or set data.cache_dir to another disk"
        ) from error
    return folder


def _download(store: S3Store, files: dict[str, Stored], partial: Path) -> None:
    partial.mkdir(exist_ok=True)
    missing = {name: entry for name, entry in files.items() if not _has(partial, name, entry)}
    needed, free = sum(entry.bytes for entry in missing.values()), shutil.disk_usage(partial).free
    if needed > free:
        raise DataError(
            f"{store.url}: {needed / 1e9:.1f} GB do not fit the {free / 1e9:.1f} GB that are free in {partial.parent}; free "
            "space, or set data.cache_dir to another disk"
        )
    said = time.monotonic()
    for name, entry in missing.items():
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.part")
        with open(unfinished, "wb") as file:
            written = store.download(name, file, entry.etag, entry.bytes, THREADS)
        if written != entry.bytes:
            raise DataError(f"{store.url_of(name)}: {written} bytes where the store lists {entry.bytes}")
        unfinished.replace(target)
        if time.monotonic() - said > _SAY_S:
            log.info("%s", _said(store.url, files, partial))
            said = time.monotonic()


def _has(folder: Path, name: str, entry: Stored) -> bool:
    path = folder / name
    return path.is_file() and path.stat().st_size == entry.bytes


def _complete(folder: Path, files: dict[str, Stored]) -> bool:
    return all(_has(folder, name, entry) for name, entry in files.items())


def _said(url: str, files: dict[str, Stored], partial: Path) -> str:
    there = sum(entry.bytes for name, entry in files.items() if _has(partial, name, entry))
    return f"{url}: {there / 1e9:.1f} of {sum(e.bytes for e in files.values()) / 1e9:.1f} GB are in {partial}"


@contextlib.contextmanager
def _sole(folder: Path, progress: Callable[[], str]) -> Iterator[None]:
    """Hold the folder's lock; who waits for another process of this machine says so now and then."""
    with open(folder.with_name(f"{folder.name}.lock"), "ab") as lock:
        said = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - said > _SAY_S:
                    log.info("another process downloads: %s", progress())
                    said = time.monotonic()
                time.sleep(_WAIT_S)
        yield
