"""Distances between a predicted and a target velocity, and the graded pass that every objective shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.objectives.objective import LossTerms, Nets, Targets
from trainer.objectives.transport import rowwise

ERROR, TIME_BIN = "error/", "error/t_"
"""Prefixes of the two names that a row's error is reported under: of its role, and of its bin of |t|."""


def row_loss(error: Tensor, kind: str, alpha: float = 1.0, scale: float = 1e-3) -> Tensor:
    """Loss of every row [B] of error = prediction - target [B, ...].

    l2: m, the mean square. barron: m w / scale, w = sg((m / ((scale^2 + 1e-8) |alpha - 2|) + 1)^((alpha - 2) / 2)),
    w = 1 for alpha = 2 (method 2.2): a robust loss whose gradient has nearly the same norm for every row.
    """
    m = error.square().flatten(1).mean(dim=1)
    if kind == "l2":
        return m
    if alpha == 2:
        return m / scale
    w = (m.detach() / ((scale**2 + 1e-8) * abs(alpha - 2)) + 1) ** ((alpha - 2) / 2)
    return m * w / scale


def interval_weight(t: Tensor, r: Tensor) -> Tensor:
    """omega = 1 + tan((1 - (|t| - |r|)) pi / 2.5): short intervals weigh more, from 1 to 4.08 (method 2.2)."""
    return 1 + torch.tan((1 - (t.abs() - r.abs())) * math.pi / 2.5)


def graded_loss(
    nets: Nets, targets: Targets, kind: str, alpha: float, scale: float, residual_clamp: float
) -> LossTerms:
    """The one pass with gradient: sum over rows of weight * loss, and of gap_weight * rectification loss."""
    prediction = nets.velocity(targets.x_t, targets.t, targets.r, targets.cond)
    error, tally = _error(prediction.detach(), targets, residual_clamp)
    target = prediction.detach() - error
    base = row_loss(prediction - target, kind, alpha, scale)
    terms = {"base": (targets.weight.to(base.dtype) * base).sum()}
    if targets.gap is not None and targets.gap_weight is not None:
        rectified = row_loss(prediction - (prediction.detach() - targets.gap), kind, alpha, scale)
        terms["rectify"] = (targets.gap_weight.to(base.dtype) * rectified).sum()
    with torch.no_grad():
        groups = targets.groups.to(base.dtype)
        sums, counts = groups.T @ error.square().flatten(1).mean(dim=1), groups.sum(dim=0)
        tally |= {name: torch.stack([sums[i], counts[i]]) for i, name in enumerate(targets.group_names)}
    return LossTerms(
        sum(terms.values(), start=base.new_zeros(())), {name: value.detach() for name, value in terms.items()}, tally
    )


@torch.no_grad()
def _error(prediction: Tensor, targets: Targets, residual_clamp: float) -> tuple[Tensor, dict[str, Tensor]]:
    """F - target [R, ...]: F - v, or where the row is consistent the clipped residual q (B1)."""
    if targets.consistent is None or targets.coefficient is None or targets.integral is None:
        return prediction - targets.velocity, {}
    residual = rowwise(targets.coefficient, prediction) * prediction - targets.integral - targets.velocity
    limit = rowwise(torch.where(targets.consistent, residual_clamp, math.inf), prediction)
    error = residual.clamp(-limit, limit)
    clamped = (residual != error).flatten(1).to(error.dtype).mean(dim=1).sum()
    return error, {"clamped_share": torch.stack([clamped, targets.consistent.sum().to(error.dtype)])}


def group_rows(roles: Tensor, names: tuple[str, ...], t: Tensor, bins: int = 5) -> tuple[Tensor, tuple[str, ...]]:
    """Indicator matrix [R, len(names) + bins] of the rows' role and bin of |t|, and the metric name of every column."""
    by_role = torch.nn.functional.one_hot(roles, len(names))
    by_time = torch.nn.functional.one_hot((t.abs() * bins).long().clamp_max(bins - 1), bins)
    labels = [f"{ERROR}{name}" for name in names]
    labels += [f"{TIME_BIN}{i / bins:.1f}_{(i + 1) / bins:.1f}" for i in range(bins)]
    return torch.cat([by_role, by_time], dim=1).to(torch.float32), tuple(labels)


def mean_square(values: Tensor) -> Tensor:
    """Tally of values [R, ...]: the sum over rows of their mean squares, and the number of rows."""
    squares = values.square().flatten(1).mean(dim=1)
    return torch.stack([squares.sum(), torch.ones_like(squares).sum()])


def rows_of_roles(targets: Targets) -> dict[str, int]:
    """Graded rows by the role that their error is reported under."""
    counts = dict(zip(targets.group_names, targets.groups.sum(dim=0).long().tolist(), strict=True))
    return {name.removeprefix(ERROR): n for name, n in counts.items() if n and not name.startswith(TIME_BIN)}
