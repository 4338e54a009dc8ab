"""How an exported transformer learns the exact time and the target time of a call, from the scheduler beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class FollowsScheduler:
    """Mixin before a transformer with TargetTime: `with transformer.following(scheduler):` its calls take (t, r) from
    scheduler.now().

    What a pipeline hands in has been rounded to the latents' dtype, and it knows no target time.
    """

    _scheduler: Any = None

    @contextmanager
    def following(self, scheduler: Any) -> Iterator[None]:
        self._scheduler = scheduler
        try:
            yield
        finally:
            self._scheduler = None

    def exact_times(self, t: Tensor, target_time: Tensor | None) -> tuple[Tensor, Tensor]:
        """t and r [B] in [-1, 1], float32 (float64 where t is), on the device of t [B].

        target_time: r [B] of a caller that knows it. Outside of `following` it is 0: one jump to the end, which is what
        the presets 1nfe, 2nfe and 4nfe ask at every step.
        """
        t = t if t.dtype == torch.float64 else t.float()
        if target_time is not None:
            return t, target_time.to(t)
        if self._scheduler is None:
            return t, torch.zeros_like(t)
        now, target = self._scheduler.now()
        return torch.full_like(t, now), torch.full_like(t, target)


class FollowsByTimestep(FollowsScheduler):
    """The same for a transformer whose forward pass takes `timestep`, time_scale times t."""

    time_scale: float

    def forward(
        self, hidden_states: Tensor, *args: Any, timestep: Tensor, target_time: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the base class's; target_time: r [B], see FollowsScheduler.exact_times."""
        me: Any = self
        with me.times(*self.exact_times(timestep / self.time_scale, target_time)):
            return super().forward(hidden_states, *args, timestep=timestep, **kwargs)  # type: ignore[misc]
