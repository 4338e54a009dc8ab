"""Look-ahead: one process of a node fetches the shards that its rows will read, before they are asked for.

What comes next is known from the order. Nothing waits for this process: a shard that it has not fetched is fetched by
whoever needs it, and if it dies the run goes on so. It never makes room by what is needed sooner than what it fetches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.cache import Object, ShardCache, index_of, stamp, tar_of
from data.manifest import Manifest
from data.order import Order, Visits
from data.reach import Reach
from data.s3 import DataError, Folder

log = logging.getLogger(__name__)

_TICK_S = 0.2
# Stamps are times. A step counts as a second, so that files of other runs, stamped by the clock, compare sensibly.
_STEP_NS = 10**9
# Ranks of a node are at most one step apart.
_APART = 1


class _Coming(NamedTuple):
    """next_use: shard -> step of its next use (the present one: in use; never: unknown), soonest first; wanted: shard ->
    the same as a stamp tells it, where what is in use comes first, and of that what is read longest; epoch_end: last step
    of the epoch."""

    next_use: dict[int, int]
    wanted: dict[int, float]
    epoch_end: int
    never: int


@dataclass(eq=False)
class LookAhead:
    """Fetches what reach.rows read in `steps`, in order of first use, with the cache's threads.

    reading: steps that loader processes may be ahead of the rank; what they need is in use. failed: shards that it gave
    up and leaves to whoever needs them.
    """

    order: Order
    manifest: Manifest
    folders: dict[str, Folder]
    cache: ShardCache
    reach: Reach
    steps: range
    reading: int = 0
    failed: set[int] = field(default_factory=set)
    _epochs: dict[int, Visits] = field(default_factory=dict)
    _names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    _under_way: dict[Future[bool], int] = field(default_factory=dict)

    def run(self, step: Callable[[], int]) -> None:
        """Work until the rank has reached the last step. step: the one that it was given last."""
        stamped, clock, coming = -1, 0, _Coming({}, {}, -1, 0)
        with ThreadPoolExecutor(self.cache.threads, thread_name_prefix="look-ahead") as pool:
            while (now := step()) < self.steps.stop - 1:
                if now != stamped:
                    coming = self._coming(now)  # long work where an epoch has many shards
                    # Stamps are compared with each other: all of a step are made with one reading of the clock.
                    stamped, clock = now, time.time_ns()
                    self._stamp_all(coming, clock - now * _STEP_NS)
                self._start(pool, coming, clock - now * _STEP_NS)
                wait(self._under_way, _TICK_S, FIRST_COMPLETED)
                if not self._settle() or not self._under_way:  # no room, or nothing to do: only a step changes that
                    time.sleep(_TICK_S)

    def _stamp_all(self, coming: _Coming, clock_ns: int) -> None:
        present = self.cache.files()
        for number, use in coming.wanted.items():
            for name in present.intersection(self._files(number)):
                stamp(self.cache.directory / name, max(0, clock_ns - int(use * _STEP_NS)))

    def _start(self, pool: ThreadPoolExecutor, coming: _Coming, clock_ns: int) -> None:
        """Fetch the next absent shards as far as threads are free."""
        present = self.cache.files()
        busy = self.failed | set(self._under_way.values())
        for number, use in coming.next_use.items():
            if use >= coming.never or len(self._under_way) == self.cache.threads:
                return
            if number in busy or present.issuperset(self._files(number)):
                continue
            # What two lanes of this epoch share stays for the second where the cache can hold it.
            spare = 1 + max(use, coming.epoch_end if self.reach.kept else 0)
            stamps = (clock_ns - int(coming.wanted[number] * _STEP_NS), clock_ns - spare * _STEP_NS)
            self._under_way[pool.submit(self._fetch, number, *stamps)] = number

    def _fetch(self, number: int, wanted_ns: int, spare_ns: int) -> bool:
        return all(self.cache.fetch(item, wanted_ns, spare_ns) for item in self._objects(number))

    def _settle(self) -> bool:
        """Take note of what has ended; False where something found no room."""
        room = True
        for future in [future for future in self._under_way if future.done()]:
            number = self._under_way.pop(future)
            try:
                room = future.result() and room
            except DataError as error:
                self.failed.add(number)
                log.warning("look-ahead: %s; left to the batch that needs it", error)
        return room

    def _coming(self, now: int) -> _Coming:
        epoch = self.order.epoch(now)
        self._epochs = {e: self._epochs.get(e) or self._visits(e) for e in (epoch, epoch + 1)}
        shard, first, last = (
            np.concatenate([getattr(visits, name) for visits in self._epochs.values()])
            for name in ("shard", "first", "last")
        )
        end = self.order.steps_through(epoch)
        never = 2 * self.order.steps_through(epoch + 1)
        over = (last < now - _APART) | (first >= self.steps.stop)
        use = np.where(over, never, np.maximum(first, now))
        in_use = now + 1 / (2 + np.maximum(last - now, 0))
        wanted = np.where(over | (first > now + self.reading), use, in_use)
        latest_first = np.argsort(-use, kind="stable")
        shard, use, wanted = (column[latest_first].tolist() for column in (shard, use, wanted))
        soonest = sorted(dict(zip(shard, use, strict=True)).items(), key=lambda item: item[1])
        return _Coming(dict(soonest), dict(zip(shard, wanted, strict=True)), end - 1, never)

    def _visits(self, epoch: int) -> Visits:
        """The visits of an epoch to shards that are not on this machine."""
        visits = self.order.visits(epoch, self.reach.rows)
        remote = np.array([self._remote(number) for number in visits.shard.tolist()], dtype=bool)
        return Visits(visits.shard[remote], visits.first[remote], visits.last[remote], visits.share[remote])

    def _remote(self, number: int) -> bool:
        shard = self.manifest.shards[number]
        return self.folders[shard.folder].local_path(shard.name) is None

    def _files(self, number: int) -> tuple[str, ...]:
        """Names of a shard's files in the cache."""
        if number not in self._names:
            self._names[number] = tuple(self.cache.path(item).name for item in self._objects(number))
        return self._names[number]

    def _objects(self, number: int) -> tuple[Object, Object]:
        shard = self.manifest.shards[number]
        return index_of(shard, self.folders), tar_of(shard, self.folders)
