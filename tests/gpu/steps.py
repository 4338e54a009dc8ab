"""TwinFlow steps of a tiny backbone on any device, by an engine and, for comparison, by plain autograd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import Ema, Lora, Optimizer
from models import lora, tiny
from tests.trainer.bare_run import EVEN, unloaded
from trainer.engines.engine import whole
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.engines.networks import Networks
from trainer.objectives.objective import Nets, Rows
from trainer.objectives.roles import assign
from trainer.objectives.twinflow import TwinFlow

OBJECTIVE = TwinFlow(order=2, teacher="online", roles={**EVEN}, enhanced_ratio=0.5)
ROWS, STEP, BETA, RATE = 4, 5, 0.9, 1e-3
OPTIMIZER = Optimizer(learning_rate=RATE, betas=(BETA, 0.99), max_grad_norm=0.0)


def loaded(name: str, place: Path, dtype: torch.dtype, adapters: Lora | None = None) -> Any:
    """A tiny backbone on the CPU; adapters start scattered, so that both of their factors get gradients."""
    backbone = unloaded(name, place, dtype)
    if adapters is not None:
        lora.add(backbone, adapters, OBJECTIVE.teacher)
    backbone.to_empty(device="cpu").load(str(place))
    if adapters is not None:
        lora.initialise(backbone, 0, scatter=True)
    for idle in backbone.idle_parameters():
        backbone.get_parameter(idle).requires_grad_(False)
    return backbone


def losses(nets: Nets, backbone: Any, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Of the two micro-batches of one step. The noise is drawn on the CPU: here networks are compared."""
    x, cond, null = (part.to(device, dtype) for part in tiny.example(backbone, ROWS))
    roles = assign(OBJECTIVE.role_weights, STEP, ROWS)
    draws = OBJECTIVE.draw(Rows(0, STEP, torch.arange(ROWS), roles), tuple(x.shape[1:]), dtype=torch.float64)
    on_device = {name: value.to(dtype) for name, value in vars(draws).items()}
    on_device |= {name: value.to(device) for name, value in on_device.items() if name.startswith("z")}
    targets = OBJECTIVE.targets(nets, x, cond, null, roles, type(draws)(**on_device))
    for begin in range(0, ROWS, 2):
        yield OBJECTIVE.loss(nets, targets[begin : begin + 2]).total


def plain_gradients(backbone: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """By parameter, on the CPU, without an engine."""
    for loss in losses(Networks(backbone, None), backbone, torch.device("cpu"), dtype):
        loss.backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


def engine_gradients(backbone: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """By parameter, read from the first moments after one update of FSDP2 on one rank."""
    engine = FSDP2(FSDP2Options(**options), backbone, OPTIMIZER, Ema(decay=0.0), OBJECTIVE.teacher, device)
    for loss in losses(engine.nets, backbone, device, dtype):
        engine.backward(loss)
    engine.step(RATE)
    return {name: moment.cpu() / (1 - BETA) for name, moment in whole(engine, "exp_avg").items()}
