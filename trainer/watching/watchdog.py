"""A thread per rank that ends a run which hangs, with the stacks of all ranks and the place where each of them is."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from configs.schema import Runtime
from trainer.watching.whereabouts import Board, Position, describe, mismatch

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same start may well succeed."""
SUSPICIOUS_S = 5.0
"""Idle so long, a rank compares its network calls with those of the others."""
SLOW_STAGES = ("save",)
"""Stages that may always take as long as a first visit."""
_LONGEST_TICK_S = 2.0
_SHARE = 0.8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """usual_s: longest time without progress; first_s: the same while a stage is visited for the first time, which
    compiles, allocates and fills caches, and while a checkpoint is waited for."""

    usual_s: float
    first_s: float

    @classmethod
    def of(cls, runtime: Runtime) -> Patience:
        """A collective that times out ends its rank before anyone has seen a stack, so the budget lies below that."""
        usual = min(runtime.hang_timeout_s, _SHARE * runtime.collective_timeout_s)
        return cls(usual, max(runtime.hang_first_timeout_s, usual))

    @property
    def tick_s(self) -> float:
        return min(self.usual_s / 20, _LONGEST_TICK_S)


@dataclass(frozen=True)
class Sight:
    """What the watchdog sees of its rank. progress: any value that changes with every stage and network call; new: the
    stage is visited for the first time."""

    position: Position
    progress: Any
    new: bool = False


class Watchdog(threading.Thread):
    """Watches from `start` to `stop`; a context manager.

    see: called every tick from this thread. ended: called with the message once all ranks have spoken, before the
    process ends. traces: folder for the flight recorder's record of the collectives (NCCL only).

    Idle time is counted in ticks of this thread, not by the clock: a job that a scheduler suspends and continues has
    not hung.
    """

    def __init__(
        self,
        board: Board,
        patience: Patience,
        see: Callable[[], Sight],
        ended: Callable[[str], None],
        traces: Path | None = None,
        output: TextIO | None = None,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._board, self._patience, self._see, self._ended, self._traces = board, patience, see, ended, traces
        self._output = output or sys.stderr
        self._stop_event = threading.Event()
        self._progress: Any = None
        self._idle_s = 0.0
        self._looked = time.monotonic()
        self.ending = False

    def run(self) -> None:
        lonely = False
        while not self._stop_event.wait(self._patience.tick_s):
            position, allowed = self._look()
            reason = ""
            try:
                reason = self._hear(position)
                lonely = False
            except RuntimeError as error:  # the store is gone: this rank still watches over itself
                if not lonely:
                    _log.warning("rank %d does not know where the others are: %s", position.rank, error)
                lonely = True
            if not reason and position.idle_s > allowed:
                reason = f"rank {position.rank} made no progress for {position.idle_s:.0f} s"
            if reason:
                self._end(reason, position)

    def stop(self) -> None:
        """Watch no longer; returns once the thread has ended."""
        self._stop_event.set()
        self.join(_LONGEST_TICK_S + self._grace_s)
        faulthandler.cancel_dump_traceback_later()

    def spread(self, reason: str) -> None:
        """This rank ends; the others shall show their stacks and end, too."""
        try:
            self._board.raise_alarm(reason)
        except RuntimeError as error:
            _log.warning("the other ranks could not be told: %s", error)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.ending:
            self.join()  # the others have gone, hence the error; this thread ends the process
        if error is not None and "timed out" in str(error).lower():
            self.spread(f"rank {self._board.rank} gave up waiting: {str(error).splitlines()[0]}")
        self.stop()

    @property
    def _grace_s(self) -> float:
        """After an alarm the others get so long to report."""
        return 4 * self._patience.tick_s + 2.0

    def _look(self) -> tuple[Position, float]:
        """Where this rank is and how long it may stay there."""
        sight, now = self._see(), time.monotonic()
        if sight.progress != self._progress:
            self._idle_s = 0.0
        else:
            self._idle_s += min(now - self._looked, 2 * self._patience.tick_s)
        self._progress, self._looked = sight.progress, now
        slow = sight.new or sight.position.stage in SLOW_STAGES
        allowed = self._patience.first_s if slow else self._patience.usual_s
        # Where a call into C keeps the interpreter's lock this thread never comes back; the timer needs no lock.
        faulthandler.dump_traceback_later(allowed + 2 * self._patience.tick_s, file=self._output)
        return replace(sight.position, idle_s=self._idle_s), allowed

    def _hear(self, position: Position) -> str:
        """Tell the others, hear an alarm, compare calls where this rank waits; the reason to end, or an empty text."""
        self._board.publish(position)
        if said := self._board.alarm():
            return said
        suspicious = min(SUSPICIOUS_S, self._patience.usual_s / 2)
        return mismatch(self._board.positions()) if position.idle_s > suspicious else ""

    def _end(self, reason: str, position: Position) -> None:
        """Stacks, a word from all ranks, one message; the process ends here."""
        self.ending = True
        # From here on nothing may keep the process: not the store, not a full disk, not the tracker.
        faulthandler.dump_traceback_later(2 * self._grace_s + 20.0, exit=True, file=self._output)
        self._say(f"\nstacks of rank {position.rank}, {position.place()}, for: {reason}\n")
        faulthandler.dump_traceback(file=self._output)
        self._write_trace(position.rank)
        last, reported = [position], [position]
        try:
            self._board.raise_alarm(reason)
            self._board.report(position)
            deadline = time.monotonic() + self._grace_s
            while len(reported) < self._board.ranks and time.monotonic() < deadline:
                time.sleep(0.05)
                reported = self._board.reports()
            last = self._board.positions()
        except RuntimeError as error:
            self._say(f"the other ranks cannot be asked: {error}\n")
        lines = [f"the run hangs: {reason}", *describe(self._board.ranks, last, reported)]
        lines.append("the stacks of each rank stand in its own log")
        message = "\n".join(lines)
        self._say(f"\nrank {position.rank} failed at step {position.step}: {message}\n")
        self._ended(message)
        time.sleep(0.5)  # all ranks get to say it before the first that is gone wakes the others' collectives
        os._exit(EXIT_CODE)

    def _write_trace(self, rank: int) -> None:
        """The flight recorder's last collectives as JSON, where NCCL is in use."""
        import torch

        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if self._traces is None or dump is None or not torch.cuda.is_available():
            return
        try:
            (self._traces / f"collectives_rank_{rank:05d}.json").write_bytes(dump())
        except (OSError, RuntimeError) as error:
            self._say(f"the record of collectives could not be written: {error}\n")

    def _say(self, text: str) -> None:
        self._output.write(text)
        self._output.flush()
