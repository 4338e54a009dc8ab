"""One byte source for folders on disk and on S3: list, read a range, download whole.

Credentials come from boto3's standard chain (environment, profile, instance role) and are never handled here.
"""

from __future__ import annotations

import functools
import http.client
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote, urlparse

from data.parts import PART, download_parts, fetch_pool
from data.retry import Budget, Losses, code_of, longest_silence_s, status_of, transient

log = logging.getLogger(__name__)

READ_BUDGET_S = 60.0
_PIECE = 1 << 20
_ABSENT = "no such object; check the URL (data.manifest, checkpoint.dir), and that the upload finished"
_SILENT = "the server cannot be reached; check endpoint_url (of data or checkpoint) and the network"
_DENIED = "access refused; check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE) and the bucket's policy"
_REMEDIES = {
    "NoSuchKey": _ABSENT,
    "404": _ABSENT,
    "NoSuchBucket": "no such bucket; check the URL (data.manifest, checkpoint.dir)",
    "NoCredentialsError": "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "EndpointConnectionError": _SILENT,
    "ConnectTimeoutError": _SILENT,
}


class DataError(RuntimeError):
    """The data cannot be read as asked; the message names the URL or file, the cause and the remedy."""


class BudgetSpentError(DataError):
    """Reading was tried for as long as data.read_budget_s allows."""


class Folder(Protocol):
    """A place that holds a manifest and its shards.

    url: the folder as errors name it; identity: what tells it from every other folder, endpoint included.
    All methods raise DataError naming the object.
    """

    url: str
    identity: str

    def sizes(self, beginning: str = "") -> dict[str, int]:
        """Objects below the folder whose relative name begins so, by that name, with their size [bytes]."""

    def read(self, name: str, start: int = 0, size: int | None = None, etag: str | None = None) -> bytes:
        """`size` bytes from `start`, or all from there on. A different ETag than `etag` raises."""

    def download(self, name: str, target: BinaryIO, etag: str | None = None, size: int = 0, threads: int = 1) -> int:
        """Write the whole object to `target`; returns its bytes. A different ETag than `etag` raises.

        size: bytes that are expected, from which on several threads of this process fetch parts of a large object;
        `target` is then a file.
        """

    def local_path(self, name: str) -> Path | None:
        """Path of the object where it lies on this machine's file system, else None."""

    def url_of(self, name: str) -> str:
        """The object as errors name it."""


def open_folder(url: str, endpoint_url: str | None = None, read_budget_s: float = READ_BUDGET_S) -> Folder:
    """Folder of a plain path, a file:// or an s3:// URL. Raises DataError for other schemes."""
    scheme, rest = url.split("://", 1) if "://" in url else ("", url)
    if scheme in ("", "file"):
        return LocalFolder(Path(unquote(urlparse(url).path) if scheme else rest))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        return S3Folder(bucket, prefix.strip("/"), endpoint_url, read_budget_s)
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

    def sizes(self, beginning: str = "") -> dict[str, int]:
        if not self.path.is_dir():
            raise DataError(f"{self.path}: no such folder; check data.manifest and data.held_out")
        files = {str(p.relative_to(self.path)): p for p in self.path.rglob("*") if p.is_file()}
        return {name: path.stat().st_size for name, path in files.items() if name.startswith(beginning)}

    def read(self, name: str, start: int = 0, size: int | None = None, etag: str | None = None) -> bytes:
        try:
            with open(self.local_path(name), "rb") as file:
                file.seek(start)
                return file.read(-1 if size is None else size)
        except OSError as error:
            raise DataError(f"{self.url_of(name)}: {error.strerror or error}") from error

    def download(self, name: str, target: BinaryIO, etag: str | None = None, size: int = 0, threads: int = 1) -> int:
        with open(self.local_path(name), "rb") as file:
            shutil.copyfileobj(file, target)
        return target.tell()

    def local_path(self, name: str) -> Path:
        return self.path / name

    def url_of(self, name: str) -> str:
        return str(self.path / name)


