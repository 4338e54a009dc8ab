"""Rows that every rank runs in each stage of a step, summed over many steps, without a network (for passes.py)."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.pass_counts import RANKS, SHAPE, CountedNets, Setting
from tests.trainer.objectives.cases import Samples, role_rows, samples
from trainer.objectives.objective import Rows
from trainer.objectives.twinflow import TwinFlow


class FreeNet:
    """Costs nothing and returns nothing: for counting rows."""

    def __init__(self, shares_module: bool) -> None:
        self.shares_module = shares_module

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x_t)


@dataclass
class Balance:
    """Rows of every stage summed over the steps; [stages][ranks]. A stage is the n-th no-grad call of a kind in a step,
    or the graded calls together."""

    setting: Setting
    rows: dict[str, list[int]]

    @property
    def worst(self) -> float:
        """Largest max / mean over ranks of any stage."""
        return max(max(of_rank) * len(of_rank) / sum(of_rank) for of_rank in self.rows.values())

    @property
    def bound(self) -> bool:
        """Whether a rank's window is a whole number of role periods, so that the bar applies."""
        return self.setting.rows % self.setting.period == 0


def balance(setting: Setting, steps: int) -> Balance:
    objective = setting.objective
    batch = samples(RANKS * setting.rows, shape=SHAPE)
    summed: dict[str, list[int]] = {}
    for step, rank in itertools.product(range(steps), range(RANKS)):
        nets = CountedNets(FreeNet(setting.teacher == "online"))
        window = slice(rank * setting.rows, (rank + 1) * setting.rows)
        stages = count_rows(objective, nets, batch[window], window, step, rank)
        stages["graded"] = setting.rows
        for stage, rows in stages.items():
            summed.setdefault(stage, [0] * RANKS)[rank] += rows
    return Balance(setting, summed)


def count_rows(
    objective: TwinFlow, nets: CountedNets, local: Samples, window: slice, step: int, rank: int
) -> dict[str, int]:
    roles = role_rows(objective, step, RANKS * len(local.x), rank, RANKS)
    draws = objective.draw(Rows(0, step, torch.arange(window.start, window.stop), roles), SHAPE, "cpu", torch.float64)
    objective.targets(nets, local.x, local.cond, local.null, roles, draws)
    seen: Counter[bool] = Counter()
    stages: dict[str, int] = {}
    for taught, _, rows in nets.calls:
        seen[taught] += 1
        stages[f"{'teacher' if taught else 'online'} {seen[taught]}"] = rows
    return stages
