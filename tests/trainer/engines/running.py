"""Training steps of the toy backbone on an engine, for the tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Ema, Optimizer
from tests.trainer.engines import toy
from trainer.engines.engine import Engine
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.engines.zero3 import Zero3, Zero3Options
from trainer.objectives.objective import ONLINE

ROWS, RATE = 12, 0.02
OPTIMIZER = Optimizer(learning_rate=RATE, betas=(0.9, 0.99), weight_decay=0.01, max_grad_norm=1.0)
State = dict[str, Tensor]


def make_engine(dtype: torch.dtype = torch.float64, teacher: str = "online", **options: Any) -> FSDP2:
    return FSDP2(FSDP2Options(**options), toy.ToyBackbone(dtype=dtype), OPTIMIZER, Ema(decay=0.9), teacher)


def make_zero3(teacher: str = "online", **options: Any) -> Zero3:
    return Zero3(Zero3Options(**options), toy.ToyBackbone(), OPTIMIZER, Ema(decay=0.9), teacher)


def own_rows(step: int, dtype: torch.dtype, count: int = ROWS) -> dict[str, Tensor]:
    """This rank's part of a global batch of `count` rows."""
    return toy.cut(toy.batch(count, step, dtype), dist.get_rank(), dist.get_world_size())


def velocity(engine: Engine, rows: dict[str, Tensor], kind: int = ONLINE) -> Tensor:
    weights = torch.full((len(rows["t"]),), kind)
    return engine.nets.velocity(rows["x_t"], rows["t"], rows["r"], rows["cond"], weights)


def train_step(
    engine: Engine, step: int, dtype: torch.dtype, accumulation: int, no_grad_passes: int = 2, count: int = ROWS
) -> float:
    """Passes without gradient, then `accumulation` graded passes, the update and the average; the gradient norm."""
    rows = own_rows(step, dtype, count)
    with torch.no_grad():
        for _ in range(no_grad_passes):
            velocity(engine, rows)
    for part in range(accumulation):
        graded = toy.cut(rows, part, accumulation)
        engine.backward(toy.loss(velocity(engine, graded), graded, count))
    norm = engine.step(RATE)
    engine.update_ema()
    return float(norm)
