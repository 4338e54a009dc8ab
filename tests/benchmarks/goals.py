"""The goals of the quality benchmark as bars on its figures (means over seeds)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ROW_PASSES = 1.75
Distances = Mapping[str, Mapping[str, Mapping[str, list[float]]]]
Means = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Goal:
    """One bar: what is measured, its value, the bar, and whether it is met."""

    name: str
    value: float
    bar: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    def __str__(self) -> str:
        relation = "<=" if self.at_most else ">="
        return f"{'met   ' if self.met else 'MISSED'} {self.name}: {self.value:.3f} {relation} {self.bar:.3f}"


def parity_goals(published: Means, cost: float) -> list[Goal]:
    """Goal 1: the published settings, at one evaluation."""
    return [
        Goal("published, 1 NFE, FD_pca", published["1"]["fd_pca"], 0.36),
        Goal("published, 1 NFE, FD_net", published["1"]["fd_net"], 2.0),
        Goal("published, row passes", cost, ROW_PASSES),
    ]


def warm_start_goals(warm: Means, cost: float) -> list[Goal]:
    """Goal 3: flow matching first, then a third of its steps with the recipe for such a start."""
    return [
        Goal("warm start, 1 NFE, FD_pca", warm["1"]["fd_pca"], 0.30),
        Goal("warm start, 1 NFE, FD_net", warm["1"]["fd_net"], 1.8),
        Goal("warm start, row passes", cost, ROW_PASSES),
    ]


def ahead_goals(default: Means, cost: float, toys: Distances, weights: str) -> list[Goal]:
    """Goal 2: the default recipe at 1, 2, 4 and 100 evaluations, its cost, and the toys."""
    goals = [Goal("default, row passes", cost, ROW_PASSES)]
    for evaluations, fd_pca, fd_net in (("1", 0.28, 1.7), ("2", 0.25, 1.4), ("4", 0.25, 1.4)):
        goals.append(Goal(f"default, {evaluations} NFE, FD_pca", default[evaluations]["fd_pca"], fd_pca))
        goals.append(Goal(f"default, {evaluations} NFE, FD_net", default[evaluations]["fd_net"], fd_net))
    goals.append(Goal("default, 100 NFE, FD_pca", default["100"]["fd_pca"], 0.28))
    for evaluations, measures in default.items():
        for measure, bar in (("memory_ratio", 0.94), ("div", 0.80), ("accuracy", 0.98)):
            goals.append(Goal(f"default, {evaluations} NFE, {measure}", measures[measure], bar, at_most=False))
    return goals + [toy_goal(toy, recipes, weights) for toy, recipes in toys.items()]


def toy_goal(toy: str, recipes: Mapping[str, Mapping[str, list[float]]], weights: str) -> Goal:
    """The default's distance is at most the published settings' (same kind of weights) plus twice the seed deviation,
    the root of the mean of both recipes' variances over the seeds."""
    default, published = np.array(recipes["default"][weights]), np.array(recipes["published"][weights])
    deviation = np.sqrt((default.var(ddof=1) + published.var(ddof=1)) / 2) if len(default) > 1 else 0.0
    return Goal(f"{toy}, 1 NFE, energy distance x 1000", default.mean(), published.mean() + 2 * deviation)
