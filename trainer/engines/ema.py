"""Averaged weights with the published warm-up of the decay rate (method 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ema:
    """averaged := k averaged + (1 - k) online, then k := k + (1 - k)(decay - k) / 2.

    The published recursion starts at k_0 = 0, so its first update is a copy. The copy made at start is that update:
    k starts at k_1 = decay / 2, and an update after each optimizer step equals the published one before use (law 4).

    decay: final decay rate D in (0, 1). averaged, online: this rank's shards in equal order; the averaged ones hold the
    copy already and are moved in place. They may lie on another device (a teacher beside offloaded masters).
    """

    def __init__(self, decay: float, averaged: Sequence[Tensor], online: Sequence[Tensor]) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema.decay must lie between 0 and 1, got {decay}; 0 keeps no averaged weights")
        self.decay = decay
        self.k = decay / 2
        self._averaged, self._online = list(averaged), list(online)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averaged weights once; after the optimizer step."""
        if all(a.device == b.device for a, b in zip(self._averaged, self._online, strict=True)):
            torch._foreach_lerp_(self._averaged, self._online, 1 - self.k)
        else:
            for averaged, online in zip(self._averaged, self._online, strict=True):
                averaged.lerp_(online.to(averaged.device), 1 - self.k)
        self.k += (1 - self.k) * (self.decay - self.k) / 2

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and online values, tensor by tensor, so that no second copy of the model is needed."""
        for averaged, online in zip(self._averaged, self._online, strict=True):
            kept = online.clone()
            online.copy_(averaged)
            averaged.copy_(kept)
