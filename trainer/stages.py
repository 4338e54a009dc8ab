"""Named stages of a step: where the time goes, and where memory ran out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

REMEDIES = {
    "data": "lower data.workers, data.prefetch or train.global_batch_size",
    "encode": "lower train.micro_batch_size or train.global_batch_size, or precompute latents and embeddings",
    "targets": "set train.chunk_rows to at most half of the rows of a rank's window",
    "graded pass": "halve train.micro_batch_size (accumulation doubles, the result stays the same) or turn on "
    "engine.activation_checkpointing",
    "optimizer step": "use more ranks, or objective.teacher=online and ema.decay=0 to hold fewer copies",
    "save": "a save holds a rank's part of the state in host memory once more: use more ranks, or fewer on each machine",
    "sample": "lower sample.columns or evaluate.images",
}


class OutOfMemory(RuntimeError):
    """Memory ran out in a named stage."""


class Stages:
    """`with stages("targets"):` adds up wall time by name and names the stage when memory runs out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            raise OutOfMemory(f"out of memory in stage '{name}': {error}\nRemedy: {REMEDIES[name]}.") from error
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def drain(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds


def _is_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError; its text is the only mark.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)
