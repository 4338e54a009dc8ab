"""Processes that work through a list of tasks, with one counter of what is done."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from data.s3 import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

_REFRESH_S = 0.5
# [things done, 1 where the work shall stop], in memory shared with the processes.
_counter: Any = [0, 0]


class StoppedError(RuntimeError):
    """The work was interrupted."""


def tick(count: int = 1) -> None:
    """Count things done, for the progress bar. Raises StoppedError where the work shall stop."""
    if _counter[1]:
        raise StoppedError
    with getattr(_counter, "get_lock", threading.Lock)():
        _counter[0] += count


class Pool:
    """`workers` processes; 0 works in this one. They end with this process, however it ends. bar: show progress."""

    def __init__(self, workers: int, bar: bool = True) -> None:
        global _counter
        context = multiprocessing.get_context("forkserver")
        # webdataset imports torch: once for all of them.
        context.set_forkserver_preload(["data.pool", "webdataset"])
        _counter = context.Array("q", 2)
        self._ahead, self._quiet = 4 * workers, None if bar else True
        self._executor = (
            ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(_counter,))
            if workers
            else None
        )

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._executor is not None:
            _counter[1] = 1 if kind else 0
            self._executor.shutdown(cancel_futures=True)

    def each(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], title: str, total: int
    ) -> Iterator[tuple[int, Result]]:
        """(number of a task, its result) as they are finished, with a progress bar over `total` things ticked off.

        Raises what a task raises, and DataError where a process dies.
        """
        _counter[0] = 0
        with tqdm(total=total, desc=title, unit=" samples", disable=self._quiet) as bar:
            if self._executor is None:
                for number, task in enumerate(tasks):
                    yield number, function(task)
                    bar.update(_counter[0] - bar.n)
                return
            waiting = iter(enumerate(tasks))
            running: dict[Future[Result], int] = {}
            while True:
                for number, task in itertools.islice(waiting, self._ahead - len(running)):
                    running[self._executor.submit(function, task)] = number
                if not running:
                    return
                done, _ = wait(running, _REFRESH_S, FIRST_COMPLETED)
                bar.update(_counter[0] - bar.n)
                for future in done:
                    try:
                        yield running.pop(future), future.result()
                    except BrokenProcessPool as error:
                        raise DataError(
                            "a worker process died, most often because the machine ran out of memory: lower --workers "
                            "and run the same command again; the kernel's log (dmesg) may say more"
                        ) from error


def _begin(counter: Any) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process stops the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
