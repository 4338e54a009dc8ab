"""The order of samples: a pure function of the manifest, the seed, the global batch size and the lanes.

Row j of global step s is a sample (own epoch, shard, index), whatever the number of ranks, workers or accumulation
steps. With G = global batch size, N_b = samples of stream b, w_b its weight and n_b = w_b N_b:

- Stream b is endless: position P is sample P mod N_b of its permutation of own epoch P // N_b.
- Through epoch E of the run stream b has made floor((E+1) n_b / G) batches; the run as many as all streams together.
- The L batches of stream b in epoch E cover the positions from start = floor(E n_b / G) G on, in `lanes` equal parts
  read side by side: row j of batch k is start + (j // w) L w + k w + j % w with w = G / lanes.
- Batch k of a stream with c batches in the epoch stands at (k + u) / c of it, u a keyed uniform number: streams are
  spread evenly and a step finds its stream from a few neighbouring batches, without a table of the epoch.

So no (own epoch, sample) comes twice, and through epoch E exactly the first floor((E+1) n_b / G) G positions of every
stream have been read; what fills no batch leads the next epoch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from data.permutation import Floats, Integers, Words, keys, permute, uniform, word
from data.stream_rules import default_lanes, large_enough

_SHARDS, _SAMPLES, _DRAW = word("shards"), word("samples"), word("draw")
_TABLE_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class Stream:
    """The samples of one source in one bucket. weight: times that they count in an epoch of the run;
    shards: their numbers in the manifest, samples: the sample count of each, int64 [S]; source_bucket: of edits, size of
    the source images."""

    source: str
    bucket: tuple[int, int]
    weight: Fraction
    shards: Integers
    samples: Integers
    source_bucket: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        sizes = [f"{size[0]}x{size[1]}" for size in (self.bucket, self.source_bucket) if size is not None]
        return f"{self.source}/{'-from-'.join(sizes)}"

    @property
    def total(self) -> int:
        """Samples of the stream."""
        return int(self.samples.sum())

    @property
    def per_epoch(self) -> Fraction:
        """Samples in an epoch of the run, n_b."""
        return self.weight * self.total


class Streams(Protocol):
    """What the order needs of a manifest."""

    @property
    def digest(self) -> str: ...

    def streams(self) -> tuple[Stream, ...]: ...


@dataclass(frozen=True, eq=False)
class References:
    """Samples of one step, row by row, int64 [rows]. own_epoch: passes of the stream completed before;
    shard: number in the manifest; index: sample in the shard."""

    own_epoch: Integers
    shard: Integers
    index: Integers


@dataclass(frozen=True, eq=False)
class Visits:
    """What lanes read of shards in one epoch of the run, one entry for every (lane, shard), by first step.

    shard: number in the manifest; first, last: steps that hold all steps of the visit; share: part of the shard's
    samples that the asked rows read in it, in (0, 1].
    """

    shard: Integers
    first: Integers
    last: Integers
    share: Floats


class Order:
    """References of any global step in about a millisecond; picklable, does no I/O.

    lanes: parts of a stream's epoch read side by side; null: the largest divisor of global_batch_size that is at most
    min(64, shards of the stream). small_buckets: what to do with a stream that has fewer than global_batch_size samples
    in an epoch: refuse | repeat (its weight is raised until it makes one batch) | drop.
    Raises ValueError for such a stream (refuse), for no stream, and for lanes that do not divide the global batch.
    """

    def __init__(
        self,
        manifest: Streams,
        *,
        seed: int,
        global_batch_size: int,
        lanes: int | None = None,
        small_buckets: str = "refuse",
    ) -> None:
        if global_batch_size < 1:
            raise ValueError(f"train.global_batch_size is {global_batch_size}; it must be at least 1")
        if lanes is not None and (lanes < 1 or global_batch_size % lanes):
            raise ValueError(
                f"data.lanes={lanes} does not divide train.global_batch_size={global_batch_size}; "
                "take a divisor, or leave data.lanes out"
            )
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.small_buckets = small_buckets
        self.streams = large_enough(manifest.streams(), global_batch_size, small_buckets)
        self.lanes = tuple(lanes or default_lanes(global_batch_size, len(s.shards)) for s in self.streams)
        self.manifest_digest = manifest.digest
        self._per_epoch = [stream.per_epoch for stream in self.streams]
        self._totals = [stream.total for stream in self.streams]
        self._stream_keys = [word(stream.name) for stream in self.streams]
        self._tables: OrderedDict[tuple[int, int], tuple[Integers, Integers]] = OrderedDict()

    def step(self, step: int, rows: range | None = None) -> References:
        """References of the rows of global step `step` (all of them, or only `rows`), in row order."""
        return self.several([step], rows)[0]

    def several(self, steps: Sequence[int], rows: range | None = None) -> list[References]:
        """As `step`, for several steps in hardly more time than for one."""
        drawn = [self._draw(step) for step in steps]
        if not self._tables:
            self._make_tables(drawn[0][0])
        found: dict[int, References] = {}
        for number in {number for _, number, _, _ in drawn}:
            places = [place for place, draw in enumerate(drawn) if draw[1] == number]
            positions = [self._positions(*drawn[place], rows) for place in places]
            together = self._at(number, np.concatenate(positions))
            parts = np.cumsum([len(position) for position in positions])[:-1]
            split = (np.split(column, parts) for column in (together.own_epoch, together.shard, together.index))
            found |= {
                place: References(*columns) for place, columns in zip(places, zip(*split, strict=True), strict=True)
            }
        return [found[place] for place in range(len(drawn))]

    def stream(self, step: int) -> Stream:
        """The stream (bucket and source) that global step `step` draws from; the same for every rank."""
        return self.streams[self._draw(step)[1]]

    def epoch(self, step: int) -> int:
        """Epoch of the run that global step `step` belongs to."""
        if step < 0:
            raise ValueError(f"a step is at least 0, not {step}")
        # floor(e n / G) <= e n / G bounds the epoch from below by less than two epochs.
        epoch = step * self.global_batch_size // sum(self._per_epoch, Fraction(0))
        while self.steps_through(epoch) <= step:
            epoch += 1
        return int(epoch)

    def steps_through(self, epoch: int) -> int:
        """Steps of the run through the end of `epoch`; 0 for epoch -1."""
        return sum(self._batches(number, epoch + 1) for number in range(len(self.streams)))

    def visits(self, epoch: int, rows: range) -> Visits:
        """Every shard that `rows` of the global batch read in `epoch`, lane by lane; no work per step or sample."""
        base, steps = self.steps_through(epoch - 1), self.steps_through(epoch) - self.steps_through(epoch - 1)
        parts = []
        for number, lanes in enumerate(self.lanes):
            start, width = self._batches(number, epoch), self.global_batch_size // lanes
            batches = self._batches(number, epoch + 1) - start
            for lane in range(rows.start // width, -(-rows.stop // width) if batches else 0):
                begin = start * self.global_batch_size + lane * batches * width
                shard, first, stop, samples = self._slots(number, begin, begin + batches * width)
                overlap = min(rows.stop, (lane + 1) * width) - max(rows.start, lane * width)
                share = (stop - first) / samples * (overlap / width)
                # Batch k lies in the part [k, k + 1) / batches of the epoch, up to one batch of every stream.
                early = (first - begin) // width * steps // batches - len(self.streams)
                late = -(-((stop - 1 - begin) // width + 1) * steps // batches) + len(self.streams)
                parts.append((shard, base + np.maximum(early, 0), base + np.minimum(late, steps - 1), share))
        shard, first, last, share = (np.concatenate(column) for column in zip(*parts, strict=True))
        by_first = np.argsort(first, kind="stable")
        return Visits(shard[by_first], first[by_first], last[by_first], share[by_first])

    def _slots(self, number: int, begin: int, end: int) -> tuple[Integers, Integers, Integers, Integers]:
        """Shards that the positions [begin, end) of a stream touch, in order: number in the manifest, first and end
        position of what is touched, samples of the shard."""
        stream, total = self.streams[number], self._totals[number]
        parts = []
        for own in range(begin // total, (end - 1) // total + 1):
            shards, ends = self._table(number, own)
            low, high = max(begin - own * total, 0), min(end - own * total, total)
            slots = np.arange(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high - 1, "right") + 1)
            samples = stream.samples[shards[slots]]
            first, stop = np.maximum(ends[slots] - samples, low), np.minimum(ends[slots], high)
            parts.append((stream.shards[shards[slots]], own * total + first, own * total + stop, samples))
        shard, first, stop, samples = (np.concatenate(column) for column in zip(*parts, strict=True))
        return shard, first, stop, samples

    def identity(self) -> dict[str, Any]:
        """What fixes the order, for the identity of the run; made of JSON types."""
        return {
            "version": 1,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "lanes": {stream.name: lanes for stream, lanes in zip(self.streams, self.lanes, strict=True)},
            "small_buckets": self.small_buckets,
            "manifest": self.manifest_digest,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict()}

    def _batches(self, number: int, epochs: int) -> int:
        per_epoch = self._per_epoch[number]
        return epochs * per_epoch.numerator // (per_epoch.denominator * self.global_batch_size)

    def _draw(self, step: int) -> tuple[int, int, int, int]:
        """Epoch of the step, number of its stream, its batch k of that stream in the epoch, batches L of the stream."""
        epoch = self.epoch(step)
        done = [self._batches(number, epoch) for number in range(len(self.streams))]
        counts = np.array([self._batches(n, epoch + 1) - before for n, before in enumerate(done)], dtype=np.int64)
        place, total = step - sum(done), int(counts.sum())
        if len(counts) == 1:
            return epoch, 0, place, total
        # A stream has between x c - 1 and x c + 1 batches before the part x of the epoch, so the batch at `place` lies
        # within one batch per stream of the part place / total; the second one covers rounding.
        slack = 2 * len(counts) + 2
        first = np.clip(counts * (place - slack) // total - 1, 0, counts)
        last = np.clip(counts * (place + slack) // total + 2, 0, counts)
        width = last - first
        number = np.repeat(np.arange(len(counts)), width)
        batch = np.arange(len(number)) - np.repeat(np.cumsum(width) - width - first, width)
        stream_keys = np.array(self._stream_keys, dtype=np.uint64).view(np.int64)
        where = (batch + uniform(keys(self.seed, _DRAW, epoch, stream_keys[number], batch))) / counts[number]
        chosen = np.lexsort((batch, number, where))[place - int(first.sum())]
        return epoch, int(number[chosen]), int(batch[chosen]), int(counts[number[chosen]])

    def _positions(self, epoch: int, number: int, batch: int, batches: int, rows: range | None) -> Integers:
        """Positions in stream `number` of the rows of its batch `batch` of the epoch."""
        size, width = self.global_batch_size, self.global_batch_size // self.lanes[number]
        row = np.arange(size) if rows is None else np.asarray(rows, dtype=np.int64)
        start = self._batches(number, epoch) * size
        return start + (row // width) * (batches * width) + batch * width + row % width

    def _at(self, number: int, position: Integers) -> References:
        stream, total = self.streams[number], self._totals[number]
        own_epoch, place = position // total, position % total
        local, within = np.empty_like(place), np.empty_like(place)
        for own in np.unique(own_epoch):
            here = own_epoch == own
            shards, ends = self._table(number, int(own))
            slot = np.searchsorted(ends, place[here], side="right")
            local[here] = shards[slot]
            within[here] = place[here] - (ends[slot] - stream.samples[shards[slot]])
        key = self._keys(_SAMPLES, number, own_epoch, local)
        index = permute(within, stream.samples[local], key)
        return References(own_epoch=own_epoch, shard=stream.shards[local], index=index)

    def _table(self, number: int, own_epoch: int) -> tuple[Integers, Integers]:
        """Shards of the stream in the order of this own epoch, and the cumulative count of samples at their ends."""
        wanted = (number, own_epoch)
        if wanted in self._tables:
            self._tables.move_to_end(wanted)
            return self._tables[wanted]
        samples = self.streams[number].samples
        numbers = np.arange(len(samples))
        shards = permute(numbers, np.full_like(numbers, len(samples)), self._keys(_SHARDS, number, own_epoch))
        self._tables[wanted] = shards, np.cumsum(samples[shards])
        while len(self._tables) > 1 and sum(2 * t[0].nbytes for t in self._tables.values()) > _TABLE_BYTES:
            self._tables.popitem(last=False)
        return self._tables[wanted]

    def _make_tables(self, epoch: int) -> None:
        """Tables of the whole epoch, as far as memory is meant for them, so that no later step waits for one."""
        for number, total in enumerate(self._totals):
            begin, end = (self._batches(number, e) * self.global_batch_size for e in (epoch, epoch + 1))
            for own in range(begin // total, -(-end // total)):
                self._table(number, own)
                if sum(2 * t[0].nbytes for t in self._tables.values()) > _TABLE_BYTES // 2:
                    return

    def _keys(self, purpose: int, number: int, *parts: int | Integers) -> Words:
        return keys(self.seed, purpose, self._stream_keys[number], *parts)
