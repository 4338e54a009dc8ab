"""python -m data.index_cli DEST: manifest and indexes for the WebDataset tars in a folder or s3:// prefix.

Every tar holds images of one size, which becomes its bucket; mixed sizes need `twinflow data pack`. Indexes that are
newer than their tar stay, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.buckets import Bucket
from data.images import stored_size
from data.index import Index, index_tar, known_shard, write_index
from data.manifest import CHANNELS, MANIFEST, Shard, write_manifest
from data.pack import PACK
from data.pool import Pool, tick
from data.s3 import DataError, LocalFolder
from data.samples import IMAGES
from data.sources import MAX_FILE, Span
from data.store import Store, Stored, open_store, sole_writer

_HEADER = 1 << 18


class Task(NamedTuple):
    name: str
    stored: Stored
    store: Store
    source: str


def index_folder(store: Store, source: str, channels: int, workers: int = 0) -> tuple[list[Shard], Counter[str]]:
    """Index the tars that have no index yet and write the manifest, which appears last.

    Returns the shards, and why and how often samples were left out of an index. Raises DataError where there is no tar,
    or one of them is broken, holds pickles, or images of several sizes.
    """
    with sole_writer(store), Pool(workers) as pool:
        files = store.files()
        if PACK in files and MANIFEST not in files:
            raise DataError(f"{store.url}: its packing is not finished; run the same `data pack` again")
        tars = sorted(name for name in files if name.endswith(".tar"))
        if not tars:
            raise DataError(f"{store.url}: no .tar files; `twinflow data pack` makes them from images")
        shards = {name: shard for name in tars if (shard := _earlier(store, name, source, files)) is not None}
        tasks = [Task(name, files[name], store, source) for name in tars if name not in shards]
        left_out: Counter[str] = Counter()
        for number, (shard, reasons) in pool.each(index_shard, tasks, "indexing", 0):
            shards[tasks[number].name] = shard
            left_out += reasons
        write_manifest(store.scratch(), source, channels, [shards[name] for name in tars])
        store.publish(store.scratch() / MANIFEST, MANIFEST)
        return [shards[name] for name in tars], left_out


def _earlier(store: Store, name: str, source: str, files: dict[str, Stored]) -> Shard | None:
    """The entry of a tar whose index was made after it."""
    tar, index = files[name], files.get(_index_name(name))
    if index is None or index.modified <= tar.modified:
        return None
    return known_shard(store.read(_index_name(name)), name, source, tar.bytes, tar.etag, store.url)


def index_shard(task: Task) -> tuple[Shard, Counter[str]]:
    """Index one tar and publish its index; samples without image or caption are left out and counted by reason."""
    name, stored, store, source = task
    scratch, url = store.scratch(), store.url_of(name)
    tar = store.local_path(name)
    if remote := tar is None:
        tar = scratch / name
        tar.parent.mkdir(parents=True, exist_ok=True)
        with open(tar, "wb") as file:
            store.download(name, file, stored.etag)
    assert tar is not None
    index, bucket, left_out = _examined(index_tar(tar, url), tar, url)
    shard = write_index(scratch, name, index, source, bucket, stored.etag, tar)
    store.publish(scratch / shard.index_name, shard.index_name)
    if remote:
        tar.unlink()
    return shard, left_out


def _examined(index: Index, tar: Path, url: str) -> tuple[Index, Bucket, Counter[str]]:
    """The samples that can be trained on, their one size, and why others cannot."""
    sizes: dict[tuple[int, int], str] = {}
    kept, left_out = [], Counter[str]()
    for number, key in enumerate(index.keys):
        tick()
        try:
            size = _size(index.members(number), tar)
        except DataError as error:
            left_out[str(error)] += 1
            continue
        kept.append(number)
        sizes.setdefault(size, key)
        if len(sizes) > 1:
            (a, first), (b, second) = sizes.items()
            raise DataError(
                f"{url}: sample {first} has {a[0]}x{a[1]} pixels and {second} has {b[0]}x{b[1]}; a shard holds one "
                "size: `twinflow data pack` sorts and crops them"
            )
    if not kept:
        raise DataError(f"{url}: holds no image with a caption ({dict(left_out)}); remove it, or write it again")
    keys = tuple(index.keys[number] for number in kept)
    return replace(index, keys=keys, spans=index.spans[kept]), Bucket(*next(iter(sizes))), left_out


def _size(members: dict[str, tuple[int, int]], tar: Path) -> tuple[int, int]:
    image = next((kind for kind in IMAGES if kind in members), None)
    if image is None:
        raise DataError(f"no image (one of {', '.join(IMAGES)})")
    if "txt" not in members and "json" not in members:
        raise DataError("no caption (.txt or .json)")
    span = Span(str(tar), *members[image])
    try:
        return stored_size(span.read(MAX_FILE, most=_HEADER))
    except DataError:
        return stored_size(span.read(MAX_FILE))


def _index_name(name: str) -> str:
    return name.removesuffix(".tar") + ".idx"


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m data.index_cli", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dest", help="folder or s3:// prefix that holds the tars")
    parser.add_argument("--name", help="name of the data set, default that of DEST")
    parser.add_argument("--channels", type=int, choices=CHANNELS, default=3, help="1 grey, 3 RGB (%(default)s)")
    workers = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=workers, help="processes; 0 none but this (%(default)s)")
    parser.add_argument("--endpoint-url", help="S3 endpoint of stores other than AWS")
    given = parser.parse_args(arguments)
    try:
        store = open_store(given.dest, given.endpoint_url)
        if isinstance(store, LocalFolder) and not store.path.is_dir():
            raise DataError(f"{store.url}: no such folder")
        name = re.sub(r"[^\w-]", "_", given.name or store.url.rsplit("/", 1)[-1], flags=re.ASCII) or "images"
        shards, left_out = index_folder(store, name, given.channels, max(0, given.workers))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    for bucket, count in sorted(Counter({s.bucket: 0 for s in shards}).items()):
        count = sum(s.samples for s in shards if s.bucket == bucket)
        print(f"{bucket}: {count} samples in {sum(s.bucket == bucket for s in shards)} shards")
    for reason, count in left_out.most_common():
        print(f"left out: {count} samples: {reason}")
    print(f"wrote {store.url_of(MANIFEST)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
