"""TwinFlow, paper form: every term on every sample (method 2.1, 2.6; arXiv 2512.05150 eq. 1, 2, 9).

A sample makes four graded rows: jump (x_t, t, r), flow (x_t, t, t), adv (y, -t, -t) and e2e (z, 1, 0), whose
prediction is both regressed on its consistency target and rectified.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.objectives.checks import CHOICES, refuse_bad_latents, refuse_bad_options, refuse_bad_times
from trainer.objectives.consistency import consistency_residual, effective_scale, enhance
from trainer.objectives.losses import graded_loss, group_rows, mean_square
from trainer.objectives.objective import LossTerms, Nets, Roles, Rows, Targets
from trainer.objectives.passes import Call, Runner, Task, run_packed
from trainer.objectives.random_streams import normals, purpose_id, uniforms
from trainer.objectives.transport import interpolate
from trainer.objectives.twinflow import one_step

TERMS = ("jump", "flow", "adv", "e2e")


@dataclass(frozen=True)
class TwinFlowFullDraws:
    """t, u_r: [B] uniform; z: [B, ...] noise of data, adv and e2e rows; z_rectify, t_rectify: of the velocity gap."""

    t: Tensor
    u_r: Tensor
    z: Tensor
    z_rectify: Tensor
    t_rectify: Tensor


@dataclass(frozen=True)
class TwinFlowFull:
    order: int = 2
    """Sub-steps N of the consistency target; 0 regresses on the velocity."""
    teacher: str = "online"
    """online | ema | frozen: whose predictions make the targets."""
    enhanced_ratio: float = 0.0
    """Guidance ratio rho of the target; 0: off. guidance.scale sets it from the effective scale."""
    enhanced_range: tuple[float, float] = (-1.0, 2.0)
    """Guidance acts where lower < t < upper; the published tutorial guides every row."""
    rectification_weight: float = 1.0
    """Weight of the rectification loss; paper 1."""
    rectification_clamp: float = float("inf")
    """Elementwise bound of the velocity gap; paper none."""
    residual_clamp: float = 1.0
    """Elementwise bound of the consistency residual."""
    time_step: float = 0.01
    """First step d of the consistency target."""
    distance: str = "l2"
    """barron | l2: distance of velocities; published tutorial l2."""
    barron_alpha: float = 1.0
    """Shape of the Barron loss; 2 is l2."""
    barron_scale: float = 1e-3
    """Scale of the Barron loss."""

    def __post_init__(self) -> None:
        refuse_bad_options(
            self,
            CHOICES,
            positive=("time_step", "residual_clamp", "rectification_clamp", "barron_scale"),
            not_negative=("order", "rectification_weight"),
        )

    rows_per_sample = len(TERMS)
    published_partition = False

    @property
    def role_weights(self) -> Mapping[str, int]:
        return {"all": 1}

    @property
    def needs_null(self) -> bool:
        return self.enhanced_ratio != 0

    @property
    def effective_guidance(self) -> float:
        """Scale w of u + w (c - u) that the targets aim at."""
        return effective_scale(self.enhanced_ratio, self.teacher)

    def draw(
        self, rows: Rows, shape: tuple[int, ...], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TwinFlowFullDraws:
        times = uniforms(rows.seed, rows.step, purpose_id("times"), rows.ids, 3).to(dtype)
        ids = torch.cat([rows.ids, rows.ids])
        purposes = torch.tensor([purpose_id("z"), purpose_id("z_rectify")]).repeat_interleave(len(rows.ids))
        z, z_rectify = normals(rows.seed, rows.step, purposes, ids, shape, device, dtype).chunk(2)
        return TwinFlowFullDraws(times[:, 0], times[:, 1], z, z_rectify, times[:, 2])

    @torch.no_grad()
    def targets(
        self,
        nets: Nets,
        x: Tensor,
        cond: Any,
        null: Any,
        roles: Roles,
        draws: TwinFlowFullDraws,
        chunk_rows: int | None = None,
        run: Runner = run_packed,
    ) -> Targets:
        """All no-grad passes of the window; graded rows are ordered sample by sample, term by term."""
        refuse_bad_latents(x)
        t, r = draws.t, draws.t - draws.u_r * draws.t
        refuse_bad_times(t, r)
        most = roles.most(*roles.names)
        conditions = cond.cat(null) if self.needs_null else cond
        tasks = [self._data_task(x, t, r, draws, most), self._fake_task(t, draws, most)]
        (x_t, velocity, integrals), (y, fake_velocity, gap) = run(tasks, nets, conditions, chunk_rows)

        def rows(*terms: Tensor) -> Tensor:
            return torch.stack(terms, dim=1).flatten(0, 1)

        ones, zeros, empty = torch.ones_like(t), torch.zeros_like(t), torch.zeros_like(x)
        times, ends = rows(t, t, -t, ones), rows(r, t, -t, zeros)
        consistent = torch.tensor([True, False, False, True]).repeat(len(t)) & (self.order > 0)
        far = consistent & (times >= ends + self.time_step)
        weight = torch.full_like(times, 1.0 / roles.total(*roles.names))
        groups, names = group_rows(torch.arange(len(TERMS)).repeat(len(t)), TERMS, times)
        sample = torch.arange(len(t)).repeat_interleave(len(TERMS)).to(x.device, non_blocking=True)
        place: dict[str, Any] = {
            "t": times,
            "r": ends,
            "weight": weight,
            "groups": groups,
            "consistent": consistent,
            "coefficient": torch.where(far, (times - ends) / self.time_step, torch.ones_like(times)),
            "gap_weight": weight * rows(zeros, zeros, zeros, ones * self.rectification_weight),
        }
        watched = {"velocity_gap": gap} | ({"guidance_pull": velocity - (draws.z - x)} if self.needs_null else {})
        return Targets(
            sample=sample,
            x_t=rows(x_t, x_t, y, draws.z),
            cond=cond[sample],
            velocity=rows(velocity, velocity, fake_velocity, velocity),
            group_names=names,
            integral=rows(integrals[0], empty, empty, integrals[1]),
            gap=rows(empty, empty, empty, gap),
            tally={name: mean_square(values) for name, values in watched.items()},
            **{name: value.to(x.device, non_blocking=True) for name, value in place.items()},
        )

    def _data_task(self, x: Tensor, t: Tensor, r: Tensor, draws: TwinFlowFullDraws, most: int) -> Task:
        x_t, velocity = interpolate(x, draws.z, t), draws.z - x
        rows, teacher = torch.arange(len(t)), self.teacher != "online"
        if self.needs_null:
            velocity = yield from enhance(
                x_t, velocity, t, rows, rows + len(t), most, self.enhanced_ratio, self.enhanced_range, teacher
            )
        if self.order == 0:
            return x_t, velocity, (torch.zeros_like(x), torch.zeros_like(x))
        common: dict[str, Any] = {"order": self.order, "time_step": self.time_step, "teacher": self.teacher == "ema"}
        integrals = yield from _together(
            consistency_residual(x_t, velocity, t, r, rows, most, **common),
            consistency_residual(draws.z, velocity, torch.ones_like(t), torch.zeros_like(t), rows, most, **common),
        )
        return x_t, velocity, integrals

    def _fake_task(self, t: Tensor, draws: TwinFlowFullDraws, most: int) -> Task:
        rows, s = torch.arange(len(t)), draws.t_rectify
        clean = yield from one_step(draws.z, rows, most)
        noised = interpolate(clean, draws.z_rectify, s)
        fake, real = yield [Call(noised, -s, -s, rows, most), Call(noised, s, s, rows, most)]
        gap = (fake - real).clamp(-self.rectification_clamp, self.rectification_clamp)
        return interpolate(clean, draws.z, t), draws.z - clean, gap

    def loss(self, nets: Nets, targets: Targets) -> LossTerms:
        """One graded pass over the given rows of the targets."""
        return graded_loss(nets, targets, self.distance, self.barron_alpha, self.barron_scale, self.residual_clamp)


def _together(first: Task, second: Task) -> Generator[list[Call], list[Tensor], tuple[Tensor, Tensor]]:
    """Two tasks with chains of equal length as one."""
    calls = next(first), next(second)
    while True:
        outputs = yield calls[0] + calls[1]
        try:
            calls = first.send(outputs[: len(calls[0])]), second.send(outputs[len(calls[0]) :])
        except StopIteration as stop:
            done = stop.value
            break
    try:
        second.send(outputs[len(calls[0]) :])
    except StopIteration as stop:
        return done, stop.value
    raise AssertionError("the second task is longer than the first")
