"""The index of a shard: where in the tar every member of every sample lies.

<shard>.idx     {"format": "twinflow-index", "version": 1, "shard": ..., "bytes", "sha256" of the tar,
                 "bucket": [height, width] (edits: also "source_bucket"), "extensions": ["json", "png", ...], "keys": [...],
                 "spans": [per sample [per extension [offset, bytes] or null]]}
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.buckets import Bucket
from data.manifest import VERSION, Shard, load_document, required
from data.permutation import Integers
from data.s3 import DataError, safe_name

# These run code when they are loaded; no reader of ours may ever meet them.
_PICKLES = frozenset({"pkl", "pickle", "pyd", "pth", "pt"})


@dataclass(frozen=True)
class Index:
    """Members of a shard's samples. spans: int64 [samples, extensions, 2] offset and bytes, -1 where absent; sha256:
    digest of the tar, None where its index does not say."""

    shard: str
    extensions: tuple[str, ...]
    keys: tuple[str, ...]
    spans: Integers
    sha256: str | None = None

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, bytes) of one sample."""
        spans = zip(self.extensions, self.spans[sample].tolist(), strict=True)
        return {extension: (offset, size) for extension, (offset, size) in spans if offset >= 0}


def index_tar(path: Path, url: str | None = None) -> Index:
    """Find the members of every sample of a tar, grouped as webdataset groups them. url: as errors name the tar.

    Raises DataError on pickles and on names that lead outside a folder.
    """
    from webdataset.tariterators import base_plus_ext  # it imports torch, which only a writer of indexes can spare

    where = url or str(path)
    samples: dict[str, dict[str, list[int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not safe_name(member.name):
                    raise DataError(
                        f"{where}: member {member.name!r:.200} leads outside its folder; write the shard again"
                    )
                key, extension = base_plus_ext(member.name)
                if member.isreg() and key is not None and not member.name.startswith("__"):
                    _refuse_pickle(extension, key, where)
                    samples.setdefault(key, {})[extension.lower()] = [member.offset_data, member.size]
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{where}: not a readable tar ({error}); write the shard again") from error
    extensions = tuple(sorted({extension for members in samples.values() for extension in members}))
    spans = [[members.get(extension, [-1, -1]) for extension in extensions] for members in samples.values()]
    array = np.array(spans, dtype=np.int64).reshape(len(samples), len(extensions), 2)
    return Index(path.name, extensions, tuple(samples), array)


def write_index(
    folder: Path,
    name: str,
    index: Index,
    source: str,
    bucket: Bucket,
    etag: str | None = None,
    tar: Path | None = None,
    source_bucket: Bucket | None = None,
) -> Shard:
    """Write <shard>.idx into `folder` and return the shard's entry for the manifest. tar: default folder/name."""
    spans = [[span if span[0] >= 0 else None for span in sample] for sample in index.spans.tolist()]
    with open(tar or folder / name, "rb") as file:
        size, content = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    document = {"format": "twinflow-index", "version": VERSION, "shard": name, "bytes": size, "sha256": content}
    document |= {"bucket": list(bucket)} | ({"source_bucket": list(source_bucket)} if source_bucket else {})
    document |= {"extensions": list(index.extensions), "keys": list(index.keys), "spans": spans}
    body = json.dumps(document, separators=(",", ":")).encode()
    digest = hashlib.sha256(body).hexdigest()
    shard = Shard(str(folder), source, name, size, etag, len(index.keys), bucket, len(body), digest, source_bucket)
    (folder / shard.index_name).parent.mkdir(parents=True, exist_ok=True)
    (folder / shard.index_name).write_bytes(body)
    return shard


def known_shard(body: bytes, name: str, source: str, size: int, etag: str | None, folder: str) -> Shard | None:
    """The manifest's entry of a tar of `size` bytes from an index made earlier; None where it was made of another."""
    where = f"{folder}/{name}"
    try:
        document = load_document(body, "twinflow-index", where)
        bucket, keys = required(document, "bucket", list, where), required(document, "keys", list, where)
        of_source = document.get("source_bucket")
        shard = Shard(
            folder=folder,
            source=source,
            name=name,
            bytes=size,
            etag=etag,
            samples=len(keys),
            bucket=Bucket(*(int(side) for side in bucket)),
            index_bytes=len(body),
            index_sha256=hashlib.sha256(body).hexdigest(),
            source_bucket=None if of_source is None else Bucket(*(int(side) for side in of_source)),
        )
        parse_index(body, shard)
    except (DataError, ValueError, TypeError):
        return None  # whoever asks makes the index again
    return shard if keys and (document.get("shard"), document.get("bytes")) == (name, size) else None


def parse_index(body: bytes, shard: Shard) -> Index:
    """Index of a shard from its bytes. Raises DataError where it is not the one that the manifest names."""
    where = f"{shard.folder}/{shard.index_name}"
    if hashlib.sha256(body).hexdigest() != shard.index_sha256:
        raise DataError(f"{where}: is not the index that the manifest names; write manifest and indexes again")
    document = load_document(body, "twinflow-index", where)
    extensions, keys = required(document, "extensions", list, where), required(document, "keys", list, where)
    spans = required(document, "spans", list, where)
    try:
        array = np.array([[span or (-1, -1) for span in sample] for sample in spans], dtype=np.int64)
        array = array.reshape(len(keys), len(extensions), 2)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: malformed spans ({error}); write the index again") from error
    for extension in extensions:
        _refuse_pickle(str(extension), "*", where)
    if len(keys) != shard.samples:
        raise DataError(f"{where}: {len(keys)} samples where the manifest says {shard.samples}; write both again")
    offset, size = array[..., 0], array[..., 1]
    # No sum of the two: it could overflow.
    half = (offset < 0) != (size < 0)
    if (array < -1).any() or half.any() or (offset > shard.bytes).any() or (size > shard.bytes - offset).any():
        raise DataError(f"{where}: a member lies outside the {shard.bytes} bytes of its shard; write the index again")
    content = None if document.get("sha256") is None else required(document, "sha256", str, where)
    return Index(shard.name, tuple(map(str, extensions)), tuple(map(str, keys)), array, content)


def _refuse_pickle(extension: str, key: str, where: str) -> None:
    if extension.lower().rsplit(".", 1)[-1] in _PICKLES:
        raise DataError(f"{where}: member {key}.{extension} is a pickle, which can run code; store it as .npy or .json")
