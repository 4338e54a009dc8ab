"""Collapse alarm: does the one-step generator still answer different noise with different images?

Under one condition, the variance of samples over the noise is set against the variance of real data under that
condition. A generator that maps all noise to one image scores 0, one as varied as the data scores 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def spread(samples: Tensor) -> Tensor:
    """Variance over the samples of each group, unbiased, averaged over all dimensions: [groups] float64.

    samples: [groups, n, ...], n >= 2 samples of one condition per group. ValueError otherwise.
    """
    if samples.ndim < 3 or samples.shape[1] < 2:
        raise ValueError(f"expected samples [groups, n >= 2, ...], got {tuple(samples.shape)}")
    return samples.double().flatten(2).var(dim=1).mean(dim=1)


def collapse_score(samples: Tensor, reference: Tensor | float) -> float:
    """Mean over groups of min(1, variance / reference): 1 is as varied as the reference, 0 is collapsed.

    samples: [groups, n, ...]; reference: variance of real data under one condition, scalar or [groups] (see `spread`).
    Capped at 1 per group, so that a group that blows up does not hide others that collapsed; samples that are not
    finite count 0. ValueError where the reference is not positive.
    """
    real = torch.as_tensor(reference, dtype=torch.float64, device=samples.device)
    if not bool((real > 0).all()):
        raise ValueError("the reference variance must be positive: measure it on real data with spread()")
    return float((spread(samples) / real).clamp(max=1.0).nan_to_num(nan=0.0).mean())


@dataclass
class CollapseAlarm:
    """Judges a series of scores; `best` and `checks` are its state over a resume.

    A model at the start of training may rightly answer with blurred means, so the alarm is armed by the first score of
    at least `armed_at`. Armed, it trips when the score is below `threshold`, or below `drop` times the best so far.
    Not armed, it trips after `patience` checks: such a run never became a generator.
    """

    threshold: float = 0.2
    drop: float = 0.4
    armed_at: float = 0.3
    patience: int = 20
    best: float = 0.0
    checks: int = 0

    def check(self, score: float) -> str | None:
        """Why the alarm trips, or None. Raises ValueError for a score outside [0, 1]."""
        if not (math.isfinite(score) and 0.0 <= score <= 1.0):
            raise ValueError(f"a collapse score lies in [0, 1], not {score}")
        self.checks += 1
        self.best = max(self.best, score)
        if self.best < self.armed_at:
            if self.checks >= self.patience:
                return (
                    f"one-step samples show {score:.0%} of the variance of real data and never reached "
                    f"{self.armed_at:.0%} in {self.checks} checks: the generator answers all noise alike"
                )
            return None
        if score < self.threshold:
            return f"one-step samples collapsed: {score:.0%} of the variance of real data, below {self.threshold:.0%}"
        if score < self.drop * self.best:
            return f"one-step samples are collapsing: {score:.0%} of the variance of real data, {self.best:.0%} at best"
        return None
