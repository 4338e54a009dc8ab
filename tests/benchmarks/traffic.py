"""Bytes that a data set costs per epoch, and shards read side by side: python -m tests.benchmarks.traffic [--quick]

Nodes are simulated one after the other, each with its own cache and two ranks that step together, each rank with a
loader process, the first with the look-ahead process. They read an epoch into empty caches from rclone through a proxy
that counts the bytes of the store's responses, headers and indexes included (listing and manifest are not). Bar, over
all nodes: 1.1 x data set + 2 shards x nodes x streams. Live: shards that a node has begun and not finished, at most, by
the keys that it was given; the reader's plan says the number before. The last line is JSON; exit status 1 where a row is
not ok.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data.buckets import Bucket
from data.loader import Loader
from data.manifest import Manifest, read_manifest
from data.order import Order
from data.steps import RawBatch
from tests.benchmarks.reading import BUCKET, read_timed, set_credentials
from tests.data.fault_proxy import FaultProxy
from tests.data.rclone import RcloneServer
from tests.data.sets import raw_shards, write_set

SAMPLES, SAMPLE_BYTES = 16, 65_000
GLOBAL_BATCH, RANKS = 64, 2
# Shards of every bucket; a shard holds SAMPLES samples.
SETS = {1: (96,), 9: (24, 16, 16, 12, 8, 8, 4, 4, 4)}
WASTE, SHARDS_MORE = 1.1, 2


@dataclass(frozen=True)
class Case:
    """lanes: None is the default of the order; cache: part of the set that a node's cache holds."""

    buckets: int
    nodes: int
    cache: str
    lanes: int | None


@dataclass(frozen=True)
class Result:
    """megabytes: downloaded by all nodes; live, planned: of the node with the most live shards."""

    case: Case
    ranged: int
    megabytes: float
    bar_megabytes: float
    requests: int
    live: int
    planned: int
    complete: bool
    seconds: float

    @property
    def ok(self) -> bool:
        return self.complete and self.megabytes <= self.bar_megabytes and self.live <= self.planned


class Store:
    """The data set of one number of buckets behind a counting proxy."""

    def __init__(self, folder: Path, buckets: int, stack: contextlib.ExitStack) -> None:
        sizes = [Bucket(8, 8 + n) for n, shards in enumerate(SETS[buckets]) for _ in range(shards)]
        write_set(folder / BUCKET, raw_shards(len(sizes), SAMPLES, SAMPLE_BYTES), sizes)
        server = stack.enter_context(RcloneServer(folder))
        self.proxy = stack.enter_context(FaultProxy(server.port))
        self.manifest: Manifest = read_manifest(f"s3://{BUCKET}", self.proxy.endpoint_url)
        self.largest = max(shard.bytes for shard in self.manifest.shards)
        self.bytes = sum(shard.bytes for shard in self.manifest.shards)

    def counted(self) -> tuple[int, int]:
        """(bytes, GETs) of tars and indexes so far."""
        wanted = [path for path in self.proxy.gets if path.partition("?")[0].endswith((".tar", ".idx"))]
        return sum(self.proxy.passed[path] for path in wanted), sum(self.proxy.gets[path] for path in wanted)


def read_node(store: Store, order: Order, case: Case, node: int, cache: Path) -> tuple[list[RawBatch], Loader]:
    """An epoch of one node's ranks, step by step together; its batches and one of its loaders."""
    part = {"full": 1.0, "third": 1 / 3}[case.cache]
    indexes = sum(shard.index_bytes for shard in store.manifest.shards)
    loaders = [
        Loader(
            order,
            store.manifest,
            steps=order.steps_through(0),
            rank=node * RANKS + local,
            world_size=case.nodes * RANKS,
            local_world_size=RANKS,
            workers=1,
            cache_dir=str(cache),
            cache_gb=(store.bytes + indexes) * part / 1e9 + 1e-9,
            endpoint_url=store.proxy.endpoint_url,
        )
        for local in range(RANKS)
    ]
    together = zip(*(loader.raw(read_timed) for loader in loaders), strict=True)
    return list(itertools.chain.from_iterable(together)), loaders[0]


