"""Speed of the reader against bare tools: python -m tests.benchmarks.stream [--quick]

Cold: MB/s of an epoch through the loader into an empty cache, without decoding, from the reservation of the first tar to
the last batch, against boto3's download_file of the same tars from the same server (rclone) to the same disk, in two
manners: objects side by side with one thread each, or one after the other with as many threads each; the faster one
counts. boto3 has as many threads as the reader can have: LOOK_AHEAD, and one for each part of a tar that the loader
process waits for. Warm: MB/s of reading all members from the cache in loader processes, by the clock in them and while
all of them are at it, against os.pread of the same members in the same order and in as many processes. Sides take turns;
medians count.
Counted through a proxy: requests per sample, and bytes of tar responses (with headers) over bytes of members used,
for whole shards and for members read by ranges. The last line is JSON; exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from data.cache import ShardCache, tar_of
from data.index import parse_index
from data.loader import Loader
from data.manifest import Manifest, read_manifest
from data.order import Order
from data.s3 import open_folder
from tests.benchmarks.reading import BUCKET, Read, pread_members, read_timed, set_credentials
from tests.data.fault_proxy import FaultProxy
from tests.data.rclone import RcloneServer
from tests.data.sets import raw_shards, write_set

COLD, WARM, FETCHED = 0.9, 0.8, 1.02
GLOBAL_BATCH, PROCESSES = 32, 2
LOOK_AHEAD, THREADS = 3, 5
SAMPLE_BYTES = 800_000


@dataclass(frozen=True)
class Size:
    shards: int
    samples: int
    repeats: int
    warm_epochs: int


class Bench:
    """The set on disk, in a store, and the loaders that read it."""

    def __init__(self, folder: Path, size: Size, stack: contextlib.ExitStack) -> None:
        self.folder, self.size = folder, size
        write_set(folder / "served" / BUCKET, raw_shards(size.shards, size.samples, SAMPLE_BYTES))
        server = stack.enter_context(RcloneServer(folder / "served"))
        self.endpoint_url, self.proxy = server.endpoint_url, stack.enter_context(FaultProxy(server.port))
        self.manifest: Manifest = read_manifest(f"s3://{BUCKET}", self.endpoint_url)
        self.order = Order(self.manifest, seed=1, global_batch_size=GLOBAL_BATCH, lanes=4)
        self.bytes = sum(shard.bytes for shard in self.manifest.shards)

    def loader(
        self, cache: Path, endpoint_url: str, workers: int = 1, epochs: int = 1, cache_gb: float = 50.0
    ) -> Loader:
        return Loader(
            self.order,
            self.manifest,
            steps=self.order.steps_through(epochs - 1),
            workers=workers,
            prefetch=16,
            fetch_threads=LOOK_AHEAD,
            cache_dir=str(cache),
            cache_gb=cache_gb,
            endpoint_url=endpoint_url,
        )

    def cold(self, cache: Path) -> float:
        """MB/s of an epoch through the loader into an empty cache."""
        largest, reserved = min(shard.bytes for shard in self.manifest.shards), threading.Event()
        began = [0.0]

        def watch() -> None:
            while not reserved.is_set():
                with contextlib.suppress(FileNotFoundError):
                    if any(entry.stat().st_size >= largest for entry in os.scandir(cache)):
                        began[0] = time.monotonic()
                        return
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        used = sum(row.bytes for batch in self.loader(cache, self.endpoint_url).raw(read_timed) for row in batch.made)
        seconds = time.monotonic() - began[0]
        watcher.join()
        assert used > 0.95 * self.bytes
        return self.bytes / seconds / 1e6

    def download(self, target: Path, side_by_side: bool) -> float:
        """MB/s of boto3's download_file."""
        client = boto3.client("s3", endpoint_url=self.endpoint_url)
        config = TransferConfig(use_threads=not side_by_side, max_concurrency=THREADS)
        target.mkdir()
        began = time.monotonic()
        with ThreadPoolExecutor(THREADS if side_by_side else 1) as pool:
            list(
                pool.map(
                    lambda s: client.download_file(BUCKET, s.name, str(target / s.name), Config=config),
                    self.manifest.shards,
                )
            )
        return self.bytes / (time.monotonic() - began) / 1e6

    def warm(self, cache: Path) -> float:
        """MB/s of all members through loader processes from a filled cache."""
        loader = self.loader(cache, self.endpoint_url, PROCESSES, self.size.warm_epochs)
        return _rate([row for batch in loader.raw(read_timed) for row in batch.made])

    def pread(self, cache: Path) -> float:
        """MB/s of os.pread of the same members in the same order, steps dealt to processes as the loader deals them."""
        places = ShardCache(str(cache), 0)
        folders = {url: open_folder(url, self.endpoint_url) for url in {s.folder for s in self.manifest.shards}}
        shards = self.manifest.shards
        paths = [str(places.path(tar_of(shard, folders))) for shard in shards]
        served = self.folder / "served" / BUCKET
        indexes = [parse_index((served / shard.index_name).read_bytes(), shard) for shard in shards]
        work: list[list[tuple[str, int, int]]] = [[] for _ in range(PROCESSES)]
        for step in range(self.order.steps_through(self.size.warm_epochs - 1)):
            references = self.order.step(step)
            for number, sample in zip(references.shard.tolist(), references.index.tolist(), strict=True):
                for offset, size in indexes[number].members(sample).values():
                    work[step % PROCESSES].append((paths[number], offset, size))
        with contextlib.ExitStack() as stack:
            spawn = multiprocessing.get_context("spawn")
            pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in work]
            for pool, part in zip(pools, work, strict=True):
                pool.submit(pread_members, part[:1]).result()  # started, and imports done
            parts = [pool.submit(pread_members, part) for pool, part in zip(pools, work, strict=True)]
            return _rate([read for part in parts for read in part.result()])

    def counted(self, cache: Path, cache_gb: float) -> tuple[float, float, bool]:
        """Requests per sample, bytes of tar responses over bytes used, and whether members were read by ranges."""
        self.proxy.gets.clear()
        self.proxy.passed.clear()
        loader = self.loader(cache, self.proxy.endpoint_url, cache_gb=cache_gb)
        rows = [row for batch in loader.raw(read_timed) for row in batch.made]
        tars = sum(count for path, count in self.proxy.passed.items() if ".tar" in path)
        gets = sum(count for path, count in self.proxy.gets.items() if ".tar" in path or ".idx" in path)
        return gets / len(rows), tars / sum(row.bytes for row in rows), loader.reach.ranged


