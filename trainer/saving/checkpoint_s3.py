"""Checkpoints as objects below an s3:// prefix; see trainer/saving/checkpoint_store.py."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data.retry import Budget
from data.s3 import DataError, S3Folder
from trainer.saving import certificate as certificates
from trainer.saving.certificate import Certificate, CheckpointError
from trainer.saving.checkpoint_store import OWNER, Listing, named, read, step_of
from trainer.saving.tensor_file import StagedFile

UPLOADS = 4
"""Parts that a rank sends side by side; each is held in memory once more."""
PROBE = ".doctor-"
"""Begins the names of objects that are written to see whether that is possible."""
_PART, _MOST_PARTS = 16 << 20, 9_000  # stores take up to 10,000 parts of at least 5 MiB
_log = logging.getLogger(__name__)


class S3Checkpoints(S3Folder):
    """An s3:// prefix; what may pass is tried again as data/s3.py has it, until budget_s seconds are lost on one
    request."""

    def owner(self) -> str | None:
        # A listing and not a GET that fails: some policies answer 403 for an object that is not there.
        return self.read(OWNER).decode().strip() if OWNER in self.sizes() else None

    def claim(self, run: str) -> None:
        self._put(OWNER, f"{run}\n".encode())

    def listing(self) -> Listing:
        found: Listing = {}
        for path, size in self.sizes().items():
            name, _, file = path.partition("/")
            if file and "/" not in file and _is_checkpoint(name):
                found.setdefault(name, {})[file] = size
        return found

    def text(self, name: str) -> str:
        try:
            return self.read(f"{name}/{certificates.NAME}").decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.url}/{name}/{certificates.NAME} is damaged ({error})") from error

    def read_into(self, name: str, file: str, start: int, block: memoryview) -> None:
        block[:] = self.read(f"{name}/{file}", start, len(block))

    def begin(self, step: int) -> str:
        self._abort_uploads()
        for name, files in self.listing().items():
            for file in self._unused(name, files):
                self._delete(f"{name}/{file}")
        return f"{named(step)}/{secrets.token_hex(4)}"

    def write(self, attempt: str, rank: int, staged: StagedFile) -> str:
        folder, token = attempt.split("/")
        file = f"rank_{rank:05d}-{token}.safetensors"
        if staged.size <= _PART:
            self._put(f"{folder}/{file}", staged.cut(0, staged.size))
        else:
            self._upload(f"{folder}/{file}", staged)
        return file

    def publish(self, attempt: str, step: int, certificate: Certificate) -> str:
        name = named(step)
        certificates.check_files(self.listing().get(name, {}), certificate, f"{self.url}/{name}")
        self._put(f"{name}/{certificates.NAME}", certificate.to_json().encode())
        return name

    def remove(self, name: str) -> None:
        try:
            files = self.listing().get(name, {})
            # The certificate first, so that an interruption leaves nothing that looks complete.
            for file in sorted(files, key=lambda file: file != certificates.NAME):
                self._delete(f"{name}/{file}")
        except DataError as error:
            _log.warning("cannot remove the old checkpoint %s/%s: %s", self.url, name, error)

    def probe(self) -> None:
        """Put an object, read it and remove it; DataError where one of these is not allowed."""
        name, body = f"{PROBE}{secrets.token_hex(8)}", secrets.token_bytes(64)
        self._put(name, body)
        found = self.read(name)
        self._delete(name)
        if found != body:
            raise DataError(f"{self.url_of(name)}: the store gave back other bytes than it was given")

    def _unused(self, name: str, files: dict[str, int]) -> list[str]:
        """Files of a save that was killed, or that a later one of the same step replaced."""
        if certificates.NAME not in files:
            return list(files)
        try:
            used = read(self, name).files.keys() | {certificates.NAME}
        except CheckpointError as error:
            _log.warning("leaving a checkpoint alone that cannot be read: %s", error)
            return []
        return [file for file in files if file not in used]

    def _abort_uploads(self) -> None:
        try:
            for upload in self._uploads():
                where = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._request("abort_multipart_upload", self.url, self._budget(), **where)
        except DataError as error:
            # Many policies do not grant this, and nothing but storage depends on it.
            _log.warning("unfinished uploads cannot be removed, they may take up storage: %s", error)

    def _uploads(self) -> Iterator[dict[str, Any]]:
        """Unfinished multipart uploads of checkpoint files."""
        prefix = self._key("step_")
        more: dict[str, str] = {}
        while True:
            page = self._request("list_multipart_uploads", self.url, self._budget(), Prefix=prefix, **more)
            yield from page.get("Uploads", ())
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _upload(self, path: str, staged: StagedFile) -> None:
        """Upload in parts, each of them tried again by itself; the object appears with the last request."""
        url, where = self.url_of(path), {"Key": self._key(path)}
        where["UploadId"] = self._request("create_multipart_upload", url, self._budget(), **where)["UploadId"]
        size = max(_PART, -(-staged.size // _MOST_PARTS))

        def send(number: int) -> dict[str, Any]:
            body = staged.cut((number - 1) * size, min(number * size, staged.size))
            answer = self._request("upload_part", url, self._budget(), **where, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        with ThreadPoolExecutor(UPLOADS) as pool:
            sent = list(pool.map(send, range(1, -(-staged.size // size) + 1)))
        try:
            self._request("complete_multipart_upload", url, self._budget(), **where, MultipartUpload={"Parts": sent})
        except DataError:
            # Asked again because the answer was lost, a store no longer knows the upload that it has finished.
            if not self._has(url, where["Key"], staged.size):
                raise

    def _has(self, url: str, key: str, size: int) -> bool:
        """Whether the object is there with that many bytes."""
        try:
            return bool(self._request("head_object", url, self._budget(), Key=key)["ContentLength"] == size)
        except DataError:
            return False

    def _put(self, path: str, body: bytes) -> None:
        self._request("put_object", self.url_of(path), self._budget(), Key=self._key(path), Body=body)

    def _delete(self, path: str) -> None:
        self._request("delete_object", self.url_of(path), self._budget(), Key=self._key(path))

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def _budget(self) -> Budget:
        return Budget(self.read_budget_s)


def _is_checkpoint(name: str) -> bool:
    try:
        step_of(name)
    except ValueError:
        return False
    return not name.startswith(".")
