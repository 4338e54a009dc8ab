"""The second time embedding of TwinFlow, for every diffusers backbone that embeds times in one module of its own.

temb = E1(t) + (t - r) E2(r), with E1 the backbone's own embedding and E2 its sibling of the same class, `<name of E1>_2`
(the published key names). Times lie in [-1, 1]; a negative time is a negative argument of the sinusoid: equal cosines,
negated sines. At t = r the sum is E1(t), bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

SINUSOID = 256
"""Features of a time in every backbone."""


class Sinusoid(Timesteps):
    """Sinusoidal features of times [B] -> [B, num_channels], float32; float64 for float64 times.

    Formula and float32 numbers are those of diffusers' `Timesteps`, which knows float32 only.
    """

    @classmethod
    def like(cls, base: Timesteps) -> Sinusoid:
        return cls(base.num_channels, base.flip_sin_to_cos, base.downscale_freq_shift, base.scale)

    def forward(self, timesteps: Tensor) -> Tensor:
        if timesteps.dtype != torch.float64:
            return super().forward(timesteps)
        half = self.num_channels // 2
        index = torch.arange(half, dtype=torch.float64, device=timesteps.device)
        frequencies = torch.exp(-math.log(10000) * index / (half - self.downscale_freq_shift))
        angles = self.scale * timesteps[:, None] * frequencies
        parts = (angles.cos(), angles.sin()) if self.flip_sin_to_cos else (angles.sin(), angles.cos())
        return torch.cat(parts, dim=-1)


class TargetTime:
    """Mixin of a transformer with a module E1(timestep, ...) of its own, which it calls once per forward pass and which
    returns an embedding [B, D] or several.

    The times travel beside the forward arguments, because diffusers casts `timestep` to the activations' dtype and
    bfloat16 cannot tell .5003 from .5001. Hooks are bound methods, so a deep copy of the model gets its own.
    """

    time_embedding: ClassVar[str] = "time_text_embed"
    """Attribute that holds E1."""
    time_scale: float = 1.0
    """What E1 takes for the time 1."""
    _times: tuple[Tensor, Tensor] | None

    def add_target_time(self) -> None:
        """Create E2 as a copy of E1 and hook both into the forward pass; call once, at the end of __init__."""
        first = getattr(self, self.time_embedding)
        for module in list(first.modules()):
            for name, child in module.named_children():
                if type(child) is Timesteps:
                    setattr(module, name, Sinusoid.like(child))
        setattr(self, f"{self.time_embedding}_2", copy.deepcopy(first))
        self._times = None
        first.register_forward_pre_hook(self._give_exact_time)
        first.register_forward_hook(self._add_second_embedding, with_kwargs=True)

    def target_argument(self, t: Tensor, r: Tensor) -> Tensor:
        """What E2 takes in the place of a time."""
        return r * self.time_scale

    @contextmanager
    def times(self, t: Tensor, r: Tensor) -> Iterator[None]:
        """The forward pass inside the context is conditioned on times t and target times r, [B] each."""
        self._times = (t, r)
        try:
            yield
        finally:
            self._times = None

    def _give_exact_time(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        t, _ = self._exact_times()
        return (t * self.time_scale, *args[1:])

    def _add_second_embedding(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], first: Any
    ) -> Tensor | tuple[Tensor, ...]:
        t, r = self._exact_times()
        second = getattr(self, f"{self.time_embedding}_2")(self.target_argument(t, r), *args[1:], **kwargs)
        gap = (t - r)[:, None]
        if isinstance(first, Tensor):
            return (first + gap * second).to(first.dtype)
        return tuple((a + gap * b).to(a.dtype) for a, b in zip(first, second, strict=True))

    def _exact_times(self) -> tuple[Tensor, Tensor]:
        if self._times is None:
            raise RuntimeError("the time embedding was called outside `with model.times(t, r):`; call the model itself")
        return self._times
