"""python -m data.index_cli DEST: manifest and indexes for the WebDataset tars in a folder or s3:// prefix.

Every tar holds images of one size, which becomes its bucket; mixed sizes need `twinflow data pack`. With --kind edits
the source images (<key>.source.png) of a tar have one size as well; with --kind captions there are no images, and
--resolution says how large those are that shall be generated. Indexes that are newer than their tar stay, so that the
same command goes on where it was stopped.
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

from data.buckets import Bucket, Sizes
from data.contents import KINDS, Contents
from data.ending import exit_status
from data.images import stored_size
from data.index import Index, index_tar, known_shard, write_index
from data.manifest import CHANNELS, MANIFEST, Shard, encoded_of, load_document, write_manifest
from data.pack import PACK
from data.pool import Pool, tick
from data.s3 import DataError, LocalFolder, safe_name
from data.samples import IMAGES
from data.sources import MAX_FILE, Span
from data.store import Store, Stored, open_store, sole_writer

_HEADER = 1 << 18
_NOUNS = {"images": "image", "captions": "sample", "edits": "pair of images"}


class Task(NamedTuple):
    name: str
    stored: Stored
    store: Store
    source: str
    kind: str
    resolution: int


def index_folder(
    store: Store, source: str, contents: Contents, workers: int = 0, resolution: int = 512
) -> tuple[list[Shard], Counter[str]]:
    """Index the tars that have no index yet and write the manifest, which appears last.

    contents: of the tars; a manifest of precomputed samples keeps what it says. resolution: side of the images that
    captions alone shall become [pixels].
    Returns the shards, and why and how often samples were left out of an index. Raises DataError where there is no tar,
    or one of them is broken, holds pickles, or images of several sizes, or has a name that leads outside the folder.
    """
    with sole_writer(store), Pool(workers) as pool:
        files = store.files()
        if PACK in files and MANIFEST not in files:
            raise DataError(f"{store.url}: its packing is not finished; run the same `data pack` again")
        tars = sorted(name for name in files if name.endswith(".tar"))
        if not tars:
            raise DataError(f"{store.url}: no .tar files; `twinflow data pack` makes them from images")
        if hostile := [name for name in tars if not safe_name(name)]:
            raise DataError(
                f"{store.url}: the name {hostile[0]!r:.200} leads outside of it; rename or remove that object"
            )
        earlier = {name: shard for name in tars if (shard := _earlier(store, name, source, files)) is not None}
        shards = {name: shard for name, shard in earlier.items() if _suits(shard, contents.kind, resolution)}
        tasks = [
            Task(name, files[name], store, source, contents.kind, resolution) for name in tars if name not in shards
        ]
        if MANIFEST in files:
            contents = _kept(store, contents, bool(tasks))
        left_out: Counter[str] = Counter()
        for number, (shard, reasons) in pool.each(index_shard, tasks, "indexing", 0):
            shards[tasks[number].name] = shard
            left_out += reasons
        listed = [shards[name] for name in tars]
        write_manifest(store.scratch(), source, contents.channels, listed, contents.kind, contents.encoded)
        store.publish(store.scratch() / MANIFEST, MANIFEST)
        return [shards[name] for name in tars], left_out


def _suits(shard: Shard, kind: str, resolution: int) -> bool:
    """Whether an index that is there was made for this kind of samples."""
    if kind == "captions" and shard.bucket != Bucket(resolution, resolution):
        return False
    return (shard.source_bucket is not None) == (kind == "edits")


def _kept(store: Store, contents: Contents, work: bool) -> Contents:
    """What the manifest that is there says of precomputed samples, which no tar shows."""
    entry = load_document(store.read(MANIFEST), "twinflow-manifest", store.url_of(MANIFEST))
    encoded = encoded_of(entry.get("encoded"), store.url_of(MANIFEST))
    if encoded is None:
        return contents
    if work:
        raise DataError(f"{store.url}: holds precomputed samples; `data pack --precompute` makes their indexes")
    return Contents(str(entry.get("kind", contents.kind)), int(entry.get("channels", contents.channels)), encoded)


def _earlier(store: Store, name: str, source: str, files: dict[str, Stored]) -> Shard | None:
    """The entry of a tar whose index was made after it."""
    tar, index = files[name], files.get(_index_name(name))
    if index is None or index.modified <= tar.modified:
        return None
    return known_shard(store.read(_index_name(name)), name, source, tar.bytes, tar.etag, store.url)


def index_shard(task: Task) -> tuple[Shard, Counter[str]]:
    """Index one tar and publish its index; samples without image or caption are left out and counted by reason."""
    name, stored, store, source, kind, resolution = task
    scratch, url = store.scratch(), store.url_of(name)
    tar = store.local_path(name)
    if remote := tar is None:
        tar = scratch / name
        tar.parent.mkdir(parents=True, exist_ok=True)
        with open(tar, "wb") as file:
            store.download(name, file, stored.etag)
    assert tar is not None
    index, sizes, left_out = _examined(index_tar(tar, url), tar, url, kind, resolution)
    shard = write_index(scratch, name, index, source, sizes.image, stored.etag, tar, sizes.source)
    store.publish(scratch / shard.index_name, shard.index_name)
    if remote:
        tar.unlink()
    return shard, left_out


def _examined(index: Index, tar: Path, url: str, kind: str, resolution: int) -> tuple[Index, Sizes, Counter[str]]:
    """The samples that can be trained on, their one size, and why others cannot."""
    sizes: dict[Sizes, str] = {}
    kept, left_out = [], Counter[str]()
    for number, key in enumerate(index.keys):
        tick()
        try:
            size = _sizes(index.members(number), tar, kind, resolution)
        except DataError as error:
            left_out[str(error)] += 1
            continue
        kept.append(number)
        sizes.setdefault(size, key)
        if len(sizes) > 1:
            (a, first), (b, second) = sizes.items()
            raise DataError(
                f"{url}: sample {first} has {a} pixels and {second} has {b}; a shard holds one size: `twinflow data "
                "pack` sorts and crops them"
            )
    if not kept:
        raise DataError(
            f"{url}: holds no {_NOUNS[kind]} with a caption ({dict(left_out)}); remove it, or write it again"
        )
    keys = tuple(index.keys[number] for number in kept)
    return replace(index, keys=keys, spans=index.spans[kept]), next(iter(sizes)), left_out


def _sizes(members: dict[str, tuple[int, int]], tar: Path, kind: str, resolution: int) -> Sizes:
    if kind == "captions":
        sizes = Sizes(Bucket(resolution, resolution))
    else:
        sizes = Sizes(_size(members, tar, ""), _size(members, tar, "source.") if kind == "edits" else None)
    if "txt" not in members and "json" not in members:
        raise DataError("no caption (.txt or .json)")
    return sizes


def _size(members: dict[str, tuple[int, int]], tar: Path, prefix: str) -> Bucket:
    image = next((prefix + suffix for suffix in IMAGES if prefix + suffix in members), None)
    if image is None:
        raise DataError(f"no {'source ' if prefix else ''}image (one of {', '.join(prefix + i for i in IMAGES)})")
    span = Span(str(tar), *members[image])
    try:
        return Bucket(*stored_size(span.read(MAX_FILE, most=_HEADER)))
    except DataError:
        return Bucket(*stored_size(span.read(MAX_FILE)))


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
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="what the tars hold (%(default)s)")
    parser.add_argument("--resolution", type=int, default=512, help="of captions alone [pixels] (%(default)s)")
    workers = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=workers, help="processes; 0 none but this (%(default)s)")
    parser.add_argument("--endpoint-url", help="S3 endpoint of stores other than AWS")
    given = parser.parse_args(arguments)

    def work() -> int:
        store = open_store(given.dest, given.endpoint_url)
        if isinstance(store, LocalFolder) and not store.path.is_dir():
            raise DataError(f"{store.url}: no such folder")
        name = re.sub(r"[^\w-]", "_", given.name or store.url.rsplit("/", 1)[-1], flags=re.ASCII) or "images"
        contents = Contents(given.kind, given.channels)
        shards, left_out = index_folder(store, name, contents, max(0, given.workers), given.resolution)
        for bucket, count in sorted(Counter({s.bucket: 0 for s in shards}).items()):
            count = sum(s.samples for s in shards if s.bucket == bucket)
            print(f"{bucket}: {count} samples in {sum(s.bucket == bucket for s in shards)} shards")
        for reason, count in left_out.most_common():
            print(f"left out: {count} samples: {reason}")
        print(f"wrote {store.url_of(MANIFEST)}")
        return 0

    return exit_status(work, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