def live_shards(batches: list[RawBatch], order: Order) -> int:
    """Most shards that these rows had begun and not finished between two steps, by the keys that came."""
    begun: dict[tuple[int, int, str], list[int]] = {}
    numbers = {id(stream): (n, order.global_batch_size // order.lanes[n]) for n, stream in enumerate(order.streams)}
    for batch in batches:
        stream, width = numbers[id(order.stream(batch.step))]
        for row, key in zip(batch.rows, batch.keys, strict=True):
            begun.setdefault((stream, row // width, key.split("-")[0]), []).append(batch.step)
    ends = [(min(steps), max(steps), shard) for (_, _, shard), steps in begun.items()]
    last = max(end for _, end, _ in ends)
    return max(len({shard for first, end, shard in ends if first <= step < end}) for step in range(last + 1))


def measure(store: Store, case: Case, folder: Path) -> Result:
    order = Order(store.manifest, seed=1, global_batch_size=GLOBAL_BATCH, lanes=case.lanes)
    (bytes_before, gets_before), began = store.counted(), time.monotonic()
    keys: list[str] = []
    ranged, live, planned = 0, 0, 0
    for node in range(case.nodes):
        cache = folder / f"cache-{node}"
        batches, loader = read_node(store, order, case, node, cache)
        shutil.rmtree(cache)
        keys += [key for batch in batches for key in batch.keys]
        ranged += loader.reach.ranged
        found = live_shards(batches, order)
        live, planned = max((live, planned), (found, loader.reach.shards))
    seconds = time.monotonic() - began
    (bytes_after, gets_after) = store.counted()
    bar = WASTE * store.bytes + SHARDS_MORE * store.largest * case.nodes * len(order.streams)
    return Result(
        case=case,
        ranged=ranged,
        megabytes=(bytes_after - bytes_before) / 1e6,
        bar_megabytes=bar / 1e6,
        requests=gets_after - gets_before,
        live=live,
        planned=planned,
        complete=len(set(keys)) == len(keys) == order.steps_through(0) * GLOBAL_BATCH,
        seconds=seconds,
    )


def cases(quick: bool) -> Iterator[Case]:
    for buckets, nodes, cache in itertools.product((1, 9), (1, 2, 8), ("full", "third")):
        if not quick or nodes < 8:
            yield Case(buckets, nodes, cache, None)
        if cache == "third" and (not quick or nodes == 2):
            yield Case(buckets, nodes, cache, 8)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.traffic", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 2 nodes only")
    quick = parser.parse_args().quick
    logging.getLogger("data").setLevel(logging.WARNING)
    set_credentials()
    results = []
    print(
        f"{'buckets':>7} {'nodes':>5} {'cache':>6} {'lanes':>7} {'by ranges':>9} {'MB':>8} {'x set':>6} {'bar MB':>8} ",
        end="",
    )
    print(f"{'requests':>8} {'live':>5} {'planned':>7} {'s':>6}  ok")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="traffic-")))
        stores = {buckets: Store(folder / str(buckets), buckets, stack) for buckets in SETS}
        for case in cases(quick):
            store = stores[case.buckets]
            r = measure(store, case, folder)
            results.append(r)
            way, lanes = f"{r.ranged} of {case.nodes}", case.lanes or "default"
            print(f"{case.buckets:>7} {case.nodes:>5} {case.cache:>6} {lanes:>7} {way:>9} {r.megabytes:>8.1f} ", end="")
            print(f"{r.megabytes * 1e6 / store.bytes:>6.3f} {r.bar_megabytes:>8.1f} {r.requests:>8} ", end="")
            print(f"{r.live:>5} {r.planned:>7} {r.seconds:>6.1f}  {r.ok}", flush=True)
    ok = all(r.ok for r in results)
    rows = [asdict(r) | {"ok": r.ok} for r in results]
    print(json.dumps({"benchmark": "traffic", "ok": ok, "rows": rows}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
