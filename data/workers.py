"""Loader processes: started clean, deaf to signals, and able to say what they did when they died."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

# Whoever stops a run by signal means the rank: it finishes its step and needs its loaders until then.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_LOOK_S = 1.0


class Reading(NamedTuple):
    """What a loader process last began to read. shard: its number in the manifest."""

    pid: int
    step: int
    shard: int


class Progress:
    """Last reading of every loader process, in memory shared with it."""

    def __init__(self, context: Any, workers: int) -> None:
        self._table = context.RawArray(ctypes.c_int64, workers * 3)

    def note(self, worker: int, step: int, shard: int) -> None:
        self._table[worker * 3 : worker * 3 + 3] = [os.getpid(), step, shard]

    def dead(self, patience_s: float) -> list[Reading]:
        """Last readings of the processes that have begun one and live no more; waits a while for the first."""
        rows = [Reading(*self._table[i : i + 3]) for i in range(0, len(self._table), 3)]
        deadline = time.monotonic() + patience_s
        while not (dead := [row for row in rows if row.pid and not _alive(row.pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return dead


def worker_context() -> Any:
    """Multiprocessing context whose processes fork from a server that is clean of this process's threads, sockets
    and device.

    Signals are blocked in the server and inherited so: a signal to the whole process group leaves loaders alone. They
    end with their rank, or when it asks: see `obey`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.loader"])
    # It unblocks signals in this thread when it starts, so it must have started.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


class Companion:
    """A process that works beside the loader processes, ends with them and is told the step that the rank is at.

    work: is called in it with a function that says the step; something that processes can be sent.
    """

    def __init__(self, context: Any, work: Callable[[Callable[[], int]], None], step: int) -> None:
        self._step = context.RawValue(ctypes.c_int64, step)
        self._looked = time.monotonic()
        self._process = context.Process(target=_accompany, args=(work, self._step), daemon=True)
        self._process.start()

    def tell(self, step: int) -> bool:
        """Say the step; False where the process is known to have died, for which it is looked at once a second."""
        self._step.value = step
        if (now := time.monotonic()) - self._looked < _LOOK_S:
            return True
        self._looked = now
        return self._process.exitcode in (None, 0)

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


def _accompany(work: Callable[[Callable[[], int]], None], step: Any) -> None:
    obey()
    work(lambda: int(step.value))


def obey(worker: int = 0) -> None:
    """Let this loader process end with its rank, or on a SIGTERM from it and from no other sender; returns at once.

    The rank sends one at its exit to processes that it could not dismiss, and then waits for them. A rank that is
    killed sends nothing: neither does the server end, whose life line the loader processes hold open.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None

    def await_request() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank.pid:
            pass
        os._exit(0)

    def await_death() -> None:
        rank.join()
        os._exit(1)

    for duty in (await_request, await_death):
        threading.Thread(target=duty, daemon=True).start()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
