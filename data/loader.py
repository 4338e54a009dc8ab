"""From global step to Batch: loader processes read and decode (data/steps.py), one process a node looks ahead."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from data.ahead import LookAhead
from data.batch import Batch
from data.cache import ShardCache
from data.manifest import Manifest, Shard
from data.order import Order
from data.reach import Reach, reach
from data.s3 import READ_BUDGET_S, DataError, Folder, open_folder
from data.steps import Failure, RawBatch, Read, Steps
from data.workers import Companion, Progress, obey, worker_context

log = logging.getLogger(__name__)

_PATIENCE_S = 2.0
# A hand-over between processes takes half a millisecond, whatever it holds: where the prefetch is deep, several steps
# share one. A loader process still has so many hand-overs ahead.
_HAND_OVERS = 8


class Loader:
    """Batches of this rank for global steps start_step .. steps - 1, in order; nothing about position is saved.

    rank, world_size: data-parallel position; the rank's rows are a contiguous part of the global batch.
    local_world_size: ranks of this node, which share its cache and look-ahead; their numbers follow each other.
    workers: loader processes (0: decode here, with no look-ahead); prefetch, prefetch_gb: batches that each prepares
    ahead, and the bytes that all of them may hold [GB]; cache_dir, cache_gb: shard cache of the node for s3:// data;
    fetch_threads: that download for the node, or for each loader process where members are read by ranges;
    endpoint_url: S3 endpoint of stores other than AWS; read_budget_s: time that may be lost on one object before it is
    given up; flip: mirror images, as drawn for each sample in each own epoch.
    Raises ValueError where world_size does not divide the global batch or a batch exceeds prefetch_gb, DataError where
    a shard or index is missing or has another size than the manifest says; iteration raises DataError for data that
    cannot be read.

    reach: what this node reads of remote data and how.
    """

    def __init__(
        self,
        order: Order,
        manifest: Manifest,
        *,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        local_world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        prefetch_gb: float = 4.0,
        fetch_threads: int = 8,
        cache_dir: str | None = None,
        cache_gb: float = 50.0,
        endpoint_url: str | None = None,
        read_budget_s: float = READ_BUDGET_S,
        flip: bool = False,
    ) -> None:
        if order.manifest_digest != manifest.digest:
            raise ValueError("the order was made from another manifest than the loader reads")
        if not 0 <= rank < world_size or order.global_batch_size % world_size:
            raise ValueError(
                f"rank {rank} of {world_size} cannot take an equal part of train.global_batch_size="
                f"{order.global_batch_size}; take a batch size that is a multiple of the number of ranks"
            )
        folders = {
            url: open_folder(url, endpoint_url, read_budget_s) for url in {shard.folder for shard in manifest.shards}
        }
        for folder in folders.values():
            # Listing a large remote folder takes many requests, and one rank that fails stops all.
            if rank == 0 or folder.local_path("") is not None:
                _check_present(folder, [shard for shard in manifest.shards if folder is folders[shard.folder]])
        self.steps = range(start_step, steps)
        self.workers = workers
        self.prefetch = _prefetch(manifest, order.global_batch_size // world_size, workers, prefetch, prefetch_gb)
        cache = ShardCache(cache_dir, int(cache_gb * 1e9), fetch_threads)
        remote = {url for url, folder in folders.items() if folder.local_path("") is None}
        node, self._leads = divmod(rank, local_world_size)[0], rank % local_world_size == 0
        of_node = order.global_batch_size // world_size * local_world_size
        rows = range(node * of_node, min((node + 1) * of_node, order.global_batch_size))
        self.reach: Reach = reach(order, manifest, remote, rows, self.steps, cache.max_bytes)
        self._dataset = Steps(order, manifest, folders, cache, rank, world_size, flip, self.reach.ranged, steps)
        if rank == 0:
            for stream, lanes in zip(order.streams, order.lanes, strict=True):
                shards = len(stream.shards)
                log.info("stream %s: %d samples in %d shards, %d lanes", stream.name, stream.total, shards, lanes)
        if remote and self._leads:
            log.info("%s", self.reach)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """Start the loader processes. Iteration raises DataError naming step and shard where data cannot be read or a
        loader process dies."""
        return self._start(None)

    def raw(self, read: Read) -> Iterator[RawBatch]:
        """The same rows without decoding: `read` makes of each what a RawBatch then holds, in the loader process."""
        return self._start(read)

    def _start(self, read: Read | None) -> Iterator[Any]:
        progress, look_ahead, together = None, None, 1
        options: dict[str, Any] = {}
        if self.workers:
            context = worker_context()
            progress = Progress(context, self.workers)
            together = max(1, self.prefetch // _HAND_OVERS)
            options = {
                "multiprocessing_context": context,
                "prefetch_factor": self.prefetch // together,
                "worker_init_fn": obey,
            }
            look_ahead = self._look_ahead(context)
        self._dataset.progress, self._dataset.read, self._dataset.together = progress, read, together
        loader = DataLoader(
            self._dataset,
            sampler=self.steps,
            batch_size=together,
            collate_fn=list,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
        return self._batches(itertools.chain.from_iterable(loader), progress, look_ahead)

    def _look_ahead(self, context: Any) -> Companion | None:
        """The process that fetches shards for this node; None where another rank has it or whole shards are not used."""
        if not self._leads or not self.reach.touched or self.reach.ranged or not self.steps:
            return None
        data = self._dataset
        ahead = self.workers * self.prefetch
        work = LookAhead(data.order, data.manifest, data.folders, data.cache, self.reach, self.steps, ahead)
        return Companion(context, work.run, self.steps.start)

    def _batches(
        self, batches: Iterator[Any], progress: Progress | None, look_ahead: Companion | None
    ) -> Iterator[Batch | RawBatch]:
        try:
            for step in self.steps:
                try:
                    batch = next(batches)
                except (RuntimeError, OSError, EOFError) as error:
                    raise self._explained(error, progress, step) from error
                if isinstance(batch, Failure):
                    raise DataError(batch.message)
                if look_ahead is not None and not look_ahead.tell(step):
                    log.warning("the look-ahead process died; shards are fetched when they are needed")
                    look_ahead = None
                for bad in batch.replaced if isinstance(batch, Batch) else ():
                    place = f"step {step}, row {bad.row}, byte {bad.offset} of the shard"
                    log.warning("%s (%s); sample %s stands in", bad.reason, place, bad.stand_in)
                yield batch
        finally:
            # A traceback may hold this frame for long; the loader processes end now.
            del batches
            if look_ahead is not None:
                look_ahead.end()

    def _explained(self, error: Exception, progress: Progress | None, step: int) -> Exception:
        """The error itself, or what a loader process that died was doing."""
        # A batch that the dead process had ready shows as a broken connection: its memory is handed over on arrival.
        broken = isinstance(error, OSError | EOFError) or "exited unexpectedly" in str(error)
        if progress is None or not broken:
            return error
        dead = progress.dead(_PATIENCE_S)
        shards = self._dataset.manifest.shards
        said = [f"process {r.pid} at step {r.step}, shard {shards[r.shard].url}" for r in dead]
        return DataError(
            f"rank {self._dataset.rank}: a loader process died while step {step} was awaited "
            f"({'; '.join(said) or 'before its first sample'}); most often the machine ran out of memory: "
            "lower data.workers or data.prefetch, and look at the kernel's log (dmesg)"
        )


def _check_present(folder: Folder, shards: list[Shard]) -> None:
    sizes = folder.sizes()
    expected = {s.name: s.bytes for s in shards} | {s.index_name: s.index_bytes for s in shards}
    missing = sorted(name for name in expected if name not in sizes)
    wrong = sorted(name for name in expected if name in sizes and sizes[name] != expected[name])
    if missing:
        raise DataError(
            f"{folder.url_of(missing[0])}: missing, with {len(missing) - 1} more of {len(expected)} files that the "
            "manifest names; finish the copy, or write the manifest again"
        )
    if wrong:
        raise DataError(
            f"{folder.url_of(wrong[0])}: {sizes[wrong[0]]} bytes where the manifest says {expected[wrong[0]]} "
            f"({len(wrong)} such files); copy it again, or write the manifest again"
        )


def _prefetch(manifest: Manifest, rows: int, workers: int, most: int, gigabytes: float) -> int:
    """Batches that each loader process may hold ready: at most `most`, and all of them at most `gigabytes`."""
    batch = _batch_bytes(manifest, rows)
    if workers and workers * batch > gigabytes * 1e9:
        raise ValueError(
            f"{workers} loader processes with a batch of {batch / 1e9:.3g} GB each exceed "
            f"data.prefetch_gb={gigabytes:g}; raise it, or lower data.workers"
        )
    return max(1, min(most, int(gigabytes * 1e9 / (workers * batch)))) if workers else most


def _batch_bytes(manifest: Manifest, rows: int) -> int:
    """Bytes of the largest batch of `rows` samples: float32 pixels, or what is stored in their place."""
    largest = 0
    for shard in manifest.shards:
        pixels = 0
        if manifest.encoded is None and manifest.contents.has_targets:
            sides = (shard.bucket, shard.source_bucket) if shard.source_bucket else (shard.bucket,)
            pixels = sum(4 * manifest.channels * height * width for height, width in sides)
        largest = max(largest, pixels or shard.bytes // shard.samples)
    return rows * largest
