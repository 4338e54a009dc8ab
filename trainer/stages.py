"""Named stages of a step: where the time goes, and where memory ran out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

REMEDIES = {
    "agree": "lower data.workers or data.prefetch: this machine is short of memory",
    "data": "lower data.workers, data.prefetch or train.global_batch_size",
    "encode": "lower train.micro_batch_size or train.global_batch_size, or precompute latents and embeddings",
    "targets": "set train.chunk_rows to at most half of the rows of a rank's window",
    "graded pass": "halve train.micro_batch_size (accumulation doubles, the result stays the same) or turn on "
    "engine.activation_checkpointing",
    "optimizer step": "use more ranks, or objective.teacher=online and ema.decay=0 to hold fewer copies",
    "held out": "lower train.micro_batch_size",
    "save": "a save holds a rank's part of the state in host memory once more: use more ranks, or fewer on each machine",
    "sample": "lower sample.columns or evaluate.images",
}


class OutOfMemory(RuntimeError):
    """Memory ran out in a named stage."""


class Stages:
    """`with stages("targets"):` adds up wall time by name and names the stage when memory runs out.

    longest: seconds of the longest visit of each stage; entered: called with the name of every stage that begins.
    now: the innermost stage under way, empty between stages; entries: stages begun so far; both may be read from
    another thread.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.longest: dict[str, float] = defaultdict(float)
        self.entered: Callable[[str], None] = lambda name: None
        self.now, self.entries = "", 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin, outer = time.perf_counter(), self.now
        self.now, self.entries = name, self.entries + 1
        self.entered(name)
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            raise OutOfMemory(f"out of memory in stage '{name}': {error}\nRemedy: {REMEDIES[name]}.") from error
        finally:
            self.now = outer
            elapsed = time.perf_counter() - begin
            self.seconds[name] += elapsed
            self.longest[name] = max(self.longest[name], elapsed)

    def drain(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def _is_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError; its text is the only mark.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
