"""What a loader process does: references of the order -> open shards -> decoded samples -> one rank's rows of a step."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from torch.utils.data import Dataset, get_worker_info

from data.batch import Batch, Replacement, collate
from data.cache import ShardCache, index_of, tar_of
from data.contents import Contents, Draw
from data.index import Index, parse_index
from data.manifest import Manifest, Shard
from data.order import Order, References
from data.parts import fetch_pool
from data.ranged import RangedShard, Source, WholeShard
from data.s3 import DataError, Folder
from data.samples import Sample, SampleError, read_sample
from data.workers import Progress

_INDEXES = 512
# Finding the references of a step costs some hundred microseconds, however few rows it has.
_ROWS_AT_ONCE = 2048

Read = Callable[[int, Shard, Index, int], Any]
"""Makes something of sample `int` of a shard open as file descriptor `int`; a function that processes can be sent."""


@dataclass(frozen=True)
class Failure:
    """A data error on its way out of a loader process, where an exception would arrive as a traceback in a text."""

    message: str


@dataclass(frozen=True)
class RawBatch:
    """What `read` made of the samples of some rows of a step, with their keys. rows: in the global batch."""

    step: int
    rows: range
    keys: tuple[str, ...]
    made: tuple[Any, ...]


class Steps(Dataset[Any]):
    """Item s is this rank's Batch of global step s, or its RawBatch where `read` is set.

    ranged: members are fetched in place of whole shards; stop: the step after the last. together: steps in a row that one
    loader process makes.
    """

    def __init__(
        self,
        order: Order,
        manifest: Manifest,
        folders: dict[str, Folder],
        cache: ShardCache,
        rank: int,
        world_size: int,
        flip: bool,
        ranged: bool,
        stop: int,
    ) -> None:
        self.order, self.manifest, self.folders, self.cache, self.rank = order, manifest, folders, cache, rank
        rows = order.global_batch_size // world_size
        self.rows = range(rank * rows, (rank + 1) * rows)
        self.flip, self.ranged, self.stop = flip, ranged, stop
        self.read: Read | None = None
        self.progress: Progress | None = None
        self.together = 1
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._files: dict[int, BinaryIO] = {}
        self._ahead: dict[int, References] = {}

    def __getitem__(self, step: int) -> Batch | RawBatch | Failure:
        try:
            return self._batch(step) if self.read is None else self._raw(step)
        except DataError as error:
            return Failure(f"rank {self.rank}, step {step}: {error}")

    def _batch(self, step: int) -> Batch:
        references = self._references(step)
        samples: list[Sample | None] = [None] * len(self.rows)
        replaced: list[Replacement] = []
        own_epochs, indices = references.own_epoch.tolist(), references.index.tolist()
        for number, rows, source in self._open(step, references):
            shard, index = self.manifest.shards[number], self._index(number)
            for row in rows:
                draw = Draw(self.order.seed, own_epochs[row], self.flip)
                samples[row], bad = _decodable(source, shard, index, indices[row], self.manifest.contents, draw)
                replaced += [bad._replace(row=self.rows[row])] if bad else []
        found = [sample for sample in samples if sample is not None]
        assert len(found) == len(self.rows)
        shards = [self.manifest.shards[number] for number in references.shard.tolist()]
        names = [shard.name for shard in shards]
        encoded = self.manifest.encoded
        dtype = None if encoded is None else encoded.dtype
        return collate(step, shards[0].bucket, self.rows, found, names, own_epochs, replaced, dtype)

    def _raw(self, step: int) -> RawBatch:
        references = self._references(step)
        assert self.read is not None
        indices = references.index.tolist()
        keys, made = [""] * len(self.rows), [None] * len(self.rows)
        for number, rows, source in self._open(step, references):
            shard, index = self.manifest.shards[number], self._index(number)
            for row in rows:
                sample = indices[row]
                keys[row] = index.keys[sample]
                made[row] = self.read(source.descriptor(sample), shard, index, sample)
        return RawBatch(step, self.rows, tuple(keys), tuple(made))

    def _references(self, step: int) -> References:
        """References of a step. Those of the next ones that this process makes are found with them."""
        if step not in self._ahead:
            worker = get_worker_info()
            stride = self.together * (worker.num_workers if worker else 1)
            firsts = range(step, self.stop, stride)[: 1 + _ROWS_AT_ONCE // (len(self.rows) * self.together)]
            steps = [s for first in firsts for s in range(first, min(first + self.together, self.stop))]
            self._ahead = dict(zip(steps, self.order.several(steps, self.rows), strict=True))
        return self._ahead[step]

    def _open(self, step: int, references: References) -> Iterator[tuple[int, list[int], Source]]:
        """The shards of a step one by one: number, rows of this rank that are in it, and the shard to read from."""
        rows_of: dict[int, list[int]] = {}
        for row, shard in enumerate(references.shard.tolist()):
            rows_of.setdefault(shard, []).append(row)
        self._close_all_but(rows_of.keys())
        with contextlib.ExitStack() as stack:
            # Where members are fetched, those of all shards are asked for before the first is waited for.
            ranged = {
                n: stack.enter_context(s) for n, rows in rows_of.items() if (s := self._begin(n, rows, references))
            }
            for number, rows in rows_of.items():
                self._note(step, number)
                if number in ranged:
                    yield number, rows, ranged[number]
                else:
                    yield number, rows, WholeShard(self._file(number).fileno())

    def _file(self, number: int) -> BinaryIO:
        """The tar of a shard. It stays open while step after step reads it; an open file survives its eviction."""
        tar = tar_of(self.manifest.shards[number], self.folders)
        if number in self._files:
            self.cache.mark_used(tar, self._files[number])
        else:
            self._files[number] = self.cache.get(tar)
        return self._files[number]

    def _close_all_but(self, shards: Collection[int]) -> None:
        for number in [number for number in self._files if number not in shards]:
            self._files.pop(number).close()

    def _begin(self, number: int, rows: list[int], references: References) -> RangedShard | None:
        """Start to fetch the members of these rows; None where the shard is read whole, or lies here already."""
        shard = self.manifest.shards[number]
        if not self.ranged or self.cache.holds(tar_of(shard, self.folders)):
            return None
        wanted = references.index[rows].tolist()
        return RangedShard(
            self.folders[shard.folder], shard, self._index(number), wanted, fetch_pool(self.cache.threads)
        )

    def _index(self, number: int) -> Index:
        if number in self._indexes:
            self._indexes.move_to_end(number)
            return self._indexes[number]
        shard = self.manifest.shards[number]
        with self.cache.get(index_of(shard, self.folders)) as file:
            self._indexes[number] = parse_index(file.read(), shard)
        if len(self._indexes) > _INDEXES:
            self._indexes.popitem(last=False)
        return self._indexes[number]

    def _note(self, step: int, shard: int) -> None:
        if (worker := get_worker_info()) is not None and self.progress is not None:
            self.progress.note(worker.id, step, shard)


def _decodable(
    source: Source, shard: Shard, index: Index, wanted: int, contents: Contents, draw: Draw
) -> tuple[Sample, Replacement | None]:
    """Sample `wanted` or the next one of its shard that can be decoded, wrapping: a function of the shard alone."""
    failure: SampleError | None = None
    for number in [*range(wanted, shard.samples), *range(wanted)]:
        try:
            sample = read_sample(source.descriptor(number), shard, index, number, contents, draw)
        except SampleError as error:
            failure = failure or error
            continue
        if failure is None:
            return sample, None
        key, offset = index.keys[wanted], min((o for o, _ in index.members(wanted).values()), default=0)
        return sample, Replacement(0, shard.name, key, offset, sample.key, str(failure))
    raise DataError(f"none of the {shard.samples} samples of {shard.url} can be decoded; the first tried: {failure}")
