"""Parts of a target that need the teacher: guidance (method E1, E2) and recursive consistency (method B1).

Both are tasks of trainer/objectives/passes.py. Times are [n] on the CPU; `most` is the largest n on any rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.objectives.passes import Call, Task
from trainer.objectives.transport import jump, rowwise


def effective_scale(ratio: float, teacher: str, image_free: bool = False) -> float:
    """Scale w of u + w (c - u) that a guidance ratio amounts to: a trained teacher is guided by its own guidance, with the
    fixed point 1 / (1 - ratio) (inf from 1 on); a frozen one gives 1 + ratio, or ratio in image-free training (method 2.2)."""
    if teacher == "frozen":
        return ratio if image_free and ratio else 1 + ratio
    return 1 / (1 - ratio) if ratio < 1 else math.inf


def enhance(
    x_t: Tensor,
    velocity: Tensor,
    t: Tensor,
    cond: Tensor,
    null: Tensor,
    most: int,
    ratio: float,
    interval: tuple[float, float],
    teacher: bool,
    replace: bool = False,
) -> Task:
    """Guided velocity: v + ratio (M(x_t, t, t, c) - M(x_t, t, t, null)) on rows with interval[0] < t < interval[1]
    (E1); replace: M(null) + ratio (M(c) - M(null)), which discards v (E2)."""
    inside = torch.nonzero((interval[0] < t) & (t < interval[1])).flatten()
    at = inside.to(x_t.device, non_blocking=True)
    x_in, t_in = x_t[at], t[inside]
    with_cond, with_null = yield [
        Call(x_in, t_in, t_in, cond[inside], most, teacher),
        Call(x_in, t_in, t_in, null[inside], most, teacher),
    ]
    base = with_null if replace else velocity[at]
    return velocity.index_copy(0, at, base + ratio * (with_cond - with_null))


def consistency_residual(
    x_t: Tensor,
    velocity: Tensor,
    t: Tensor,
    r: Tensor,
    cond: Tensor,
    most: int,
    order: int,
    time_step: float,
    teacher: bool,
) -> Task:
    """I / d of every row: the teacher's path from t - d to r in `order` Euler sub-steps, started at x_t - d v.

    Rows with t < r + d have no interior: 0, and no network row is spent on them (method 8.1).
    """
    far = torch.nonzero(t >= r + time_step).flatten()
    at = far.to(x_t.device, non_blocking=True)
    y = x_t[at] - time_step * velocity[at]
    total = yield from path_integral(y, (t - time_step)[far], r[far], cond[far], most, order, teacher)
    return torch.zeros_like(x_t).index_copy(0, at, total / time_step)


def path_integral(y: Tensor, start: Tensor, end: Tensor, cond: Tensor, most: int, order: int, teacher: bool) -> Task:
    """Sum of (s_i - s_{i+1}) M(y_i, s_i, s_{i+1}, c) over `order` equal sub-steps from start to end, y_0 = y
    (method 2.2)."""
    total = torch.zeros_like(y)
    for i in range(order):
        s = start * (1 - i / order) + end * (i / order)
        s_next = start * (1 - (i + 1) / order) + end * ((i + 1) / order)
        (phi,) = yield [Call(y, s, s_next, cond, most, teacher)]
        y = jump(y, phi, s, s_next)
        total += rowwise(s - s_next, y) * phi
    return total
