"""Ranks that act together: where one fails, all raise the same error, and nobody waits for the one that failed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from data.s3 import DataError
from trainer.saving.certificate import CheckpointError

_T = TypeVar("_T")


class Unison:
    """All ranks on a gloo group of their own, or a world of one without a process group. Building it is collective, and
    so are its methods; call them from one thread at a time (two threads on one gloo group abort the process).

    timeout_s: longest wait for another rank.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank, self._ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self._ranks > 1 else None

    def together(self, action: Callable[[], _T]) -> _T:
        """Do something on every rank; its own result, or one and the same CheckpointError on all."""
        message, result, cause = "", None, None
        try:
            result = action()
        except Exception as error:  # whatever it is, the others must not wait for this rank: they raise it too
            explained = isinstance(error, CheckpointError | DataError)
            message, cause = (str(error) if explained else "") or repr(error), error
        messages = [message]
        if self._group is not None:
            messages = [""] * self._ranks
            dist.all_gather_object(messages, message, group=self._group)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(messages) if text]
        if failed:
            more = f" (and {len(failed) - 3} more ranks)" if len(failed) > 3 else ""
            raise CheckpointError("; ".join(failed[:3]) + more) from cause
        return cast(_T, result)

    def gather(self, own: _T) -> list[_T]:
        """What every rank holds, on rank 0; empty elsewhere."""
        if self._group is None:
            return [own]
        everything: list[Any] = [None] * self._ranks if self.rank == 0 else []
        dist.gather_object(own, everything if self.rank == 0 else None, dst=0, group=self._group)
        return everything

    def from_rank_0(self, value: _T) -> _T:
        box = [value]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
