"""Small conditions and networks for tests of the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.objectives.objective import TEACHER


@dataclass(frozen=True)
class VectorConditions:
    """A condition vector per row [B, K]."""

    vectors: Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: Any) -> VectorConditions:
        return VectorConditions(self.vectors[rows])

    def cat(self, *others: VectorConditions) -> VectorConditions:
        return VectorConditions(torch.cat([self.vectors, *(other.vectors for other in others)]))


class ToyNets:
    """Online and teacher modules called as module(x_t, t, r, vectors); records (rows, teacher rows, grad) of calls."""

    def __init__(self, online: nn.Module, teacher: nn.Module | None = None, shares_module: bool | None = None) -> None:
        self.online, self.teacher = online, teacher
        self.shares_module = teacher is None if shares_module is None else shares_module
        self.calls: list[tuple[int, int, bool]] = []

    def velocity(
        self, x_t: Tensor, t: Tensor, r: Tensor, cond: VectorConditions, weights: Tensor | None = None
    ) -> Tensor:
        taught = torch.zeros(len(t), dtype=torch.bool) if weights is None else weights == TEACHER
        self.calls.append((len(t), int(taught.sum()), torch.is_grad_enabled()))
        if self.teacher is None or not taught.any():
            return self.online(x_t, t, r, cond.vectors)
        with torch.no_grad():
            by_teacher = self.teacher(x_t, t, r, cond.vectors)
        if taught.all():
            return by_teacher
        assert self.shares_module, "a call of separate modules holds rows of one kind"
        return torch.where(
            taught.reshape(-1, *(1,) * (x_t.dim() - 1)), by_teacher, self.online(x_t, t, r, cond.vectors)
        )


class GoldenNet(nn.Module):
    """The network of the recorded files: F = W2 tanh(W1 u + b1) + b2, u = (x_t, t, s, t s, sin 2t, cos 3s, c)."""

    def __init__(self, W1: Tensor, b1: Tensor, W2: Tensor, b2: Tensor) -> None:
        super().__init__()
        self.W1, self.b1, self.W2, self.b2 = map(nn.Parameter, (W1, b1, W2, b2))

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, c: Tensor) -> Tensor:
        t, r = t[:, None], r[:, None]
        u = torch.cat([x_t.flatten(1), t, r, t * r, torch.sin(2 * t), torch.cos(3 * r), c], dim=1)
        return (torch.tanh(u @ self.W1.T + self.b1) @ self.W2.T + self.b2).reshape(x_t.shape)
