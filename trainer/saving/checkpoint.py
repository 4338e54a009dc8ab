"""Sharded checkpoints, complete or absent (law 6): every rank writes its ranges, one act publishes them.

A save costs the loop a copy of this rank's state to host memory that is allocated once. A thread writes, brings to the
disk and publishes it, and talks to the other ranks on a gloo group of its own: two threads on one group abort the
process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from configs.schema import Checkpoint as CheckpointOptions
from data.s3 import DataError
from trainer.engines.engine import Engine, TensorPart
from trainer.saving import certificate as certificates
from trainer.saving import checkpoint_store
from trainer.saving.certificate import Certificate, CheckpointError
from trainer.saving.checkpoint_parts import Described, Written, check_names, describe, merge
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoint_store import CheckpointStore, open_store
from trainer.saving.tensor_file import StagedFile
from trainer.unison import Unison

SECONDS = "training_seconds"
BAD_SAMPLES = "bad_samples_in_epoch"
SAVED_AT = "saved_at"
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run has come. step: optimizer steps done; seconds: spent on them; bad_samples: replaced samples among
    those of the last step's epoch, on all ranks; counters, metadata: all that the certificate holds."""

    step: int
    seconds: float
    bad_samples: int = 0
    counters: Mapping[str, float] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """What became of a save. seconds: from the end of staging on; bytes: this rank's; error: empty, or the same text on
    all ranks."""

    step: int
    seconds: float
    bytes: int
    error: str = ""


