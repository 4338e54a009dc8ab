"""Training steps of the toy backbone on the FSDP2 engine, for the tests."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Ema, Optimizer
from tests.trainer.engines import toy
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.objectives.objective import ONLINE

ROWS, RATE = 12, 0.02
OPTIMIZER = Optimizer(learning_rate=RATE, betas=(0.9, 0.99), weight_decay=0.01, max_grad_norm=1.0)
State = dict[str, Tensor]


def make_engine(dtype: torch.dtype = torch.float64, teacher: str = "online", **options: Any) -> FSDP2:
    return FSDP2(FSDP2Options(**options), toy.ToyBackbone(dtype=dtype), OPTIMIZER, Ema(decay=0.9), teacher)


def own_rows(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return toy.cut(toy.batch(ROWS, step, dtype), dist.get_rank(), dist.get_world_size())


def velocity(engine: FSDP2, rows: dict[str, Tensor], kind: int = ONLINE) -> Tensor:
    weights = torch.full((len(rows["t"]),), kind)
    return engine.nets.velocity(rows["x_t"], rows["t"], rows["r"], rows["cond"], weights)


def train_step(engine: FSDP2, step: int, dtype: torch.dtype, accumulation: int, no_grad_passes: int = 2) -> float:
    """Passes without gradient, then `accumulation` graded passes, the update and the average; the gradient norm."""
    rows = own_rows(step, dtype)
    with torch.no_grad():
        for _ in range(no_grad_passes):
            velocity(engine, rows)
    for part in range(accumulation):
        graded = toy.cut(rows, part, accumulation)
        engine.backward(toy.loss(velocity(engine, graded), graded, ROWS))
    norm = engine.step(RATE)
    engine.update_ema()
    return float(norm)


def whole(engine: FSDP2, group: str) -> State:
    """Whole tensors of a group of the state from all ranks' parts."""
    mine = [(p.name, p.shape, p.start, p.local.clone()) for p in engine.parts() if p.group == group and p.owned]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    state: State = {}
    for name, shape, start, local in itertools.chain(*everyone):
        tensor = state.setdefault(name, torch.full(shape, float("nan"), dtype=local.dtype))
        tensor.view(-1)[start : start + local.numel()] = local
    return state
