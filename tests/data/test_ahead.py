import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.ahead import LookAhead
from data.cache import ShardCache, index_of, tar_of
from data.order import Order
from data.reach import reach
from tests.data.memory import MemoryFolder, memory_set

SHARD = 16 * 100 + 10


class Running:
    """A look-ahead over `shards` shards of 16 samples in `lanes` lanes, beside a rank whose step the test sets."""

    def __init__(
        self, directory: Path, shards: int, cache_shards: int, threads: int = 1, lanes: int = 1, reading: int = 0
    ) -> None:
        self.manifest, self.folder = memory_set([16] * shards)
        self.order = Order(self.manifest, seed=1, global_batch_size=4, lanes=lanes)
        self.cache = ShardCache(str(directory), cache_shards * SHARD, threads)
        self.folders: dict[str, MemoryFolder] = {"memory://set": self.folder}
        self.step = 0
        steps, rows = range(self.order.steps_through(2)), range(4)
        plan = reach(self.order, self.manifest, set(self.folders), rows, steps, self.cache.max_bytes)
        assert not plan.ranged
        self.ahead = LookAhead(self.order, self.manifest, self.folders, self.cache, plan, steps, reading)  # type: ignore[arg-type]
        self.coming = [f"{n}.tar" for e in range(2) for n in self.order.visits(e, rows).shard.tolist()]

    @contextmanager
    def started(self) -> Iterator[None]:
        thread = threading.Thread(target=self.ahead.run, args=(lambda: self.step,))
        thread.start()
        try:
            yield
        finally:
            self.step = self.ahead.steps.stop
            thread.join()

    @property
    def tars(self) -> list[str]:
        return [name for name in self.folder.downloads if name.endswith(".tar")]

    def cached(self) -> set[str]:
        return {shard.name for shard in self.manifest.shards if self.cache.holds(tar_of(shard, self.folders))}  # type: ignore[arg-type]

    def read(self, name: str) -> None:
        shard = next(shard for shard in self.manifest.shards if shard.name == name)
        for item in (index_of(shard, self.folders), tar_of(shard, self.folders)):  # type: ignore[arg-type]
            self.cache.get(item).close()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.01)


def settled(running: Running, seconds: float = 0.6) -> None:
    """Wait for several rounds in which nothing is fetched."""
    seen = -1
    while seen != len(running.folder.downloads):
        seen = len(running.folder.downloads)
        time.sleep(seconds)


def test_shards_come_in_order_of_use_as_far_as_the_cache_holds_them(tmp_path: Path) -> None:
    running = Running(tmp_path, shards=8, cache_shards=3)
    with running.started():
        until(lambda: len(running.tars) == 3)
        settled(running)
        assert running.tars == running.coming[:3], "what is needed sooner never leaves for what is needed later"
        running.step = 4 + 3  # a shard lasts 4 steps; its end is known to a step, and ranks are a step apart
        until(lambda: len(running.tars) == 4)
        settled(running)
        assert running.tars == running.coming[:4]
        assert running.cached() == set(running.coming[1:4])


def test_it_crosses_epochs_and_fetches_every_shard_once_an_epoch(tmp_path: Path) -> None:
    running = Running(tmp_path, shards=6, cache_shards=4)
    with running.started():
        for step in range(running.order.steps_through(1) - 8):
            running.step = step
            shard = running.order.step(step).shard
            until(lambda shard=shard: {f"{n}.tar" for n in shard.tolist()} <= running.cached())
    assert running.tars[:6] == running.coming[:6]
    assert len(running.tars) <= 12
    assert sum(path.stat().st_size for path in tmp_path.glob("*.object")) <= running.cache.max_bytes


def test_a_shard_that_two_lanes_share_stays_for_the_second(tmp_path: Path) -> None:
    """9 shards in 2 lanes: the fifth is cut, the second lane reads its end first, the first lane its beginning last."""
    running = Running(tmp_path, shards=9, cache_shards=5, lanes=2)
    assert running.ahead.reach.kept
    with running.started():
        for step in range(running.order.steps_through(0) - 2):
            running.step = step
            shards = [f"{n}.tar" for n in set(running.order.step(step).shard.tolist())]
            until(lambda shards=shards: set(shards) <= running.cached())
            if step == 7:  # the second lane is done with it; the cache is full, and nothing else has been finished
                settled(running)
            for name in shards:
                running.read(name)
        (shared,) = {name for name in running.coming[:10] if running.coming[:10].count(name) == 2}
        assert running.tars.count(shared) == 1


def test_what_others_fetched_is_not_fetched_again_and_failures_are_left_to_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(tmp_path, shards=8, cache_shards=8, threads=2)
    running.read(running.coming[0])
    del running.folder.objects[running.coming[1]]
    with caplog.at_level(logging.WARNING), running.started():
        until(lambda: len(running.cached()) == 7)
        settled(running)
    assert running.tars.count(running.coming[0]) == running.tars.count(running.coming[1]) == 1
    (record,) = caplog.records
    assert f"look-ahead: memory://set/{running.coming[1]}: no such object; left to the batch" in record.message


def test_what_loader_processes_read_next_is_wanted_more_than_what_ends_soon(tmp_path: Path) -> None:
    """Each of two lanes reads a shard in 8 steps; the rank is at the sixth, its loader processes up to 4 further."""
    running = Running(tmp_path, shards=8, cache_shards=8, lanes=2, reading=4)
    ending, coming = ({int(n) for n in running.order.step(step).shard} for step in (6, 9))
    assert not ending & coming

    def stamps(shards: set[int]) -> list[int]:
        tars = [tar_of(running.manifest.shards[n], running.folders) for n in shards]  # type: ignore[arg-type]
        return [running.cache.path(tar).stat().st_mtime_ns for tar in tars]

    with running.started():
        until(lambda: len(running.cached()) == 8)
        settled(running)
        running.step = 6
        until(lambda: min(stamps(coming)) > max(stamps(ending)))


def test_no_more_threads_work_than_asked_for(tmp_path: Path) -> None:
    running = Running(tmp_path, shards=8, cache_shards=8, threads=3)
    now, most, lock = set[str](), [0], threading.Lock()

    def busy(name: str) -> None:
        with lock:
            now.add(name)
            most[0] = max(most[0], len(now))
        time.sleep(0.05)
        with lock:
            now.remove(name)

    running.folder.before = busy
    with running.started():
        until(lambda: len(running.cached()) == 8)
    assert most[0] == 3
