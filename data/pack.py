"""python -m data.pack SOURCE DEST: images and captions -> WebDataset shards in aspect-ratio buckets, with a manifest.

SOURCE: a folder of images with .txt (or .json) captions beside them; a table metadata.jsonl, .csv or .parquet with the
columns file_name and caption, or the folder that holds it; or WebDataset tars. DEST: a folder or s3:// prefix.
The same command goes on with a packing that was killed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.buckets import Bucket, bucket_table
from data.images import Encoding
from data.index import known_shard, parse_index
from data.manifest import MANIFEST, VERSION, Shard, load_document, write_manifest
from data.pool import Pool
from data.s3 import DataError, LocalFolder
from data.shards import (
    LeftOut,
    Options,
    Seen,
    ShardPlan,
    assign,
    divide,
    left_out_of,
    look,
    make_shard,
    mean_bytes,
    plan_digest,
)
from data.sources import Columns, Item, list_items
from data.store import Store, open_store, sole_writer

log = logging.getLogger(__name__)

PACK = "pack.json"
LEFT_OUT = "left_out.jsonl"
_CHUNK = 256
_CALIBRATION = 16


def pack(source: Path, store: Store, options: Options, workers: int = 0) -> tuple[list[Shard], list[LeftOut]]:
    """Pack all of `source` and return the shards and what was left out; the manifest appears last.

    Raises DataError where the source cannot be read, DEST holds something else or cannot be written.
    """
    with sole_writer(store), Pool(workers) as pool:
        items = list_items(source, options.columns)
        _begin(store, options)
        plans, left_out = _plan(pool, items, options)
        finished = _finished(store, plans, options)
        for plan in plans:
            if plan.name in finished:
                left_out += left_out_of(plan, parse_index(_read_index(store, plan.name), finished[plan.name]).keys)
        todo = [plan for plan in plans if plan.name not in finished]
        tasks, images = [(plan, options, store) for plan in todo], sum(len(plan.items) for plan in todo)
        for number, (shard, undecodable) in pool.each(make_shard, tasks, "packing", images):
            for item in undecodable:
                log.warning("%s: left out: %s", item.name, item.reason)
            left_out += [item._replace(reason=item.kind) for item in undecodable]
            if shard is not None:
                finished[todo[number].name] = shard
        shards = [finished[plan.name] for plan in plans if plan.name in finished]
        if not shards:
            raise DataError(f"{source}: nothing is left to pack; {_reasons(left_out)}")
        left_out.sort()
        _publish_reports(store, options, shards, left_out)
        return shards, left_out


def _plan(pool: Pool, items: list[Item], options: Options) -> tuple[list[ShardPlan], list[LeftOut]]:
    """The shards, from headers and captions alone but for a few images per bucket that tell their encoded size."""
    chunks = [(items[n : n + _CHUNK], options) for n in range(0, len(items), _CHUNK)]
    parts: dict[int, list[Seen]] = dict(pool.each(look, chunks, "looking", len(items)))
    seen = [one for number in range(len(chunks)) for one in parts[number]]
    left_out = [one.left_out for one in seen if one.left_out is not None]
    members, in_small = assign(seen, [item.name for item in items], options)
    buckets = [(bucket, [(n, items[n]) for n in numbers]) for bucket, numbers in members.items()]
    few = [([item for _, item in _spread(members)], bucket, options) for bucket, members in buckets]
    means = dict(pool.each(mean_bytes, few, "measuring", sum(len(task[0]) for task in few)))
    known = [mean for mean in means.values() if mean is not None]
    fallback = max(known, default=float(options.resolution**2))
    plans = [
        plan
        for number, (bucket, numbered) in enumerate(buckets)
        for plan in divide(bucket, numbered, means[number] or fallback, options)
    ]
    enlarged = sum(
        seen[n].height < bucket.height or seen[n].width < bucket.width for bucket, ns in members.items() for n in ns
    )
    if enlarged:
        log.warning(
            "%d of %d images are smaller than their bucket and are enlarged; see --min-side", enlarged, len(seen)
        )
    return plans, left_out + in_small


def _spread(members: Sequence[tuple[int, Item]]) -> list[tuple[int, Item]]:
    count = min(_CALIBRATION, len(members))
    return [members[n * len(members) // count] for n in range(count)]


def _begin(store: Store, options: Options) -> None:
    """Claim DEST before the long work. Raises DataError where it holds something else or cannot be written."""
    files = store.files()
    if files.keys() - {PACK, LEFT_OUT} and PACK in files:
        before, now = _claim(store).get("options"), json.loads(json.dumps(asdict(options)))
        if changed := [k for k in now if not isinstance(before, dict) or before.get(k) != now[k]]:
            raise DataError(
                f"{store.url_of(PACK)}: DEST was packed with other {', '.join(changed)}; choose another DEST, or remove "
                "this one first"
            )
    elif files.keys() - {PACK, LEFT_OUT}:
        raise DataError(f"{store.url}: holds something else ({min(files)}); choose another DEST")
    else:
        _publish_claim(store, options, None)


def _finished(store: Store, plans: list[ShardPlan], options: Options) -> dict[str, Shard]:
    """Shards of this very plan that DEST holds already. Raises DataError where it was begun with another plan."""
    files, digest = store.files(), plan_digest(plans, options)
    before = _claim(store).get("plan")
    if before is None:
        _publish_claim(store, options, digest)
    elif before != digest:
        raise DataError(
            f"{store.url_of(PACK)}: DEST was packed from other images than SOURCE holds now; choose another DEST, or "
            "remove this one first"
        )
    finished = {}
    for plan in plans:
        tar, index = files.get(plan.name), files.get(plan.name.removesuffix(".tar") + ".idx")
        if tar is not None and index is not None:
            body = _read_index(store, plan.name)
            shard = known_shard(body, plan.name, options.source, tar.bytes, tar.etag, store.url)
            if shard is not None and shard.bucket == plan.bucket:
                finished[plan.name] = shard
    if finished:
        log.warning("%s: going on, %d of %d shards are finished", store.url, len(finished), len(plans))
    return finished


def _read_index(store: Store, name: str) -> bytes:
    return store.read(name.removesuffix(".tar") + ".idx")


def _publish_reports(store: Store, options: Options, shards: list[Shard], left_out: list[LeftOut]) -> None:
    lines = [json.dumps({"name": item.name, "reason": item.reason}, ensure_ascii=False) for item in left_out]
    path = store.scratch() / LEFT_OUT
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="replace")
    store.publish(path, LEFT_OUT)
    write_manifest(store.scratch(), options.source, options.encoding.channels, shards)
    store.publish(store.scratch() / MANIFEST, MANIFEST)


def _claim(store: Store) -> dict[str, Any]:
    return load_document(store.read(PACK), "twinflow-pack", store.url_of(PACK))


def _publish_claim(store: Store, options: Options, plan: str | None) -> None:
    """Write pack.json: what DEST is packed with."""
    path = store.scratch() / PACK
    claim = {"format": "twinflow-pack", "version": VERSION, "plan": plan, "options": asdict(options)}
    path.write_text(json.dumps(claim, indent=1) + "\n", encoding="utf-8")
    store.publish(path, PACK)


def _reasons(left_out: list[LeftOut]) -> str:
    counts = Counter(item.kind for item in left_out)
    return "left out: " + ("; ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "nothing")


def _report(shards: list[Shard], left_out: list[LeftOut], store: Store) -> None:
    buckets: dict[Bucket, list[Shard]] = {}
    for shard in shards:
        buckets.setdefault(shard.bucket, []).append(shard)
    print(f"{'bucket':>12} {'images':>10} {'shards':>7} {'MB':>10}")
    for bucket, members in buckets.items():
        images, size = sum(s.samples for s in members), sum(s.bytes for s in members)
        print(f"{bucket!s:>12} {images:>10} {len(members):>7} {size / 1e6:>10.1f}")
    print(f"packed {sum(shard.samples for shard in shards)} images; {_reasons(left_out)}")
    if left_out:
        print(f"each of them is named in {store.url_of(LEFT_OUT)}")
    print(f"wrote {store.url_of(MANIFEST)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=Path, help="folder of images, table, or tars")
    add("dest", help="folder or s3:// prefix, empty or begun by the same command")
    add("--name", help="name of the data set, default that of SOURCE")
    add("--resolution", type=int, default=512, help="root of a bucket's area [pixels] (%(default)s)")
    add("--bucket-step", type=int, default=64, help="sides are multiples of this [pixels] (%(default)s)")
    add("--max-aspect", type=float, default=2.0, help="longest bucket, longer / shorter side (%(default)s)")
    add("--min-side", type=int, default=0, help="leave out images with a shorter side [pixels]")
    add("--max-image-aspect", type=float, help="leave out images that are longer than this")
    add("--score-column", help="column of the table, or field of the .json, with a score")
    add("--min-score", type=float, help="leave out images with a lower score")
    add("--image-column", default=Columns().image, help="column of the table with the image's path (%(default)s)")
    add("--caption-column", help="column or field with the caption or a list of captions (captions, caption, text)")
    add(
        "--small-buckets",
        choices=("merge", "keep", "drop"),
        default="merge",
        help="into the nearest ratio (%(default)s)",
    )
    add("--min-bucket", type=int, default=256, help="images that a bucket has at least (%(default)s)")
    add("--channels", type=int, choices=(1, 3), default=3, help="1 grey, 3 RGB (%(default)s)")
    add("--format", choices=("jpg", "png", "webp"), default="jpg", help="of images that are resized (%(default)s)")
    add("--quality", type=int, default=95, help="of jpg and webp, 1..100 (%(default)s)")
    add("--shard-mb", type=float, default=192, help="shards have 2/3 to 4/3 of this [MB] (%(default)s)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; 0 none but this (%(default)s)")
    add("--endpoint-url", help="S3 endpoint of stores other than AWS")
    return parser


def _options(given: argparse.Namespace) -> Options:
    """Raises ValueError where options do not go together."""
    bucket_table(given.resolution, given.bucket_step, given.max_aspect)
    if (given.score_column is None) != (given.min_score is None):
        raise ValueError("--score-column and --min-score go together")
    if not 1 <= given.quality <= 100 or given.shard_mb <= 0 or given.workers < 0:
        raise ValueError("--quality is 1..100, --shard-mb above 0, --workers 0 or more")
    captions = (given.caption_column,) if given.caption_column else Columns().captions
    name = given.name or given.source.absolute().name.split(".")[0]
    return Options(
        source=re.sub(r"[^\w-]", "_", name, flags=re.ASCII) or "images",
        resolution=given.resolution,
        bucket_step=given.bucket_step,
        max_aspect=given.max_aspect,
        min_side=given.min_side,
        max_image_aspect=given.max_image_aspect,
        columns=Columns(given.image_column, captions, given.score_column),
        min_score=given.min_score,
        small_buckets=given.small_buckets,
        min_bucket=given.min_bucket,
        encoding=Encoding(given.channels, given.format, given.quality),
        shard_bytes=int(given.shard_mb * 1e6),
    )


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        options = _options(given)
    except ValueError as error:
        parser.error(str(error))
    try:
        store = open_store(given.dest, given.endpoint_url)
        if isinstance(store, LocalFolder) and store.path.is_relative_to(given.source.absolute()):
            raise DataError(f"{store.url}: lies in SOURCE; choose a DEST outside of it")
        _report(*pack(given.source, store, options, given.workers), store)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
