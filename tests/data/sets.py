"""Small data sets that tests and benchmarks make themselves."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.buckets import Bucket
from data.index import index_tar, write_index
from data.manifest import write_manifest

SIDE = 48


def png(rng: np.random.Generator, side: int = SIDE) -> bytes:
    """A color image of noise, which does not shrink when compressed."""
    body = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(body, format="PNG")
    return body.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def write_set(folder: Path, shards: Iterable[dict[str, bytes]], buckets: Sequence[Bucket] = ()) -> Path:
    """Shards of the given members, with indexes and a manifest that knows the ETags of single uploads (MD5). buckets: of
    the shards, default SIDE x SIDE."""
    folder.mkdir(parents=True)
    written = []
    for number, members in enumerate(shards):
        bucket = buckets[number] if buckets else Bucket(SIDE, SIDE)
        path = write_tar(folder / f"noise-{number}.tar", members)
        etag = hashlib.md5(path.read_bytes()).hexdigest()
        written.append(write_index(folder, path.name, index_tar(path), "noise", bucket, etag))
    write_manifest(folder, "noise", 3, written)
    return folder


def raw_shards(shards: int, samples: int, size: int, seed: int = 0) -> Iterator[dict[str, bytes]]:
    """Shards of samples that nothing decodes: a "png" of `size` random bytes and a caption each."""
    rng = np.random.default_rng(seed)
    for shard in range(shards):
        yield {
            f"{shard}-{sample}.{extension}": body
            for sample in range(samples)
            for extension, body in (("png", rng.bytes(size)), ("txt", f"noise {shard} {sample}".encode()))
        }


def noise_shards(shards: int, samples: int, seed: int = 0) -> list[dict[str, bytes]]:
    rng = np.random.default_rng(seed)
    return [
        {
            f"{shard}-{sample}.{extension}": body
            for sample in range(samples)
            for extension, body in (("png", png(rng)), ("txt", f"noise {shard} {sample}".encode()))
        }
        for shard in range(shards)
    ]
