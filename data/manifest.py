"""manifest.json: the shards of a folder of WebDataset tars.

manifest.json   {"format": "twinflow-manifest", "version": 1, "source": ..., "channels": 1 | 3,
                 "kind": "images" | "captions" | "edits", "encoded": null or the fields of contents.Encoded, "shards": [
                 {"name", "bytes", "etag", "samples", "bucket": [height, width], "index_bytes", "index_sha256"}]}

`kind` and `encoded` may be absent (images, null); a shard of edits also has "source_bucket", the size of its sources.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data.buckets import Bucket
from data.contents import DTYPES, KINDS, Contents, Encoded
from data.order import Stream
from data.s3 import READ_BUDGET_S, DataError, open_folder, safe_name

MANIFEST = "manifest.json"
VERSION = 1
CHANNELS = (1, 3)
# Sums over many shards must fit 64 bits.
_LARGEST = 1 << 48


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar. folder: URL that it lies under; source: name of its data set; etag: None where the store has none;
    source_bucket: size of the source images of edits."""

    folder: str
    source: str
    name: str
    bytes: int
    etag: str | None
    samples: int
    bucket: Bucket
    index_bytes: int
    index_sha256: str
    source_bucket: Bucket | None = None

    @property
    def url(self) -> str:
        """The tar as errors name it."""
        return f"{self.folder}/{self.name}"

    @property
    def index_name(self) -> str:
        return str(PurePosixPath(self.name).with_suffix(".idx"))


@dataclass(frozen=True)
class Manifest:
    """The shards of a run. weights: source -> times it counts in an epoch (absent: once); the rest as in Contents."""

    shards: tuple[Shard, ...]
    channels: int
    weights: tuple[tuple[str, Fraction], ...] = ()
    kind: str = "images"
    encoded: Encoded | None = None

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def contents(self) -> Contents:
        return Contents(self.kind, self.channels, self.encoded)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the order depends on: not of places, sizes and ETags, which change when data is copied."""
        content = [
            [
                s.source,
                s.name,
                s.samples,
                list(s.bucket),
                s.index_sha256,
                *([list(s.source_bucket)] if s.source_bucket else []),
            ]
            for s in self.shards
        ]
        weights = [[source, str(weight)] for source, weight in self.weights]
        special = [] if self.contents == Contents(channels=self.channels) else [asdict(self.contents)]
        return hashlib.sha256(json.dumps([VERSION, content, weights, *special]).encode()).hexdigest()

    def streams(self) -> tuple[Stream, ...]:
        """One stream per source and bucket (for edits: sizes of target and source), by name."""
        members: dict[tuple[str, Bucket, Bucket | None], list[int]] = {}
        for number, shard in enumerate(self.shards):
            members.setdefault((shard.source, shard.bucket, shard.source_bucket), []).append(number)
        weights = dict(self.weights)
        return tuple(
            Stream(
                source=source,
                bucket=bucket,
                weight=weights.get(source, Fraction(1)),
                shards=np.array(numbers, dtype=np.int64),
                samples=np.array([self.shards[n].samples for n in numbers], dtype=np.int64),
                source_bucket=source_bucket,
            )
            for (source, bucket, source_bucket), numbers in sorted(members.items())
        )

    @classmethod
    def mix(cls, parts: Sequence[tuple[Manifest, Fraction | int | str]]) -> Manifest:
        """Several sources as one run; weight w makes every stream of a part count w times in an epoch.

        Raises ValueError where two parts share a source name, differ in what they hold, or a weight is not positive.
        """
        shards = tuple(shard for manifest, _ in parts for shard in manifest.shards)
        names = [name for manifest, _ in parts for name in sorted({shard.source for shard in manifest.shards})]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have the same name: {', '.join(sorted(names))}; rename one in its manifest")
        if len({manifest.channels for manifest, _ in parts}) != 1:
            raise ValueError("sources with 1 and with 3 image channels cannot be mixed")
        if len({(manifest.kind, manifest.encoded) for manifest, _ in parts}) != 1:
            raise ValueError(
                f"sources that hold different things cannot be mixed ({', '.join(map(_described, (m for m, _ in parts)))}): "
                "pack them alike; precomputed ones with the same encoders"
            )
        weights = {s.source: Fraction(weight) for manifest, weight in parts for s in manifest.shards}
        if bad := [name for name, weight in weights.items() if weight <= 0]:
            raise ValueError(f"the weight of source {bad[0]} is not positive")
        first = parts[0][0]
        return cls(shards, first.channels, tuple(sorted(weights.items())), first.kind, first.encoded)


def _described(manifest: Manifest) -> str:
    encoded = manifest.encoded
    by = f" encoded by {encoded.latents[:8]}/{encoded.text[:8]} in {encoded.dtype}" if encoded else ""
    return f"{manifest.shards[0].source}: {manifest.kind}{by}"


def read_manifest(url: str, endpoint_url: str | None = None, read_budget_s: float = READ_BUDGET_S) -> Manifest:
    """Manifest of the folder or s3:// prefix `url`. Raises DataError where it is missing or malformed."""
    folder = open_folder(url, endpoint_url, read_budget_s)
    where = folder.url_of(MANIFEST)
    document = load_document(folder.read(MANIFEST), "twinflow-manifest", where)
    channels, entries = required(document, "channels", int, where), required(document, "shards", list, where)
    source = required(document, "source", str, where)
    if channels not in CHANNELS:
        raise DataError(f"{where}: channels is {channels}; images have 1 or 3")
    if not entries:
        raise DataError(f"{where}: names no shard; the data set is empty")
    shards = tuple(_shard(entry, url, source, f"{where}, shard {n}") for n, entry in enumerate(entries))
    if len({shard.name for shard in shards}) < len(shards):
        raise DataError(f"{where}: names a shard twice; write the manifest again")
    kind = document.get("kind", "images")
    if kind not in KINDS:
        raise DataError(f"{where}: holds {kind!r:.40}, this program reads {', '.join(KINDS)}")
    if strange := [s.name for s in shards if (s.source_bucket is not None) != (kind == "edits")]:
        raise DataError(f"{where}: {strange[0]} has a source_bucket exactly if the set holds edits; write it again")
    return Manifest(shards, channels, kind=kind, encoded=encoded_of(document.get("encoded"), where))


