"""Inputs that an objective refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CHOICES = {"teacher": ("online", "ema", "frozen"), "distance": ("barron", "l2")}
"""Words of the options that several objectives have."""


def refuse_bad_options(
    objective: object,
    choices: Mapping[str, tuple[str, ...]],
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
) -> None:
    """ValueError for a word that is not among its field's `choices`, or a number out of range."""
    for name, legal in choices.items():
        if getattr(objective, name) not in legal:
            raise ValueError(f"objective.{name} is {getattr(objective, name)!r}; write one of {', '.join(legal)}")
    for name in positive:
        if not getattr(objective, name) > 0:
            raise ValueError(f"objective.{name} is {getattr(objective, name)}; it must be positive")
    for name in not_negative:
        if not getattr(objective, name) >= 0:
            raise ValueError(f"objective.{name} is {getattr(objective, name)}; it must be 0 or more")


def refuse_bad_latents(x: Tensor) -> None:
    """ValueError for latents that are not finite. On an accelerator nothing is read back: there the loss becomes
    non-finite and the engine refuses the update on all ranks."""
    if x.device.type == "cpu" and not bool(torch.isfinite(x).all()):
        rows = torch.nonzero(~torch.isfinite(x.flatten(1)).all(dim=1)).flatten().tolist()
        raise ValueError(f"latents of rows {rows[:8]} are not finite; look at their images or precomputed latents")


def refuse_bad_times(t: Tensor, r: Tensor) -> None:
    """ValueError where a target time lies above its time, or a time outside [0, 1]. Both [B] on the CPU."""
    bad = torch.nonzero(~((r <= t) & (t <= 1) & (r >= 0))).flatten().tolist()
    if bad:
        row = bad[0]
        raise ValueError(
            f"rows {bad[:8]}: times must satisfy 0 <= r <= t <= 1; row {row} has t={t[row]:g}, r={r[row]:g}"
        )
