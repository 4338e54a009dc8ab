"""Plain flow matching: regress the velocity z - x at r = t. The baseline, and what a base model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.objectives.checks import CHOICES, refuse_bad_latents, refuse_bad_options, refuse_bad_times
from trainer.objectives.losses import graded_loss, group_rows
from trainer.objectives.objective import LossTerms, Nets, Roles, Rows, Targets
from trainer.objectives.passes import Runner, run_packed
from trainer.objectives.random_streams import normals, purpose_id, uniforms
from trainer.objectives.transport import interpolate


@dataclass(frozen=True)
class FlowMatchingDraws:
    """t: [B] in [0, 1] on the CPU; z: [B, ...] noise."""

    t: Tensor
    z: Tensor


@dataclass(frozen=True)
class FlowMatching:
    distance: str = "l2"
    """barron | l2: distance of velocities (trainer/objectives/losses.py)."""
    barron_alpha: float = 1.0
    """Shape of the Barron loss; 2 is l2."""
    barron_scale: float = 1e-3
    """Scale of the Barron loss."""
    time_distribution: str = "uniform"
    """uniform | logit_normal: distribution of t."""
    time_mean: float = 0.0
    """Mean of logit t (logit_normal)."""
    time_std: float = 1.0
    """Standard deviation of logit t (logit_normal)."""

    def __post_init__(self) -> None:
        refuse_bad_options(
            self,
            {"distance": CHOICES["distance"], "time_distribution": ("uniform", "logit_normal")},
            positive=("barron_scale", "time_std"),
        )

    teacher = "online"
    rows_per_sample = 1
    needs_null = False
    effective_guidance = 1.0
    published_partition = False

    @property
    def role_weights(self) -> Mapping[str, int]:
        return {"flow": 1}

    def draw(
        self, rows: Rows, shape: tuple[int, ...], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> FlowMatchingDraws:
        if self.time_distribution == "logit_normal":
            normal = normals(rows.seed, rows.step, purpose_id("t"), rows.ids, (1,), dtype=torch.float64)
            t = torch.sigmoid(self.time_mean + self.time_std * normal)
        else:
            t = uniforms(rows.seed, rows.step, purpose_id("times"), rows.ids, 1)
        return FlowMatchingDraws(
            t[:, 0].to(dtype), normals(rows.seed, rows.step, purpose_id("z"), rows.ids, shape, device, dtype)
        )

    @torch.no_grad()
    def targets(
        self,
        nets: Nets,
        x: Tensor,
        cond: Any,
        null: Any,
        roles: Roles,
        draws: FlowMatchingDraws,
        chunk_rows: int | None = None,
        run: Runner = run_packed,
    ) -> Targets:
        """No passes: the data alone makes the targets."""
        refuse_bad_latents(x)
        refuse_bad_times(draws.t, draws.t)
        t = draws.t.to(x.device, non_blocking=True)
        groups, names = group_rows(roles.local, roles.names, draws.t)
        return Targets(
            sample=torch.arange(len(t)).to(x.device, non_blocking=True),
            x_t=interpolate(x, draws.z, t),
            t=t,
            r=t,
            cond=cond,
            velocity=draws.z - x,
            weight=torch.full_like(t, 1.0 / roles.total(*roles.names)),
            groups=groups.to(x.device, non_blocking=True),
            group_names=names,
        )

    def loss(self, nets: Nets, targets: Targets) -> LossTerms:
        """One graded pass over the given rows of the targets."""
        return graded_loss(nets, targets, self.distance, self.barron_alpha, self.barron_scale, residual_clamp=1.0)
