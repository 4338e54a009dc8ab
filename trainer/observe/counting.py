"""Counts what a step asks of the networks: the exact measure beside the noisy clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.objectives.objective import TEACHER, Nets
from trainer.observe.flops import PassFlops


@dataclass
class PassCounts:
    """Velocity calls and rows by kind, and their model FLOPs, since the last reset."""

    no_grad_passes: int = 0
    graded_passes: int = 0
    no_grad_rows: int = 0
    graded_rows: int = 0
    teacher_rows: int = 0
    flops: int = 0


class CountedNets:
    """Nets that count their calls; dummy rows count, they cost the same. flops: cost of a call, from shapes alone.

    calls: all that were ever begun; called_step, step_calls: no-grad and graded calls begun in the step that `begin_step`
    named. They may be read from another thread.
    """

    def __init__(self, nets: Nets, flops: PassFlops) -> None:
        self._nets, self._flops = nets, flops
        self.shares_module = nets.shares_module
        self.counts = PassCounts()
        self.calls, self.called_step = 0, -1
        self.step_calls = (0, 0)
        self._aside = False

    def begin_step(self, step: int) -> None:
        """The calls from here on belong to `step`."""
        self.called_step, self.step_calls = step, (0, 0)

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        graded = torch.is_grad_enabled()
        self.calls += 1
        if not self._aside:
            self.step_calls = (self.step_calls[0] + (not graded), self.step_calls[1] + graded)
        if graded:
            self.counts.graded_passes += 1
            self.counts.graded_rows += len(t)
        else:
            self.counts.no_grad_passes += 1
            self.counts.no_grad_rows += len(t)
        self.counts.flops += self._flops(x_t, cond, graded)
        if weights is not None:
            self.counts.teacher_rows += int((weights == TEACHER).sum())
        return self._nets.velocity(x_t, t, r, cond, weights)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the context nothing is counted: held-out loss and sampling are not part of a step."""
        kept, self.counts, self._aside = self.counts, PassCounts(), True
        try:
            yield
        finally:
            self.counts, self._aside = kept, False

    def drain(self) -> PassCounts:
        """Counts since the last call."""
        counts, self.counts = self.counts, PassCounts()
        return counts