def write_manifest(
    folder: Path,
    source: str,
    channels: int,
    shards: Sequence[Shard],
    kind: str = "images",
    encoded: Encoded | None = None,
) -> None:
    """Write folder/manifest.json; it is complete or absent."""
    entries = []
    for shard in shards:
        entry = asdict(shard) | {"bucket": list(shard.bucket)}
        if shard.source_bucket is None:
            del entry["source_bucket"]
        entries.append({name: value for name, value in entry.items() if name not in ("folder", "source")})
    head: dict[str, Any] = {"format": "twinflow-manifest", "version": VERSION, "source": source, "channels": channels}
    if kind != "images" or encoded is not None:
        head |= {"kind": kind, "encoded": None if encoded is None else asdict(encoded)}
    text = json.dumps(head | {"shards": entries}, indent=1)
    partial = folder / f"{MANIFEST}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)


def load_document(body: bytes, kind: str, where: str) -> dict[str, Any]:
    """The JSON object of a file of format `kind`. Raises DataError naming the file `where`."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); write it again") from error
    if not isinstance(document, dict) or document.get("format") != kind:
        raise DataError(f"{where}: not a {kind} file; check data.manifest")
    if document.get("version") != VERSION:
        raise DataError(f"{where}: format version {document.get('version')}, this program reads {VERSION}")
    return document


def required(entry: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """entry[name], of type `kind`. Raises DataError naming the file `where`."""
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {name!r} is {value!r}, not {kind.__name__}; write the manifest again")
    return value


def encoded_of(entry: Any, where: str) -> Encoded | None:
    """The manifest's word on precomputed samples. Raises DataError naming `where` for one that makes no sense."""
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: 'encoded' is {entry!r:.40}, not an object; write the manifest again")
    where = f"{where}, encoded"
    kinds = {"str": str, "int": int}
    encoded = Encoded(**{f.name: required(entry, f.name, kinds[str(f.type)], where) for f in fields(Encoded)})
    if encoded.dtype not in DTYPES or min(encoded.latent_channels, encoded.pixels_per_latent, encoded.text_width) < 1:
        raise DataError(f"{where}: {encoded} is not one that `data pack --precompute` writes; write the manifest again")
    return encoded


def _shard(entry: Any, folder: str, source: str, where: str) -> Shard:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: is {entry!r}, not an object; write the manifest again")
    name = required(entry, "name", str, where)
    if not safe_name(name) or not name.endswith(".tar"):
        raise DataError(f"{where}: {name!r} is not the name of a .tar below the manifest's folder")
    where = f"{where} ({name})"
    numbers = {k: required(entry, k, int, where) for k in ("bytes", "samples", "index_bytes")}
    if not all(-_LARGEST < number < _LARGEST for number in numbers.values()):
        raise DataError(f"{where}: a size or count beyond 2^48; write the manifest again")
    if numbers["samples"] < 1:
        raise DataError(f"{where}: holds no sample; leave the shard out of the manifest")
    source_bucket = None if entry.get("source_bucket") is None else _bucket(entry, "source_bucket", where)
    etag = None if entry.get("etag") is None else required(entry, "etag", str, where)
    digest = required(entry, "index_sha256", str, where)
    return Shard(
        folder=folder,
        source=source,
        name=name,
        etag=etag,
        bucket=_bucket(entry, "bucket", where),
        index_sha256=digest,
        source_bucket=source_bucket,
        **numbers,
    )


def _bucket(entry: dict[str, Any], name: str, where: str) -> Bucket:
    size = required(entry, name, list, where)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DataError(f"{where}: {name} is {size!r}, not [height, width] in pixels")
    return Bucket(*size)
