"""A profile of some steps on request: configured steps, or the next ones once a file appears in the run's folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from configs.schema import Profile
from trainer.observe.tracking import NullTracker, Tracker

REQUEST = "profile_now"
"""Touch this file in the run's folder: the next steps are profiled."""
STEPS_ON_REQUEST = 3
_ROWS = 40
_EVENTS = 200_000
log = logging.getLogger(__name__)


class Profiler:
    """Of rank 0: what one rank waits for, the others take part in. Without steps and without request it costs a
    comparison a step and a look for the file at logged steps.

    Written to <folder>/profile/steps_<first>_<last>: trace.json.gz (chrome://tracing, Perfetto), operators.txt, and
    memory.pickle (pytorch.org/memory_viz) with options.memory; tracked as artifacts.

    Raises:
        ValueError: options.memory without a GPU.
    """

    def __init__(self, options: Profile, folder: Path, device: torch.device, tracker: Tracker | NullTracker) -> None:
        refuse(options, device)
        self._memory, self._folder, self._device, self._tracker = options.memory, folder, device, tracker
        self._first, self._last = options.steps if options.steps else (-1, -1)
        self._running: profile | None = None

    def begin_step(self, step: int) -> None:
        """Before step `step` (from 0, as in checkpoints: the number of steps done)."""
        if self._running is not None and step > self._last:
            self._finish(step - 1)
        if self._running is None and self._first <= step <= self._last:
            self._start(step)

    def look(self, step: int) -> None:
        """At a logged step, `step` steps done: obey the request of a person."""
        request = self._folder / REQUEST
        if self._running is None and request.exists():
            request.unlink(missing_ok=True)
            self._first, self._last = step, step + STEPS_ON_REQUEST - 1
            log.info("profiling steps %d to %d, as %s asks for", self._first, self._last, request)

    def close(self, step: int) -> None:
        """The loop has ended with `step` steps done."""
        if self._running is not None:
            self._finish(step - 1)

    def _start(self, step: int) -> None:
        self._first = step
        cuda = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._running = profile(activities=activities, record_shapes=True, acc_events=True)
        self._running.start()
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)

    def _finish(self, last: int) -> None:
        finished, self._running = self._running, None
        assert finished is not None
        finished.stop()
        where = self._folder / "profile" / f"steps_{self._first:08d}_{last:08d}"
        self._first = self._last = -1
        try:
            written = self._write(finished, where)
        except OSError as error:
            log.warning("the profile could not be written to %s: %s", where, error)
            return
        for path in written:
            self._tracker.artifact(path, f"profile/{where.name}")
        log.info("profile: %s", where)

    def _write(self, finished: Any, where: Path) -> list[Path]:
        where.mkdir(parents=True, exist_ok=True)
        trace, operators = where / "trace.json.gz", where / "operators.txt"
        finished.export_chrome_trace(str(trace))
        key = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        operators.write_text(finished.key_averages().table(sort_by=key, row_limit=_ROWS) + "\n", encoding="utf-8")
        if not self._memory:
            return [trace, operators]
        memory = where / "memory.pickle"
        torch.cuda.memory._dump_snapshot(str(memory))
        torch.cuda.memory._record_memory_history(enabled=None)
        return [trace, operators, memory]


def refuse(options: Profile, device: torch.device) -> None:
    """ValueError where the device has no such record; for all ranks, before the first step."""
    if options.memory and device.type != "cuda":
        raise ValueError(
            "profile.memory records the allocator of a GPU, but this run is on the CPU: set profile.memory=false"
        )
