"""The residual MLP of the benchmarks: small enough to train on a CPU core in minutes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_OCTAVES = 6


class _Block(nn.Module):
    """h + (1 + gate) * MLP(h * (1 + scale) + shift); the hidden layer is twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, dim=-1)
        return h + (1 + gate) * self.down(F.silu(self.up(h * (1 + scale) + shift)))


class ResidualMLP(nn.Module):
    """F(x_t, t, r, label) over flat samples [B, dim].

    Fourier features (6 octaves from pi/2) of the signed t and of r, beside the raw times, pass a two-layer SiLU MLP; a
    class embedding is added, and SiLU of the sum sets shift, scale and gate of every residual block. The output starts
    at zero. There is no norm: with one the consistency loss is less stable at a constant learning rate, because a step
    of Adam moves the velocity further.
    """

    frequencies: Tensor

    def __init__(self, dim: int = 64, classes: int = 10, width: int = 192, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi / 2 * 2.0 ** torch.arange(_OCTAVES))
        self.embed = nn.Linear(dim, width)
        self.time = nn.Sequential(nn.Linear(4 * _OCTAVES + 2, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        """x_t: [B, dim]; t, r: [B] in [-1, 1]; labels: [B] int64. The velocity [B, dim]."""
        times = torch.stack([t, r], dim=1)
        angles = (times[:, :, None] * self.frequencies).flatten(1)
        condition = self.time(torch.cat([times, angles.sin(), angles.cos()], dim=1)) + self.label(labels)
        h = self.embed(x_t)
        for block in self.blocks:
            h = block(h, condition)
        return self.out(h)
