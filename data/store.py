"""Folders that shards are written to: a file appears in them whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from data.retry import Budget
from data.s3 import DataError, Folder, LocalFolder, S3Folder, open_folder

log = logging.getLogger(__name__)

SCRATCH = ".packing"
_PART = 16 << 20


class Stored(NamedTuple):
    """A file of a store. modified: seconds since 1970; etag: None where the store has none."""

    bytes: int
    modified: float
    etag: str | None


class Store(Folder, Protocol):
    """A folder that finished files are published to. All methods raise DataError naming the file."""

    def scratch(self) -> Path:
        """Folder on this machine for files that are not finished yet."""

    def files(self) -> dict[str, Stored]:
        """What is published, by relative name."""

    def publish(self, path: Path, name: str) -> str | None:
        """Move a finished file of the scratch folder to its place; returns its ETag."""

    def clean(self) -> None:
        """Remove what interrupted uploads left behind."""


def open_store(url: str, endpoint_url: str | None = None) -> Store:
    """Store of a plain path, a file:// or an s3:// URL. Raises DataError for other schemes."""
    folder = open_folder(url, endpoint_url)
    if isinstance(folder, S3Folder):
        return S3Store(folder.bucket, folder.prefix, endpoint_url)
    assert isinstance(folder, LocalFolder)
    return LocalStore(folder.path)


@contextmanager
def sole_writer(store: Store) -> Iterator[None]:
    """An empty scratch folder while this process is the only writer on this machine; both end with it.

    Raises DataError where another process writes to the same store.
    """
    scratch = store.scratch()
    try:
        scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        # What it holds is removed below: a link that somebody left in a shared /tmp could name anything.
        if scratch.is_symlink() or scratch.stat().st_uid != os.getuid():
            raise DataError(f"{scratch}: is a link or belongs to another user; set TMPDIR to a folder of yours")
        with open(scratch / "lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(f"{store.url}: another process is writing to it; wait for it or end it") from error
            for entry in scratch.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            try:
                store.clean()
                yield
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        where = error.filename or scratch
        raise DataError(f"{where}: {error.strerror or error}; free space, or choose another folder") from error


class LocalStore(LocalFolder):
    def scratch(self) -> Path:
        return self.path / SCRATCH  # on the same file system, so that a rename publishes

    def files(self) -> dict[str, Stored]:
        found = {}
        for name, size in self.sizes().items():
            if not name.startswith(f"{SCRATCH}/"):
                found[name] = Stored(size, (self.path / name).stat().st_mtime, None)
        return found

    def publish(self, path: Path, name: str) -> str | None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for place in (path, path.parent):
            _sync(place)
        path.replace(target)
        _sync(target.parent)
        return None

    def clean(self) -> None:
        """A killed process leaves files in the scratch folder alone."""


class S3Store(S3Folder):
    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None) -> None:
        super().__init__(bucket, prefix, endpoint_url)
        digest = hashlib.sha256(self.identity.encode()).hexdigest()[:16]
        # Decided here and sent to the workers, which may have been started with another TMPDIR.
        self._scratch = Path(tempfile.gettempdir()) / f"twinflow-packing-{os.getuid()}-{digest}"

    def scratch(self) -> Path:
        return self._scratch

    def files(self) -> dict[str, Stored]:
        return {
            name: Stored(entry["Size"], entry["LastModified"].timestamp(), entry["ETag"])
            for name, entry in self._listing()
        }

    def publish(self, path: Path, name: str) -> str | None:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _PART:
                url = self.url_of(name)
                answer = self._request("put_object", url, self._budget(), Key=self._key(name), Body=file.read())
            else:
                parts = (file.read(_PART) for _ in range(0, size, _PART))
                answer = self._upload(name, parts)
        path.unlink()
        return str(answer["ETag"])

    def clean(self) -> None:
        """Abort unfinished uploads of tars right below the prefix; others may belong to another data set."""
        start = self._key("")
        try:
            answer = self._request("list_multipart_uploads", self.url, self._budget(), Prefix=start)
            for upload in answer.get("Uploads", ()):
                name = upload["Key"][len(start) :]
                if "/" not in name and name.endswith(".tar"):
                    where = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self._request("abort_multipart_upload", self.url, self._budget(), **where)
        except DataError as error:
            # Many policies do not grant this, and nothing but storage depends on it.
            log.warning("unfinished uploads cannot be removed, they may take up storage: %s", error)

    def _upload(self, name: str, parts: Iterator[bytes]) -> dict[str, object]:
        """Upload in parts, each of them tried again by itself; the object appears with the last request."""
        url, where = self.url_of(name), {"Key": self._key(name)}
        where["UploadId"] = self._request("create_multipart_upload", url, self._budget(), **where)["UploadId"]
        sent = []
        for number, body in enumerate(parts, 1):
            part = {"PartNumber": number, "Body": body}
            answer = self._request("upload_part", url, self._budget(), **where, **part)
            sent.append({"PartNumber": number, "ETag": answer["ETag"]})
        return self._request("complete_multipart_upload", url, self._budget(), **where, MultipartUpload={"Parts": sent})

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _budget(self) -> Budget:
        return Budget(self.read_budget_s)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk: a rename that survives a power cut must not precede it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
