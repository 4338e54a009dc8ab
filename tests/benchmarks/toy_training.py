"""Trains a toy network with the trainer's own objectives, optimizer, schedule and averaging."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from configs.schema import Optimizer, Schedule
from tests.trainer.objectives.toy import ToyNets, VectorConditions
from trainer.engines.ema import Ema
from trainer.engines.optim import build_optimizer, learning_rate
from trainer.objectives.objective import Objective, Rows, Targets
from trainer.objectives.roles import assign

BATCH = 128
STEPS = 3000


@dataclass(frozen=True)
class Recipe:
    """What training consists of, beside data, network and seed."""

    objective: Any
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("adam", 5e-4, (0.9, 0.999), max_grad_norm=0.0))
    schedule: Schedule = field(default_factory=Schedule)
    ema_decay: float = 0.99


@dataclass(frozen=True)
class Trained:
    """Final weights; the averages by decay rate. row_passes: cost of all steps in rows of a flow-matching step."""

    raw: nn.Module
    averaged: dict[float, nn.Module]
    row_passes: float

    @property
    def ema(self) -> nn.Module:
        """The recipe's own average."""
        return next(iter(self.averaged.values()))


def row_passes(calls: Iterable[tuple[int, int, bool]]) -> float:
    """Rows that entered the network, as ToyNets records them: a graded row (forward, backward) is 1, another 1/3."""
    return sum(rows if graded else rows / 3 for rows, _, graded in calls)


def make_targets(
    objective: Objective, nets: ToyNets, x: Tensor, labels: Tensor, seed: int, step: int, guided: bool = False
) -> Targets:
    """Draws and no-grad passes of one step; the null condition of a row is the class of another row."""
    roles = assign(objective.role_weights, step, len(x), published=objective.published_partition)
    rows = Rows(seed, step, torch.arange(len(x)), roles)
    draws = objective.draw(rows, tuple(x.shape[1:]), x.device, x.dtype)
    null = labels.roll(1) if guided else labels
    return objective.targets(nets, x, VectorConditions(labels), VectorConditions(null), roles, draws)


def train(
    recipe: Recipe,
    network: Callable[[], nn.Module],
    x: Tensor,
    labels: Tensor,
    seed: int,
    steps: int = STEPS,
    batch: int = BATCH,
    start: nn.Module | None = None,
    decays: tuple[float, ...] = (),
    label: str = "",
) -> Trained:
    """x: [N, dim]; labels: [N] int64. Everything random follows from the seed; `start` are weights to go on from."""
    torch.manual_seed(seed)
    online = network() if start is None else copy.deepcopy(start)
    objective, parameters = recipe.objective, list(online.parameters())
    averages = {decay: copy.deepcopy(online) for decay in decays or (recipe.ema_decay,)}
    emas = [Ema(decay, list(module.parameters()), parameters) for decay, module in averages.items()]
    teacher = next(iter(averages.values())) if objective.teacher == "ema" else None
    nets = ToyNets(online, teacher, shares_module=teacher is None)
    optimizer = build_optimizer(recipe.optimizer, parameters)
    order = sample_order(len(x), steps * batch, seed).reshape(steps, batch)
    for step in trange(steps, desc=f"{label} seed {seed}", leave=False, mininterval=5.0):
        rows = order[step]
        targets = make_targets(objective, nets, x[rows], labels[rows], seed, step, objective.needs_null)
        optimizer.zero_grad(set_to_none=False)
        objective.loss(nets, targets).total.backward()
        if recipe.optimizer.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, recipe.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.schedule, recipe.optimizer.learning_rate, steps)
        optimizer.step()
        for ema in emas:
            ema.update()
    return Trained(online, averages, row_passes(nets.calls))


def sample_order(samples: int, count: int, seed: int) -> Tensor:
    """[count] int64: whole passes through the samples, each in a new order."""
    random = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(samples, generator=random) for _ in range(-(-count // samples))]
    return torch.cat(passes)[:count]