class S3Folder:
    """Objects below s3://bucket/prefix; one client per process, so that it may be sent to loader processes.

    What may pass (a broken, stalled or short body, a server that is down or busy) is tried again, from the last byte
    on and for the same ETag, until read_budget_s seconds are lost on one object.
    """

    def __init__(
        self, bucket: str, prefix: str, endpoint_url: str | None, read_budget_s: float = READ_BUDGET_S
    ) -> None:
        if not bucket:
            raise DataError("s3:// without a bucket name; write s3://BUCKET/PREFIX")
        self.bucket, self.prefix, self.endpoint_url = bucket, prefix, endpoint_url
        self.read_budget_s = read_budget_s
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.identity = f"{endpoint_url or 'aws'} {self.url}"

    def sizes(self, beginning: str = "") -> dict[str, int]:
        return {name: entry["Size"] for name, entry in self._listing(beginning)}

    def _listing(self, beginning: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """(relative name, entry of the store's answer) of every object but the "folders" of consoles, page by page."""
        start = f"{self.prefix}/" if self.prefix else ""
        wanted = {"Prefix": f"{start}{beginning}"}
        while True:
            page = self._request("list_objects_v2", self.url, Budget(self.read_budget_s), **wanted)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    yield entry["Key"][len(start) :], entry
            if not page.get("IsTruncated"):
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, name: str, start: int = 0, size: int | None = None, etag: str | None = None) -> bytes:
        if size == 0:
            return b""
        body = b"".join(self._body(name, start, size, etag))
        if size is not None and len(body) < size:
            raise DataError(f"{self.url_of(name)}: {len(body)} bytes from {start} where {size} were asked")
        return body

    def download(self, name: str, target: BinaryIO, etag: str | None = None, size: int = 0, threads: int = 1) -> int:
        if threads == 1 or size <= PART or etag is None:  # parts of one object: the condition holds them together
            return sum(target.write(piece) for piece in self._body(name, etag=etag))
        losses = Losses()

        def body(start: int, length: int | None) -> Iterator[bytes]:
            return self._body(name, start, length, etag, losses)

        return download_parts(body, target.fileno(), size, fetch_pool(threads))

    def local_path(self, name: str) -> Path | None:
        return None

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    @property
    def _client(self) -> Any:
        return _client(os.getpid(), self.endpoint_url, longest_silence_s(self.read_budget_s))

    def _body(
        self, name: str, start: int = 0, size: int | None = None, etag: str | None = None, losses: Losses | None = None
    ) -> Iterator[bytes]:
        """The object's bytes from `start`, at most `size`, by as many GETs as it takes."""
        url, budget, position = self.url_of(name), Budget(self.read_budget_s, losses), start
        end, seen = (None if size is None else start + size), etag
        while end is None or position < end:
            request = {"Key": f"{self.prefix}/{name}" if self.prefix else name} | ({"IfMatch": seen} if seen else {})
            if position or size is not None:
                request["Range"] = f"bytes={position}-{'' if size is None else start + size - 1}"
            response = self._request("get_object", url, budget, **request)
            # Some stores ignore the condition.
            if seen and response["ETag"].strip('"') != seen.strip('"'):
                raise _changed(url, seen, response["ETag"])
            seen, (first, last) = seen or response["ETag"], _extent(response, position)
            end = min((known for known in (end, last) if known is not None), default=None)
            began = time.monotonic()
            try:
                for offset, piece in _pieces(response["Body"], budget, first):
                    fresh = piece[max(0, position - offset) : None if end is None else max(0, end - offset)]
                    position += len(fresh)
                    yield fresh
                    began = time.monotonic()
                if end is None:
                    return
                if position < end:
                    raise http.client.IncompleteRead(b"", end - position)
            except Exception as error:
                self._go_on(error, url, budget, time.monotonic() - began)

    def _request(self, operation: str, url: str, budget: Budget, **arguments: Any) -> dict[str, Any]:
        """The store's answer to one request, asked again while that may help."""
        while True:
            began = time.monotonic()
            try:
                response: dict[str, Any] = getattr(self._client, operation)(Bucket=self.bucket, **arguments)
                return response
            except Exception as error:
                if status_of(error) == 412 and "IfMatch" in arguments:
                    there = self._request("head_object", url, budget, Key=arguments["Key"])
                    raise _changed(url, arguments["IfMatch"], there["ETag"]) from error
                self._go_on(error, url, budget, time.monotonic() - began)

    def _go_on(self, error: Exception, url: str, budget: Budget, elapsed_s: float) -> None:
        """Return after a while where another attempt may help, else raise what a person can use."""
        code = code_of(error)
        where = f" at {self.endpoint_url}" if self.endpoint_url else ""
        if not transient(error):
            remedy = _REMEDIES.get(code) or (_DENIED if status_of(error) in (401, 403) else str(error))
            raise DataError(f"{url}{where}: {remedy} ({code})") from error
        if budget.again(error, elapsed_s):
            log.info("%s%s: %s; reading goes on (%s)", url, where, error, budget)
            return
        remedy = _REMEDIES.get(code, "check the server and the network, or raise data.read_budget_s")
        raise BudgetSpentError(f"{url}{where}: {remedy}; gave up after {budget}; last: {error}") from error


def _pieces(body: Any, budget: Budget, first: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of a response's body as they arrive. Raises TimeoutError where it drips until the budget ends."""
    with body as stream:
        while True:
            began = time.monotonic()
            piece = stream.read1(_PIECE)  # read() would wait for all of them, however slowly they come
            budget.received(len(piece), time.monotonic() - began)
            if not piece:
                return
            yield first, piece
            first += len(piece)


def _extent(response: dict[str, Any], asked: int) -> tuple[int, int | None]:
    """First byte of the object in the body, and the one after its last (None: not said), when it was asked from
    `asked` on."""
    if said := response.get("ContentRange"):
        first, last = said.removeprefix("bytes ").split("/")[0].split("-")
        return int(first), int(last) + 1
    length = response.get("ContentLength")
    status = response["ResponseMetadata"]["HTTPStatusCode"]
    # Without that header, 200 means the whole object: the range was ignored.
    first = asked if status == 206 else 0
    return first, None if length is None else first + int(length)


def _changed(url: str, expected: str, present: str) -> DataError:
    return DataError(
        f"{url}: changed since its manifest was written, or while it was read (ETag {present}, expected {expected}); "
        "restore the object, or write manifest and indexes again"
    )


@functools.lru_cache(maxsize=8)
def _client(pid: int, endpoint_url: str | None, silence_s: float) -> Any:
    """S3 client of this process: `pid` is in the key because connections do not survive a fork."""
    import boto3
    from botocore.config import Config

    config = Config(
        # Virtual-hosted addresses need a DNS name per bucket, which stores behind a plain endpoint rarely have.
        s3={"addressing_style": "path"} if endpoint_url else None,
        # Attempts are ours: botocore's end at the headers and know nothing of the budget.
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=64,  # threads that fetch parts and members
        connect_timeout=silence_s,
        read_timeout=silence_s,
        # Some stores answer a range with the checksum of the whole object, which the default setting refuses.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)
