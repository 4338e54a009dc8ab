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
from trainer.objectives.objective import ONLINE, TEACHER

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


def outputs(engine: Engine, dtype: torch.dtype, kind: int = ONLINE) -> Tensor:
    """A pass without gradient over rows that no step has seen."""
    with torch.no_grad():
        return velocity(engine, own_rows(9, dtype), kind)


def plain_output(state: State) -> Tensor:
    """What `outputs` should be with these weights."""
    dtype = next(iter(state.values())).dtype
    model = toy.ToyBackbone(dtype=dtype)
    model.load_state_dict(state)
    rows = own_rows(9, dtype)
    with torch.no_grad():
        return model(rows["x_t"], rows["t"], rows["r"], rows["cond"])


def shared_state(engine: Engine, which: str) -> State:
    """`full_state` on every rank."""
    box = [engine.full_state(which)]
    assert (dist.get_rank() == 0) == bool(box[0]), "the full state is rank 0's alone"
    dist.broadcast_object_list(box)
    return box[0]


def outputs_by_weights(engine: Engine, dtype: torch.dtype) -> dict[str, Any]:
    """Three steps, then what the engine computes with each kind of weights, and what it should."""
    initial = outputs(engine, dtype)
    for step in range(3):
        outputs(engine, dtype, TEACHER)
        train_step(engine, step, dtype, 2)
    online, average = outputs(engine, dtype), shared_state(engine, "ema")
    expected = {"online": plain_output(shared_state(engine, "online")), "ema": plain_output(average)}
    with engine.weights("ema"):
        evaluated = outputs(engine, dtype)
    return {
        "initial": initial,
        "online": online,
        "evaluated": evaluated,
        "afterwards": outputs(engine, dtype),
        "teacher": outputs(engine, dtype, TEACHER),
        "shares": engine.nets.shares_module,
        "expected": expected,
        "averages": len([part for part in engine.parts() if part.group == "ema"]),
        "parameters": len([part for part in engine.parts() if part.group == "parameter"]),
    }


def poisoned_step(engine: Engine) -> list[Any]:
    """A float32 step whose gradient is infinite on rank 1 alone: its norm, whether the state is unchanged, the steps
    counted; then a sound one: its norm, whether the state moved."""
    train_step(engine, 0, torch.float32, 2)
    before = {(p.group, p.name): p.local.clone() for p in engine.parts()}
    rows = own_rows(1, torch.float32)
    factor = float("inf") if dist.get_rank() == 1 else 1.0
    engine.backward(toy.loss(velocity(engine, rows), rows, ROWS) * factor)
    norm = float(engine.step(RATE))
    unchanged = all(torch.equal(p.local, before[p.group, p.name]) for p in engine.parts())
    steps = engine.counters()["optimizer_step"]
    recovered = train_step(engine, 1, torch.float32, 2)
    moved = not all(torch.equal(p.local, before[p.group, p.name]) for p in engine.parts())
    return [norm, unchanged, steps, recovered, moved]
