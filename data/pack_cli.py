"""The command line of packing: its options and its report, for `data.pack` and for whoever gives it encoders."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data.buckets import Sizes, bucket_table
from data.contents import KINDS
from data.images import Encoding
from data.manifest import Shard
from data.shards import LeftOut, Options
from data.sources import Columns


def reasons(left_out: Sequence[LeftOut]) -> str:
    """How many items were left out, and why."""
    counts = Counter(item.kind for item in left_out)
    return "left out: " + ("; ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "nothing")


def report(
    shards: Sequence[Shard], left_out: Sequence[LeftOut], kind: str, left_out_url: str, manifest_url: str
) -> None:
    """Print what was packed."""
    buckets: dict[Sizes, list[Shard]] = {}
    for shard in shards:
        buckets.setdefault(Sizes(shard.bucket, shard.source_bucket), []).append(shard)
    print(f"{'bucket':>12} {kind:>10} {'shards':>7} {'MB':>10}")
    for sizes, members in buckets.items():
        count, size = sum(s.samples for s in members), sum(s.bytes for s in members)
        print(f"{sizes!s:>12} {count:>10} {len(members):>7} {size / 1e6:>10.1f}")
    print(f"packed {sum(shard.samples for shard in shards)} {kind}; {reasons(left_out)}")
    if left_out:
        print(f"each of them is named in {left_out_url}")
    print(f"wrote {manifest_url}")


def _local(source: str) -> Path:
    if "://" in source:
        raise argparse.ArgumentTypeError(
            f"{source} is not on this machine; copy it here first (tars in a bucket become usable where they are: "
            "twinflow data index)"
        )
    return Path(source)


def command_line(program: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=_local, help="folder of images or captions, table, or tars, on this machine")
    add("dest", help="folder or s3:// prefix, empty or begun by the same command")
    add("--kind", choices=KINDS, default=KINDS[0], help="captions: alone; edits: with source images (%(default)s)")
    add("--name", help="name of the data set, default that of SOURCE")
    add("--resolution", type=int, default=512, help="root of a bucket's area [pixels] (%(default)s)")
    add("--bucket-step", type=int, default=64, help="sides are multiples of this [pixels] (%(default)s)")
    add("--max-aspect", type=float, default=2.0, help="longest bucket, longer / shorter side (%(default)s)")
    add("--min-side", type=int, default=0, help="leave out images with a shorter side [pixels]")
    add("--max-image-aspect", type=float, help="leave out images that are longer than this")
    add("--score-column", help="column of the table, or field of the .json, with a score")
    add("--min-score", type=float, help="leave out images with a lower score")
    add("--image-column", default=Columns().image, help="column of the table with the image's path (%(default)s)")
    add("--source-column", default=Columns().source, help="column with the path of an edit's source (%(default)s)")
    add(
        "--caption-column",
        help="column or field with the caption or a list of captions (captions, caption, text, instruction)",
    )
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


def options_of(given: argparse.Namespace) -> Options:
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
        columns=Columns(given.image_column, captions, given.score_column, given.source_column),
        min_score=given.min_score,
        small_buckets=given.small_buckets,
        min_bucket=given.min_bucket,
        encoding=Encoding(given.channels, given.format, given.quality),
        shard_bytes=int(given.shard_mb * 1e6),
        kind=given.kind,
    )