class Checkpoints:
    """The checkpoints of one run, in one place that all ranks share: a folder, an s3:// URL or a store.

    metadata: JSON values about the run, written into every certificate; rank 0's are. timeout_s: longest wait for
    another rank's writing. save, finish, newest, resume, write and read are collective: all ranks call them in the same order,
    and where one fails all raise. Works without a process group too, as a world of one.
    """

    def __init__(
        self,
        where: Path | str | CheckpointStore,
        options: CheckpointOptions,
        metadata: Mapping[str, Any],
        timeout_s: float = 3600.0,
    ) -> None:
        if options.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {options.keep_last}; at least 1 must stay to resume from")
        self._store = open_store(where) if isinstance(where, Path | str) else where
        self._options, self._metadata = options, metadata
        self._ranks = Unison(timeout_s)
        self._staged = StagedFile()
        self._thread: threading.Thread | None = None
        self._outcomes: deque[Saved] = deque()  # the thread puts in, the loop takes out
        self._longest_s = 0.0
        self._last: Saved | None = None
        self._step: int | None = None

    def save(self, engine: Engine, step: int, seconds: float, bad_samples: int = 0, **more: float) -> None:
        """Begin to save the engine's state after `step` steps, unless that very state is saved or was loaded.

        Returns when the state is copied; a save that is still being written is waited for first. A failure is logged
        at once and shows in `outcomes`; the earlier checkpoint stays in force. more: further counters.
        """
        self._settle()
        if step == self._step:
            return
        counters = {**engine.counters(), SECONDS: seconds, BAD_SAMPLES: bad_samples, **more}
        prepared = self._attempt(lambda: self._stage(engine.parts()))
        self._thread = threading.Thread(
            target=self._save, args=(step, prepared, counters), name="checkpoint", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointError: on all ranks, if the newest save failed.
        """
        self._settle()
        if self._last is not None and self._last.error:
            raise CheckpointError(self._last.error)

    def abandon(self, timeout_s: float) -> bool:
        """Give a save under way some time in a run that has failed; whether none is left. Not collective."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    @property
    def longest_s(self) -> float:
        """Seconds that the longest save took to be written and published."""
        return self._longest_s

    def outcomes(self) -> list[Saved]:
        """What became of the saves that have ended since the last call."""
        return [self._outcomes.popleft() for _ in range(len(self._outcomes))]

    def resume(self, engine: Engine) -> Progress:
        """Fill the engine from the newest complete checkpoint, the one that rank 0 sees; from none, start at 0."""
        name = self.newest()
        if name is None:
            return Progress(0, 0.0)
        certificate = self.read(name, engine.parts())
        counters = certificate.counters
        engine.load_counters(counters)
        self._step = certificate.step
        seconds, bad = counters.get(SECONDS, 0.0), int(counters.get(BAD_SAMPLES, 0))
        return Progress(certificate.step, seconds, bad, counters, certificate.metadata)

    def newest(self) -> str | None:
        """Name of the newest complete checkpoint, the one that rank 0 sees; None where there is none. Collective."""
        return self._ranks.from_rank_0(self._ranks.together(lambda: self.latest() if self._ranks.rank == 0 else None))

    def latest(self) -> str | None:
        """Name of the newest complete checkpoint that this process sees."""
        return checkpoint_store.latest(self._store)

    def latest_path(self) -> str | None:
        """Path or URL of the newest checkpoint that this process has published or resumed from. From memory: a run that
        fails because its store is away can still say it."""
        saved = self._last.step if self._last is not None and not self._last.error else None
        steps = [step for step in (self._step, saved) if step is not None]
        return f"{self._store.url}/{checkpoint_store.named(max(steps))}" if steps else None

    def write(self, step: int, parts: Iterable[TensorPart], counters: Mapping[str, float]) -> str:
        """Write and publish the checkpoint of `step` at once, then remove older ones; its name.

        A write that fails or is killed leaves the earlier checkpoint in force.

        Raises:
            CheckpointError: on all ranks, naming the rank, the file and the remedy.
        """
        self._settle()
        return self._commit(step, self._attempt(lambda: self._stage(parts)), counters)

    def read(self, name: str | Path, parts: Iterable[TensorPart]) -> Certificate:
        """Fill the local views of `parts` from whatever ranges the files hold, at any number of ranks.

        Each rank reads only its own elements. In the groups asked for, names, shapes and dtypes must be the saved ones.

        Raises:
            CheckpointError: on all ranks, naming the rank, the file or tensor and the remedy.
        """
        self._settle()
        return self._ranks.together(lambda: self._read(Path(name).name, list(parts)))

    def _settle(self) -> None:
        """Wait for the save under way and note what became of it: from here on its group is this thread's."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._last is not None and not self._last.error:
                self._step = self._last.step

    def _save(self, step: int, prepared: Callable[[], list[Described]], counters: Mapping[str, float]) -> None:
        """The thread's part of a save; it must not raise."""
        began, error = time.monotonic(), ""
        try:
            self._commit(step, prepared, counters)
        except Exception as failure:  # the loop goes on; whoever calls finish() hears of it
            error = str(failure)
            if self._ranks.rank == 0:
                _log.error(
                    "CHECKPOINT OF STEP %d WAS NOT SAVED: %s. The earlier one stays in force; the next is saved when due",
                    step,
                    error,
                )
        self._last = Saved(step, time.monotonic() - began, self._staged.size, error)
        self._longest_s = max(self._longest_s, self._last.seconds)
        self._outcomes.append(self._last)

    def _commit(self, step: int, prepared: Callable[[], list[Described]], counters: Mapping[str, float]) -> str:
        tensors = self._ranks.together(prepared)
        attempt = self._ranks.from_rank_0(
            self._ranks.together(lambda: self._store.begin(step) if self._ranks.rank == 0 else "")
        )
        own = self._ranks.together(lambda: self._write(attempt, tensors))
        written = self._ranks.gather(own)
        name = self._ranks.together(lambda: self._publish(attempt, step, counters, written) if written else "")
        return self._ranks.from_rank_0(name)

    def _attempt(self, action: Callable[[], _T]) -> Callable[[], _T]:
        """Do it now; what it gave or raised comes out of the call of the result, where all ranks hear of it."""
        try:
            result = action()
        except Exception as error:
            caught = error

            def fail() -> _T:
                raise caught

            return fail
        return lambda: result

    def _stage(self, parts: Iterable[TensorPart]) -> list[Described]:
        """Copy this rank's elements; what they are. A tensor without any is described by the rank that begins it."""
        own = [part for part in parts if part.owned and (part.local.numel() or part.start == 0)]
        self._staged.fill([part for part in own if part.local.numel()])
        return [describe(part) for part in own]

    def _write(self, attempt: str, tensors: list[Described]) -> Written:
        if not any(tensor.length for tensor in tensors):
            return Written(None, 0, tensors)
        return Written(self._store.write(attempt, self._ranks.rank, self._staged), self._staged.size, tensors)

    def _publish(self, attempt: str, step: int, counters: Mapping[str, float], written: list[Written]) -> str:
        """Rank 0: certificate, one act, then retention."""
        files = {of_rank.file: of_rank.size for of_rank in written if of_rank.file is not None}
        metadata = {**self._metadata, SAVED_AT: datetime.now(UTC).isoformat(timespec="seconds")}
        certificate = Certificate(step, dict(counters), metadata, files, merge(written))
        certificates.check_coverage(certificate)
        name = self._store.publish(attempt, step, certificate)
        self._retain()
        return name

    def _retain(self) -> None:
        """Remove what neither keep_last nor keep_every holds. The newest complete one, which a run resumes from, always
        stays; a checkpoint that cannot be judged does too."""
        try:
            names = [name for name, _ in checkpoint_store.complete(self._store)]
            every = self._options.keep_every
            for name in names[self._options.keep_last :]:
                if not (every and checkpoint_store.step_of(name) % every == 0):
                    self._store.remove(name)
        except (CheckpointError, DataError, OSError) as error:
            _log.warning("old checkpoints in %s were not removed: %s", self._store.url, error)

    def _read(self, name: str, parts: list[TensorPart]) -> Certificate:
        reader = CheckpointReader(self._store, name)
        check_names(reader.url, reader.certificate, parts)
        reader.fill(parts)
        return reader.certificate
