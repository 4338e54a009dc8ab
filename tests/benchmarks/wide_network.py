"""A velocity network of equal wide blocks, for benchmarks that move its state around more than they compute with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Ema, Optimizer
from trainer.engines.fsdp2 import FSDP2, FSDP2Options

PIXELS = 4


class WideBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0.1 * self.down(torch.tanh(self.up(hidden)))


class WideBackbone(nn.Module):
    """F(x_t [B, 1, 2, 2], t, r, cond): 2 (width^2 + width) parameters a block."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(PIXELS + 2, width)
        self.blocks = nn.ModuleList([WideBlock(width) for _ in range(blocks)])
        self.out = nn.Linear(width, PIXELS)

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any = None, weights: Tensor | None = None) -> Tensor:
        hidden = self.into(torch.cat([x_t.flatten(1), t[:, None], r[:, None]], dim=1))
        for block in self.blocks:
            hidden = block(hidden)
        return self.out(hidden).reshape(x_t.shape) * 1.0  # FSDP2 wants no view

    def shard_units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def checkpoint_units(self) -> Sequence[str]:
        return [f"blocks.{index}" for index in range(len(self.blocks))]

    def idle_parameters(self) -> Sequence[str]:
        return []


def wide_engine(blocks: int, width: int) -> FSDP2:
    """FSDP2 on a backbone that was built on meta; its shards start as small numbers."""
    with torch.device("meta"):
        backbone = WideBackbone(blocks, width)
    options = FSDP2Options(activation_checkpointing=False)
    return FSDP2(options, backbone, Optimizer(), Ema(decay=0.9), "online", load=_start)


@torch.no_grad()
def _start(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.to_local().fill_(0.01)  # type: ignore[attr-defined]


def train_step(engine: FSDP2, rows: int = 8) -> None:
    """One optimizer step on noise."""
    noise = torch.randn(rows, 1, 2, 2)
    times = torch.rand(rows)
    velocity = engine.nets.velocity(noise, times, times, None)
    engine.backward((velocity - noise).square().mean())
    engine.step(1e-4)
    engine.update_ema()
