"""A pool of CPU rank processes: `run_ranks(function, world_size, *args)` calls a function on n gloo ranks.

The ranks are processes that stay for the next call, since importing torch takes seconds. Each call gets a fresh
process group from torchrun's environment variables. A rank that raises, dies or hangs ends all of them, and the next
call starts new ones. For checks at small size (trainer/parity.py and the tests); training is started by torchrun.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

_POOL: list[_Rank] = []


class RankFailedError(RuntimeError):
    """A rank raised or died; the message carries the first failing rank's traceback."""


class _Rank:
    """A process that runs functions for the parent."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call the module-level `function(*args)` on ranks 0 .. world_size - 1 of a gloo process group; results by rank.

    Arguments and results are pickled; torch runs on one thread.

    Raises:
        RankFailedError: with the traceback of the rank that failed first, or the exit code of one that died.
        TimeoutError: not all ranks returned within `timeout` seconds; every rank has been killed.
    """
    import torch.distributed as dist

    while len(_POOL) < world_size:
        _POOL.append(_Rank())
    ranks = _POOL[:world_size]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    try:
        for rank, each in enumerate(ranks):
            each.connection.send_bytes(pickle.dumps((function, args, rank, world_size, store.port, timeout)))
        return _collect(ranks, time.monotonic() + timeout, function.__qualname__)
    except BaseException:
        stop_ranks()
        raise


def _collect(ranks: list[_Rank], deadline: float, name: str) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    waiting: dict[Connection, int] = {each.connection: rank for rank, each in enumerate(ranks)}
    while waiting:
        # After a failure the others get a moment: the first error by the clock is the cause, theirs are consequences.
        left = min(deadline - time.monotonic(), 1.0 if failures else float("inf"))
        ready = wait(list(waiting), timeout=max(left, 0.0))
        if not ready and failures:
            break
        if not ready:
            raise TimeoutError(
                f"{name}: no result from ranks {sorted(waiting.values())} in time; all ranks were killed"
            )
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[call-overload]
            try:
                moment, error, result = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                ranks[rank].process.join(10)
                moment, error, result = 0.0, f"the process died with exit code {ranks[rank].process.exitcode}", None
            results[rank] = result
            if error:
                failures.append((moment, rank, error))
    if failures:
        _, rank, error = min(failures)
        raise RankFailedError(f"{name} failed on rank {rank} of {len(ranks)}:\n{error}")
    return [results[rank] for rank in range(len(ranks))]


def stop_ranks() -> None:
    """Kill all rank processes; the next call starts new ones."""
    while _POOL:
        each = _POOL.pop()
        each.connection.close()
        each.process.kill()
        each.process.join()


atexit.register(stop_ranks)


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = pickle.dumps((time.time(), "", _run(*pickle.loads(message))))
        except BaseException:
            answer = pickle.dumps((time.time(), traceback.format_exc(), None))
        connection.send_bytes(answer)
        gc.collect()


def _run(function: Callable[..., Any], args: tuple, rank: int, world_size: int, port: int, timeout: float) -> Any:
    import torch

    from trainer.engines.distributed import process_group

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store lives in the parent, as torchrun's does in its agent
    )
    torch.manual_seed(0)
    with process_group(timeout, "cpu"):
        return function(*args)
