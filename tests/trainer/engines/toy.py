"""A small velocity network that follows the Backbone protocol, a batch, and a plain single-process training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 7  # rows do not divide by 2 or 3


class ToyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulate = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 10)
        self.down = nn.Linear(10, WIDTH)
        self.seen: set[torch.dtype] = set()

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        self.seen |= {hidden.dtype, embedding.dtype, self.up.weight.dtype}
        return hidden + self.down(torch.nn.functional.silu(self.up(hidden) + 1) * 2) * (1 + self.modulate(embedding))


class ToyBackbone(nn.Module):
    """F(x_t [B, 1, 2, 2], t, r, cond [B, 3]); `out` has fewer rows than ranks, one bias is idle."""

    def __init__(self, blocks: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(2 + 3, WIDTH)
            self.into = nn.Linear(4, WIDTH)
            self.blocks = nn.ModuleList([ToyBlock() for _ in range(blocks)])
            self.out = nn.Linear(WIDTH, 4)
            self.gain = nn.Parameter(torch.ones(1))
            self.unused = nn.Linear(2, 3)
        self.register_buffer("table", torch.arange(3.0))
        self.to(dtype)
        self.seen: dict[str, torch.dtype] = {}
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor | None, cond: Tensor, weights: Tensor | None = None) -> Tensor:
        self.calls += 1
        r = t if r is None else r
        embedding = self.embed(torch.cat([torch.stack([t, r], dim=1), cond], dim=1))
        hidden = self.into(x_t.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, embedding)
        self.seen = {"t": t.dtype, "x_t": x_t.dtype, "embedding": embedding.dtype, "hidden": hidden.dtype}
        return self.out(torch.tanh(hidden)).reshape(x_t.shape) * self.gain

    def shard_units(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def checkpoint_units(self) -> Sequence[str]:
        return [f"blocks.{index}" for index in range(len(self.blocks))]

    def chained_inputs(self) -> Sequence[str]:
        return ["hidden"]

    def idle_parameters(self) -> Sequence[str]:
        return ["unused.weight", "unused.bias"]


def batch(rows: int, step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The global batch of a step: the same numbers on every rank and in every dtype."""
    generator = torch.Generator().manual_seed(1000 + step)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    x_t, target = torch.randn(rows, 1, 2, 2, **draw), torch.randn(rows, 1, 2, 2, **draw)
    times, cond = torch.rand(rows, 2, **draw) * 2 - 1, torch.randn(rows, 3, **draw)
    named = {"x_t": x_t, "target": target, "t": times[:, 0], "r": times[:, 1], "cond": cond}
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def loss(velocity: Tensor, rows: dict[str, Tensor], count: int) -> Tensor:
    """The part of these rows in the step's mean squared error over `count` rows."""
    return (velocity - rows["target"]).square().mean(dim=(1, 2, 3)).sum() * (7.0 / count)


def cut(rows: dict[str, Tensor], part: int, parts: int) -> dict[str, Tensor]:
    """Part `part` of `parts` equal contiguous parts."""
    size = len(rows["t"]) // parts
    return {name: tensor[part * size : (part + 1) * size] for name, tensor in rows.items()}


def plain_gradients(model: ToyBackbone, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the whole batch at once, in one process."""
    model.zero_grad()
    velocity = model(rows["x_t"], rows["t"], rows["r"], rows["cond"])
    loss(velocity, rows, len(rows["t"])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
