"""python -m data.pack SOURCE DEST: images and captions -> WebDataset shards in aspect-ratio buckets, with a manifest.

SOURCE: a folder of images with .txt (or .json) captions beside them; a table metadata.jsonl, .csv or .parquet with the
columns file_name and caption, or the folder that holds it; or WebDataset tars. --kind captions packs captions alone
(.txt files, one file with a caption a line, or a table), --kind edits source image, image and instruction
(<name>.source.png, <name>.png, <name>.txt; or columns source, file_name, instruction). DEST: a folder or s3:// prefix.
The same command goes on with a packing that was killed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.buckets import Bucket, Sizes
from data.ending import exit_status
from data.index import known_shard, parse_index
from data.manifest import MANIFEST, VERSION, Shard, load_document, write_manifest
from data.members import Encode
from data.pack_cli import command_line, options_of, reasons, report
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
from data.sources import Item, list_items
from data.store import Store, open_store, sole_writer

log = logging.getLogger(__name__)

PACK = "pack.json"
LEFT_OUT = "left_out.jsonl"
_CHUNK = 256
_CALIBRATION = 16


@dataclass
class Packing:
    """A packing under way. plans: all shards to be; finished: those that DEST holds, by name."""

    source: Path
    store: Store
    options: Options
    plans: list[ShardPlan]
    finished: dict[str, Shard]
    left_out: list[LeftOut]

    @property
    def todo(self) -> list[ShardPlan]:
        return [plan for plan in self.plans if plan.name not in self.finished]

    def add(self, plan: ShardPlan, shard: Shard | None, undecodable: Sequence[LeftOut]) -> None:
        """Note a shard that was made, or that nothing of it could be decoded."""
        for item in undecodable:
            log.warning("%s: left out: %s", item.name, item.reason)
        self.left_out += [item._replace(reason=item.kind) for item in undecodable]
        if shard is not None:
            self.finished[plan.name] = shard

    def publish(self) -> tuple[list[Shard], list[LeftOut]]:
        """Write the list of what was left out and the manifest. Raises DataError where nothing is left to pack."""
        shards = [self.finished[plan.name] for plan in self.plans if plan.name in self.finished]
        if not shards:
            raise DataError(f"{self.source}: nothing is left to pack; {reasons(self.left_out)}")
        self.left_out.sort()
        _publish_reports(self.store, self.options, shards, self.left_out)
        return shards, self.left_out


def pack(
    source: Path, store: Store, options: Options, workers: int = 0, encode: Encode | None = None
) -> tuple[list[Shard], list[LeftOut]]:
    """Pack all of `source` and return the shards and what was left out; the manifest appears last.

    encode: makes what is stored of every sample beside its captions (options.encoded says what), in this process.
    Raises DataError where the source cannot be read, DEST holds something else or cannot be written.
    """
    with sole_writer(store), Pool(workers) as pool:
        packing = prepare(source, store, options, pool, encode)
        todo = packing.todo
        with contextlib.ExitStack() as own:
            makers = pool if encode is None else own.enter_context(Pool(0))
            for number, made in make_all(todo, options, store, makers, encode):
                packing.add(todo[number], *made)
        return packing.publish()


def make_all(
    plans: Sequence[ShardPlan], options: Options, store: Store, pool: Pool, encode: Encode | None
) -> Iterator[tuple[int, tuple[Shard | None, list[LeftOut]]]]:
    """Make shards; (number of the plan, what was made) as they are finished."""
    tasks, items = [(plan, options, store) for plan in plans], sum(len(plan.items) for plan in plans)
    maker = make_shard if encode is None else functools.partial(make_shard, encode=encode)
    return pool.each(maker, tasks, "packing" if encode is None else "encoding", items)


def prepare(source: Path, store: Store, options: Options, pool: Pool, encode: Encode | None = None) -> Packing:
    """Claim DEST and plan its shards. Raises DataError as `pack` does."""
    items = list_items(source, options.columns, options.kind)
    _begin(store, options)
    plans, left_out = _plan(pool, items, options, encode)
    finished = _finished(store, plans, options)
    for plan in plans:
        if plan.name in finished:
            left_out += left_out_of(plan, parse_index(_read_index(store, plan.name), finished[plan.name]).keys)
    return Packing(source, store, options, plans, finished, left_out)


def _plan(
    pool: Pool, items: list[Item], options: Options, encode: Encode | None
) -> tuple[list[ShardPlan], list[LeftOut]]:
    """The shards, from headers and captions alone but for a few images per bucket that tell their encoded size."""
    chunks = [(items[n : n + _CHUNK], options) for n in range(0, len(items), _CHUNK)]
    parts: dict[int, list[Seen]] = dict(pool.each(look, chunks, "looking", len(items)))
    seen = [one for number in range(len(chunks)) for one in parts[number]]
    left_out = [one.left_out for one in seen if one.left_out is not None]
    members, in_small = assign(seen, [item.name for item in items], options)
    buckets = [(sizes, [(n, items[n]) for n in numbers]) for sizes, numbers in members.items()]
    few = [([item for _, item in _spread(members)], sizes, options) for sizes, members in buckets]
    if encode is None:
        means = dict(pool.each(mean_bytes, few, "measuring", sum(len(task[0]) for task in few)))
    else:
        means = {number: mean_bytes(task, encode) for number, task in enumerate(few)}
    known = [mean for mean in means.values() if mean is not None]
    fallback = max(known, default=float(options.resolution**2))
    plans = [
        plan
        for number, (sizes, numbered) in enumerate(buckets)
        for plan in divide(sizes, numbered, means[number] or fallback, options)
    ]
    _warn_enlarged([(seen[n].sizes.image, sizes.image) for sizes, numbers in members.items() for n in numbers])
    return plans, left_out + in_small


def _warn_enlarged(sizes: list[tuple[Bucket, Bucket]]) -> None:
    if enlarged := sum(own.height < bucket.height or own.width < bucket.width for own, bucket in sizes):
        log.warning(
            "%d of %d images are smaller than their bucket and are enlarged; see --min-side", enlarged, len(sizes)
        )


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
            if shard is not None and Sizes(shard.bucket, shard.source_bucket) == plan.sizes:
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
    channels = options.encoding.channels
    write_manifest(store.scratch(), options.source, channels, shards, options.kind, options.encoded)
    store.publish(store.scratch() / MANIFEST, MANIFEST)


def _claim(store: Store) -> dict[str, Any]:
    return load_document(store.read(PACK), "twinflow-pack", store.url_of(PACK))


def _publish_claim(store: Store, options: Options, plan: str | None) -> None:
    """Write pack.json: what DEST is packed with."""
    path = store.scratch() / PACK
    claim = {"format": "twinflow-pack", "version": VERSION, "plan": plan, "options": asdict(options)}
    path.write_text(json.dumps(claim, indent=1) + "\n", encoding="utf-8")
    store.publish(path, PACK)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = command_line("python -m data.pack", __doc__)
    given = parser.parse_args(arguments)
    try:
        options = options_of(given)
    except ValueError as error:
        parser.error(str(error))

    def work() -> int:
        store = open_store(given.dest, given.endpoint_url)
        if isinstance(store, LocalFolder) and store.path.is_relative_to(given.source.absolute()):
            raise DataError(f"{store.url}: lies in SOURCE; choose a DEST outside of it")
        made = pack(given.source, store, options, given.workers)
        report(*made, options.kind, store.url_of(LEFT_OUT), store.url_of(MANIFEST))
        return 0

    return exit_status(work, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
