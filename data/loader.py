"""From global step to Batch: references of the order -> open shards -> decoded samples -> one rank's rows."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.batch import Batch, Replacement
from data.cache import ShardCache
from data.index import Index, parse_index
from data.manifest import Manifest, Shard
from data.order import Order
from data.s3 import READ_BUDGET_S, DataError, Folder, open_folder
from data.samples import Sample, SampleError, read_sample
from data.workers import Progress, obey, worker_context

log = logging.getLogger(__name__)

_INDEXES = 512
_PATIENCE_S = 2.0


class Loader:
    """Batches of this rank for global steps start_step .. steps - 1, in order; nothing about position is saved.

    rank, world_size: data-parallel position; the rank's rows are a contiguous part of the global batch.
    workers: loader processes (0: decode here); prefetch: batches that each prepares ahead; cache_dir, cache_gb: shard
    cache of the node for s3:// data; endpoint_url: S3 endpoint of stores other than AWS; read_budget_s: time that may be
    lost on one object before it is given up.
    Raises ValueError where world_size does not divide the global batch, DataError where a shard or index is missing
    or has another size than the manifest says; iteration raises DataError for data that cannot be read.

    last_wait_s, total_wait_s: seconds that the caller waited for the last batch, and for all of them.
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
        workers: int = 0,
        prefetch: int = 2,
        cache_dir: str | None = None,
        cache_gb: float = 50.0,
        endpoint_url: str | None = None,
        read_budget_s: float = READ_BUDGET_S,
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
        self.workers, self.prefetch = workers, prefetch
        self.last_wait_s = self.total_wait_s = 0.0
        cache = ShardCache(cache_dir, int(cache_gb * 1e9))
        self._dataset = _Steps(order, manifest, folders, cache, rank, world_size)
        if rank == 0:
            remote = any(folder.local_path("") is None for folder in folders.values())
            _report_lanes(order, manifest, cache.max_bytes if remote else None)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """Start the loader processes. Iteration raises DataError naming step and shard where data cannot be read or a
        loader process dies."""
        progress: Progress | None = None
        options: dict[str, Any] = {}
        if self.workers:
            context = worker_context()
            progress = Progress(context, self.workers)
            options = {
                "multiprocessing_context": context,
                "prefetch_factor": self.prefetch,
                "worker_init_fn": obey,
            }
        self._dataset.progress = progress
        loader = DataLoader(
            self._dataset,
            sampler=self.steps,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
        return self._batches(iter(loader), progress)

    def _batches(self, batches: Iterator[Batch | _Failure], progress: Progress | None) -> Iterator[Batch]:
        try:
            for step in self.steps:
                began = time.perf_counter()
                try:
                    batch = next(batches)
                except (RuntimeError, OSError, EOFError) as error:
                    raise self._explained(error, progress, step) from error
                self.last_wait_s = time.perf_counter() - began
                self.total_wait_s += self.last_wait_s
                if isinstance(batch, _Failure):
                    raise DataError(batch.message)
                for bad in batch.replaced:
                    place = f"step {step}, row {bad.row}, byte {bad.offset} of the shard"
                    log.warning("%s (%s); sample %s stands in", bad.reason, place, bad.stand_in)
                yield batch
        finally:
            # A traceback may hold this frame for long; the loader processes end now.
            del batches

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


@dataclass(frozen=True)
class _Failure:
    """A data error on its way out of a loader process, where an exception would arrive as a traceback in a text."""

    message: str


class _Steps(Dataset[Any]):
    """Item s is this rank's Batch of global step s."""

    def __init__(
        self,
        order: Order,
        manifest: Manifest,
        folders: dict[str, Folder],
        cache: ShardCache,
        rank: int,
        world_size: int,
    ) -> None:
        self.order, self.manifest, self.folders, self.cache, self.rank = order, manifest, folders, cache, rank
        rows = order.global_batch_size // world_size
        self.rows = range(rank * rows, (rank + 1) * rows)
        self.progress: Progress | None = None
        self._indexes: OrderedDict[int, Index] = OrderedDict()

    def __getitem__(self, step: int) -> Batch | _Failure:
        try:
            return self._batch(step)
        except DataError as error:
            return _Failure(f"rank {self.rank}, step {step}: {error}")

    def _batch(self, step: int) -> Batch:
        references = self.order.step(step, self.rows)
        samples: list[Sample | None] = [None] * len(self.rows)
        replaced: list[Replacement] = []
        for number in np.unique(references.shard).tolist():
            self._note(step, number)
            rows = np.flatnonzero(references.shard == number).tolist()
            wanted = references.index[rows].tolist()
            for row, (sample, bad) in zip(rows, self._samples(number, wanted), strict=True):
                samples[row] = sample
                replaced += [bad._replace(row=self.rows[row])] if bad else []
        found = [sample for sample in samples if sample is not None]
        assert len(found) == len(self.rows)
        shards = [self.manifest.shards[number] for number in references.shard.tolist()]
        return Batch(
            step=step,
            bucket=tuple(shards[0].bucket),
            rows=torch.arange(self.rows.start, self.rows.stop),
            pixels=torch.from_numpy(np.stack([sample.pixels for sample in found])),
            captions=tuple(sample.caption for sample in found),
            keys=tuple(sample.key for sample in found),
            shards=tuple(shard.name for shard in shards),
            own_epochs=tuple(references.own_epoch.tolist()),
            replaced=tuple(sorted(replaced)),
        )

    def _samples(self, number: int, indices: list[int]) -> Iterator[tuple[Sample, Replacement | None]]:
        shard, index = self.manifest.shards[number], self._index(number)
        folder, version = self.folders[shard.folder], shard.index_sha256
        with self.cache.open(folder, shard.name, shard.bytes, etag=shard.etag, version=version) as file:
            for i in indices:
                yield _decodable(file.fileno(), shard, index, i, self.manifest.channels)

    def _index(self, number: int) -> Index:
        if number in self._indexes:
            self._indexes.move_to_end(number)
            return self._indexes[number]
        shard = self.manifest.shards[number]
        folder = self.folders[shard.folder]
        with self.cache.open(folder, shard.index_name, shard.index_bytes, version=shard.index_sha256) as file:
            self._indexes[number] = parse_index(file.read(), shard)
        if len(self._indexes) > _INDEXES:
            self._indexes.popitem(last=False)
        return self._indexes[number]

    def _note(self, step: int, shard: int) -> None:
        if (worker := get_worker_info()) is not None and self.progress is not None:
            self.progress.note(worker.id, step, shard)


def _decodable(file: int, shard: Shard, index: Index, wanted: int, channels: int) -> tuple[Sample, Replacement | None]:
    """Sample `wanted` or the next one of its shard that can be decoded, wrapping: a function of the shard alone."""
    failure: SampleError | None = None
    for number in [*range(wanted, shard.samples), *range(wanted)]:
        try:
            sample = read_sample(file, shard, index, number, channels)
        except SampleError as error:
            failure = failure or error
            continue
        if failure is None:
            return sample, None
        key, offset = index.keys[wanted], min((o for o, _ in index.members(wanted).values()), default=0)
        return sample, Replacement(0, shard.name, key, offset, sample.key, str(failure))
    raise DataError(f"none of the {shard.samples} samples of {shard.url} can be decoded; the first tried: {failure}")


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


def _report_lanes(order: Order, manifest: Manifest, cache_bytes: int | None) -> None:
    """Log what is read side by side; cache_bytes: ceiling of the shard cache where the data needs it."""
    live = 0
    for stream, lanes in zip(order.streams, order.lanes, strict=True):
        log.info("stream %s: %d samples in %d shards, %d lanes", stream.name, stream.total, len(stream.shards), lanes)
        live += lanes * max(manifest.shards[n].bytes for n in stream.shards.tolist())
    if cache_bytes is not None and live > cache_bytes:
        log.warning(
            "up to %.1f GB of shards are read side by side but the shard cache holds %.1f GB, so that shards may be "
            "fetched again; raise data.cache_gb or lower data.lanes",
            live / 1e9,
            cache_bytes / 1e9,
        )
