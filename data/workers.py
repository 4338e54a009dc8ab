"""Loader processes: started clean, deaf to signals, and able to say what they did when they died."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple

# Whoever stops a run by signal means the rank: it finishes its step and needs its loaders until then.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


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

    def dead(self) -> list[Reading]:
        """Last readings of the processes that have begun one and live no more."""
        rows = [Reading(*self._table[i : i + 3]) for i in range(0, len(self._table), 3)]
        return [row for row in rows if row.pid and not _alive(row.pid)]


def worker_context() -> Any:
    """Multiprocessing context whose processes fork from a server that is clean of this process's threads, sockets
    and device.

    Signals are blocked in the server and inherited so: a signal to the whole process group leaves loaders alone, and
    they end with their rank.
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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