def _rate(reads: list[Read]) -> float:
    """MB/s while all processes read."""
    of = {pid: [read for read in reads if read.pid == pid] for pid in {read.pid for read in reads}}
    assert len(of) == PROCESSES
    begin = max(min(read.begin for read in part) for part in of.values())
    end = min(max(read.end for read in part) for part in of.values())
    return sum(r.bytes for r in reads if r.begin >= begin and r.end <= end) / (end - begin) / 1e6


def medians(sides: dict[str, Callable[[Path], float]], folder: Path, repeats: int, fresh: bool) -> dict[str, float]:
    """Median of each side, which take turns. fresh: every run has an empty folder of its own."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
            if not fresh:
                found[name].append(side(folder))
                continue
            with tempfile.TemporaryDirectory(dir=folder) as place:
                found[name].append(side(Path(place) / "files"))
    for name, rates in found.items():
        print(
            f"  {name:<34} {statistics.median(rates):>8.0f} MB/s   ({', '.join(f'{r:.0f}' for r in rates)})", flush=True
        )
    return {name: statistics.median(rates) for name, rates in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stream", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the data, 3 repeats instead of 5")
    size = Size(16, 16, 3, 16) if parser.parse_args().quick else Size(64, 16, 5, 8)
    logging.getLogger("data").setLevel(logging.WARNING)
    set_credentials()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-")))
        bench = Bench(folder, size, stack)
        print(
            f"{size.shards} tars, {bench.bytes / 1e6:.0f} MB, members of {SAMPLE_BYTES / 1e3:.0f} kB\ncold, {THREADS} threads"
        )
        sides = {
            "loader": bench.cold,
            "download_file, objects in parallel": lambda path: bench.download(path, True),
            "download_file, parts in parallel": lambda path: bench.download(path, False),
        }
        cold = medians(sides, folder, size.repeats, fresh=True)
        whole = bench.counted(folder / "counted", 50.0)
        cache = folder / "cache"
        bench.cold(cache)
        print(f"warm, {PROCESSES} processes")
        warm = medians({"loader": bench.warm, "os.pread": bench.pread}, cache, size.repeats, fresh=False)
        ranged = bench.counted(folder / "small", bench.bytes / size.shards / 1e9)
    cold_ratio = cold["loader"] / max(rate for name, rate in cold.items() if name != "loader")
    warm_ratio = warm["loader"] / warm["os.pread"]
    for name, (requests, fetched, by_ranges) in (("whole shards", whole), ("ranges", ranged)):
        print(f"{name:<14} requests per sample {requests:.3f}, fetched / used {fetched:.4f}")
        assert by_ranges == (name == "ranges")
    print(f"cold {cold_ratio:.2f} of {COLD}, warm {warm_ratio:.2f} of {WARM}")
    ok = cold_ratio >= COLD and warm_ratio >= WARM and max(whole[1], ranged[1]) <= FETCHED
    figures = {"cold": cold, "warm": warm, "cold_ratio": cold_ratio, "warm_ratio": warm_ratio}
    print(json.dumps({"benchmark": "stream", "ok": ok, **figures, "whole": whole, "ranged": ranged}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
