"""One byte source for folders on disk and on S3: list, read a range, download whole.

Credentials come from boto3's standard chain (environment, profile, instance role) and are never handled here.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlparse

_CHUNK = 4 << 20
_ABSENT = "no such object; check data.manifest, and that the upload finished"
_SILENT = "the server cannot be reached; check data.endpoint_url and the network"
_DENIED = "access refused; check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE) and the bucket's policy"
_REMEDIES = {
    "NoSuchKey": _ABSENT,
    "404": _ABSENT,
    "NoSuchBucket": "no such bucket; check data.manifest",
    "NoCredentialsError": "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "EndpointConnectionError": _SILENT,
    "ConnectTimeoutError": _SILENT,
}


class DataError(RuntimeError):
    """The data cannot be read as asked; the message names the URL or file, the cause and the remedy."""


class Folder(Protocol):
    """A place that holds a manifest and its shards.

    url: the folder as errors name it; identity: what tells it from every other folder, endpoint included.
    All methods raise DataError naming the object.
    """

    url: str
    identity: str

    def sizes(self) -> dict[str, int]:
        """Objects below the folder by their relative name, with their size [bytes]."""

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `start`, or all from there on."""

    def download(self, name: str, target: BinaryIO, etag: str | None = None) -> int:
        """Write the whole object to `target`; returns its bytes. A different ETag than `etag` raises."""

    def local_path(self, name: str) -> Path | None:
        """Path of the object where it lies on this machine's file system, else None."""

    def url_of(self, name: str) -> str:
        """The object as errors name it."""


def open_folder(url: str, endpoint_url: str | None = None) -> Folder:
    """Folder of a plain path, a file:// or an s3:// URL. Raises DataError for other schemes."""
    scheme, rest = url.split("://", 1) if "://" in url else ("", url)
    if scheme in ("", "file"):
        return LocalFolder(Path(unquote(urlparse(url).path) if scheme else rest))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        return S3Folder(bucket, prefix.strip("/"), endpoint_url)
    raise DataError(
        f"{url}: {scheme}:// is not supported; give a path, file:// or s3:// (data.manifest, data.held_out)"
    )


def safe_name(name: str) -> bool:
    """Whether a relative object name stays inside its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


class LocalFolder:
    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.url = self.identity = str(self.path)

    def sizes(self) -> dict[str, int]:
        if not self.path.is_dir():
            raise DataError(f"{self.path}: no such folder; check data.manifest and data.held_out")
        return {str(p.relative_to(self.path)): p.stat().st_size for p in self.path.rglob("*") if p.is_file()}

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        try:
            with open(self.local_path(name), "rb") as file:
                file.seek(start)
                return file.read(-1 if size is None else size)
        except OSError as error:
            raise DataError(f"{self.url_of(name)}: {error.strerror or error}") from error

    def download(self, name: str, target: BinaryIO, etag: str | None = None) -> int:
        with open(self.local_path(name), "rb") as file:
            shutil.copyfileobj(file, target)
        return target.tell()

    def local_path(self, name: str) -> Path:
        return self.path / name

    def url_of(self, name: str) -> str:
        return str(self.path / name)


class S3Folder:
    """Objects below s3://bucket/prefix; one client per process, so that it may be sent to loader processes."""

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None) -> None:
        if not bucket:
            raise DataError("s3:// without a bucket name; write s3://BUCKET/PREFIX")
        self.bucket, self.prefix, self.endpoint_url = bucket, prefix, endpoint_url
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.identity = f"{endpoint_url or 'aws'} {self.url}"

    def sizes(self) -> dict[str, int]:
        start = f"{self.prefix}/" if self.prefix else ""
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            return {o["Key"][len(start) :]: o["Size"] for page in pages for o in page.get("Contents", ())}
        except Exception as error:
            raise self._explained(error, self.url) from error

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        if size == 0:
            return b""
        end = "" if size is None else start + size - 1
        request = {} if start == 0 and size is None else {"Range": f"bytes={start}-{end}"}
        body = b"".join(self._body(name, request))
        if size is not None and len(body) < size:
            raise DataError(f"{self.url_of(name)}: {len(body)} bytes from {start} where {size} were asked")
        return body

    def download(self, name: str, target: BinaryIO, etag: str | None = None) -> int:
        return sum(target.write(chunk) for chunk in self._body(name, {}, etag))

    def local_path(self, name: str) -> Path | None:
        return None

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    @property
    def _client(self) -> Any:
        return _client(os.getpid(), self.endpoint_url)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _body(self, name: str, request: dict[str, str], etag: str | None = None) -> Iterator[bytes]:
        """Chunks of one GET. botocore retries up to the headers; what breaks in the body ends here."""
        condition = {"IfMatch": etag} if etag else {}
        try:
            response = self._client.get_object(Bucket=self.bucket, Key=self._key(name), **request, **condition)
            # Some stores ignore the condition.
            if etag and response["ETag"].strip('"') != etag.strip('"'):
                raise self._changed(name, etag, response["ETag"])
            yield from response["Body"].iter_chunks(_CHUNK)
        except DataError:
            raise
        except Exception as error:
            if _status(error) == 412 and etag:
                present = self._client.head_object(Bucket=self.bucket, Key=self._key(name))["ETag"]
                raise self._changed(name, etag, present) from error
            raise self._explained(error, self.url_of(name)) from error

    def _changed(self, name: str, etag: str, present: str) -> DataError:
        return DataError(
            f"{self.url_of(name)}: changed since its manifest was written (ETag {present}, the manifest says {etag}); "
            "restore the object, or write manifest and indexes again"
        )

    def _explained(self, error: Exception, url: str) -> DataError:
        code = str(getattr(error, "response", {}).get("Error", {}).get("Code", type(error).__name__))
        where = f" at {self.endpoint_url}" if self.endpoint_url else ""
        remedy = _REMEDIES.get(code) or (_DENIED if _status(error) in (401, 403) else str(error))
        return DataError(f"{url}{where}: {remedy} ({code})")


def _status(error: Exception) -> int | None:
    """HTTP status of a refused request."""
    status: int | None = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


@functools.lru_cache(maxsize=8)
def _client(pid: int, endpoint_url: str | None) -> Any:
    """S3 client of this process: `pid` is in the key because connections do not survive a fork."""
    import boto3
    from botocore.config import Config

    config = Config(
        # Virtual-hosted addresses need a DNS name per bucket, which stores behind a plain endpoint rarely have.
        s3={"addressing_style": "path"} if endpoint_url else None,
        retries={"mode": "standard", "max_attempts": 5},
        connect_timeout=10,
        read_timeout=30,
        # Some stores answer a range with the checksum of the whole object, which the default setting refuses.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)
