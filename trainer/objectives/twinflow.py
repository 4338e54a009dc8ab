"""TwinFlow, production form: every row of the batch serves one role (method 2.2; arXiv 2512.05150, code a109a71).

e2e rows learn the one-step jump 1 -> 0 and are rectified, mul rows the near-instantaneous velocity, any rows a jump
t -> r, one rows a jump t -> 0, adv rows the velocity of the model's own samples at negative time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trainer.objectives.checks import CHOICES, refuse_bad_latents, refuse_bad_options, refuse_bad_times
from trainer.objectives.consistency import consistency_residual, effective_scale, enhance
from trainer.objectives.losses import graded_loss, group_rows, interval_weight
from trainer.objectives.objective import LossTerms, Nets, Roles, Rows, Targets
from trainer.objectives.passes import Call, Runner, Task, run_packed
from trainer.objectives.roles import pattern
from trainer.objectives.transport import clean_estimate, interpolate
from trainer.objectives.twinflow_random import DATA_ROLES, TwinFlowDraws, draw_t, draw_twinflow


@dataclass(frozen=True)
class TwinFlow:
    order: int = 2
    """Sub-steps N of the consistency target; 0 trains plain flow matching on mul and adv rows."""
    roles: dict[str, int] = field(default_factory=lambda: {"e2e": 1, "mul": 4, "any": 2, "adv": 1})
    """Integer weight of each role: e2e, mul, any, adv, one; published 1:1:1:1:0, for LoRA of order 1 one in place of any.
    More mul rows measured better at 4 and 100 evaluations and no different at 1 and 2 (one seed, digits)."""
    published_partition: bool = False
    """Roles in blocks by position in the batch, as in the published code, instead of evenly spread (for comparison)."""
    teacher: str = "ema"
    """online | ema | frozen: whose predictions make the targets. Paper ema (ema.decay .99) for the full Qwen-Image, its
    script online. ema with a decay of .9 measured best over all (digits, 2-D toys); online needs no averaged weights and
    fewer gathers."""
    enhanced_ratio: float = 0.0
    """Guidance ratio rho of the target, v + rho (F(c) - F(null)); 0: off. guidance.scale sets it."""
    enhanced_range: tuple[float, float] = (0.0, 1.0)
    """Guidance acts where lower < t < upper, strictly."""
    image_free: bool = False
    """Train on the model's own one-step samples instead of data."""
    consistency_ratio: float = 1.0
    """Longest jump as a share of t; below 1 there is no rectification (published rule)."""
    rectification_weight: float = 0.5
    """Weight lambda_d of the rectification loss; published code .5 (Qwen, SD3.5) or .75 (OpenUni), paper 1."""
    rectification_clamp: float = 1.0
    """Elementwise bound of the velocity gap; published code 1, paper none (inf)."""
    residual_clamp: float = 1.0
    """Elementwise bound of the consistency residual."""
    time_step: float = 0.01
    """First step d of the consistency target."""
    distance: str = "barron"
    """barron | l2: distance of velocities (trainer/objectives/losses.py)."""
    barron_alpha: float = 1.0
    """Shape of the Barron loss; 2 is l2."""
    barron_scale: float = 1e-3
    """Scale of the Barron loss."""
    interval_weight: str = "tan"
    """tan | none: weight of a row by its interval |t| - |r|; published code tan, paper none."""
    time_distribution: str = "logit_normal"
    """beta | logit_normal: distribution of t; published beta, with parameters 1, 1 (uniform)."""
    time_alpha: float = 1.0
    """First parameter of the Beta distribution of t."""
    time_beta: float = 1.0
    """Second parameter of the Beta distribution of t."""
    time_mean: float = 0.0
    """Mean of logit t (logit_normal)."""
    time_std: float = 1.0
    """Standard deviation of logit t (logit_normal)."""
    time_max: float = 1.0
    """t is scaled by this."""

    def __post_init__(self) -> None:
        pattern(self.roles)
        unknown = set(self.roles) - {*DATA_ROLES, "adv"}
        if unknown:
            raise ValueError(
                f"objective.roles: unknown role {sorted(unknown)}; the roles are {', '.join(DATA_ROLES)}, adv"
            )
        refuse_bad_options(
            self,
            CHOICES | {"interval_weight": ("tan", "none"), "time_distribution": ("beta", "logit_normal")},
            positive=(
                *("time_step", "time_max", "time_alpha", "time_beta", "time_std"),
                *("barron_scale", "residual_clamp", "rectification_clamp"),
            ),
            not_negative=("order", "rectification_weight"),
        )
        if not 0 <= self.consistency_ratio <= 1:
            raise ValueError(f"objective.consistency_ratio is {self.consistency_ratio}; it is a share of t in [0, 1]")
        if self.time_max > 1:
            raise ValueError(f"objective.time_max is {self.time_max}; times live in [0, 1]")

    @property
    def role_weights(self) -> Mapping[str, int]:
        return self.roles

    @property
    def rows_per_sample(self) -> int:
        return 1

    @property
    def needs_null(self) -> bool:
        return self.enhanced_ratio != 0

    @property
    def effective_guidance(self) -> float:
        """Scale w of u + w (c - u) that the targets aim at."""
        return effective_scale(self.enhanced_ratio, self.teacher, self.image_free)

    @property
    def rectifies(self) -> bool:
        return self.consistency_ratio == 1 and self.rectification_weight > 0

    @property
    def consistent(self) -> bool:
        """Whether rows other than adv have a consistency target."""
        jumps = any(self.roles.get(name, 0) for name in ("e2e", "any", "one"))
        return self.order >= 1 and self.consistency_ratio > 0 and jumps

    # ---------------------------------------------------------------- draw
    def draw(
        self, rows: Rows, shape: tuple[int, ...], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TwinFlowDraws:
        """shape: of one sample, without the row dimension. Times stay on the CPU: passes are planned there."""
        t = draw_t(rows, self.time_distribution, (self.time_alpha, self.time_beta), (self.time_mean, self.time_std))
        return draw_twinflow(rows, t, shape, device, dtype, self.image_free, self.rectifies)

    def times(self, roles: Roles, draws: TwinFlowDraws) -> tuple[Tensor, Tensor]:
        """Signed t and target time r of every row, [B] on the CPU."""
        t = draws.t.clamp(0, 1) * self.time_max
        r = t - draws.u_r * self.consistency_ratio * t
        e2e, mul, adv = roles.rows("e2e"), roles.rows("mul"), roles.rows("adv")
        r[roles.rows("one")] = 0.0
        r[mul] = t[mul] - draws.u_r_min[mul] * t[mul] * min(0.05, self.consistency_ratio)
        refuse_bad_times(t, r)
        t, r = t.clone(), r.clone()
        t[e2e], r[e2e] = 1.0, 0.0
        t[adv] = -t[adv]
        r[adv] = t[adv]
        return t, r

    # ---------------------------------------------------------------- targets
    @torch.no_grad()
    def targets(
        self,
        nets: Nets,
        x: Tensor,
        cond: Any,
        null: Any,
        roles: Roles,
        draws: TwinFlowDraws,
        chunk_rows: int | None = None,
        run: Runner = run_packed,
    ) -> Targets:
        """All no-grad passes of the window. x: [B, ...] latents; cond, null: B rows of conditions each."""
        refuse_bad_latents(x)
        t, r = self.times(roles, draws)
        e2e_guided = self.enhanced_range[0] < 1 < self.enhanced_range[1]
        guided = tuple(name for name in DATA_ROLES if name != "e2e" or e2e_guided)
        plain = tuple(name for name in DATA_ROLES if not self.needs_null or name not in guided)
        tasks: list[Task] = []
        if self.needs_null and roles.total(*guided):
            tasks.append(self._data_task(roles, guided, x, t, r, draws, guided=True))
        if roles.total(*plain):
            tasks.append(self._data_task(roles, plain, x, t, r, draws, guided=False))
        if roles.total("adv"):
            tasks.append(self._adv_task(roles, t, draws))
        if self.rectifies and roles.total("e2e"):
            tasks.append(self._rectify_task(roles, draws))
        results = run(tasks, nets, cond.cat(null) if self.needs_null else cond, chunk_rows)

        gap = results.pop() if self.rectifies and roles.total("e2e") else None
        pulls = [part["pull"] for part in results if "pull" in part]
        watched = {"guidance_pull": torch.cat(pulls)} if pulls else {}
        if gap is not None:
            watched["velocity_gap"] = gap.square().flatten(1).mean(dim=1)
        tally = {
            name: torch.stack([squares.sum(), torch.ones_like(squares).sum()]) for name, squares in watched.items()
        }
        order = torch.cat([part["rows"] for part in results]).argsort().to(x.device, non_blocking=True)
        merged = {name: torch.cat([part[name] for part in results])[order] for name in ("x_t", "velocity")}
        if self.consistent:
            merged["integral"] = torch.cat([part["integral"] for part in results])[order]
        return replace(self._regression(roles, x, t, r, cond, merged, gap), tally=tally)

    def _data_task(
        self, roles: Roles, names: tuple[str, ...], x: Tensor, t: Tensor, r: Tensor, draws: TwinFlowDraws, guided: bool
    ) -> Task:
        """Rows on the real flow: [own sample] -> [guided velocity] -> N sub-steps of consistency."""
        rows, most = roles.rows(*names), roles.most(*names)
        at = rows.to(x.device, non_blocking=True)
        clean, z, t, r = x[at], draws.z[at], t[rows], r[rows]
        if self.image_free:
            place = torch.searchsorted(roles.rows(*DATA_ROLES), rows).to(x.device, non_blocking=True)
            clean = yield from one_step(draws.z_image_free[place], rows, most)
        x_t, velocity = interpolate(clean, z, t), z - clean
        data_velocity = velocity
        if guided:
            velocity = yield from enhance(
                x_t,
                velocity,
                t,
                cond=rows,
                null=rows + len(roles.local),
                most=most,
                ratio=self.enhanced_ratio,
                interval=self.enhanced_range,
                teacher=self.teacher != "online",
                replace=self.image_free and self.teacher == "frozen",
            )
        integral = torch.zeros_like(x_t)
        if self.consistent:
            integral = yield from consistency_residual(
                x_t, velocity, t, r, rows, most, self.order, self.time_step, teacher=self.teacher == "ema"
            )
        part = {"rows": rows, "x_t": x_t, "velocity": velocity, "integral": integral}
        return part | ({"pull": (velocity - data_velocity).square().flatten(1).mean(dim=1)} if guided else {})

    def _adv_task(self, roles: Roles, t: Tensor, draws: TwinFlowDraws) -> Task:
        """Rows on the fake flow: plain flow matching to the model's own one-step samples."""
        rows = roles.rows("adv")
        z = draws.z[rows.to(draws.z.device, non_blocking=True)]
        clean = yield from one_step(draws.z_adv, rows, roles.most("adv"))
        x_t = interpolate(clean, z, t[rows])
        return {"rows": rows, "x_t": x_t, "velocity": z - clean, "integral": torch.zeros_like(x_t)}

    def _rectify_task(self, roles: Roles, draws: TwinFlowDraws) -> Task:
        """Clipped F_fake - F_real at noised one-step samples of the e2e rows (method B2); [n, ...]."""
        rows, most = roles.rows("e2e"), roles.most("e2e")
        clean = yield from one_step(draws.z[rows.to(draws.z.device, non_blocking=True)], rows, most)
        s = draws.t_rectify
        y = interpolate(clean, draws.z_rectify, s)
        fake, real = yield [Call(y, -s, -s, rows, most), Call(y, s, s, rows, most)]
        return (fake - real).clamp(-self.rectification_clamp, self.rectification_clamp)

    def _regression(
        self, roles: Roles, x: Tensor, t: Tensor, r: Tensor, cond: Any, merged: dict[str, Tensor], gap: Tensor | None
    ) -> Targets:
        def place(values: Tensor) -> Tensor:
            return values.to(x.device, non_blocking=True)

        adv, e2e = roles.rows("adv"), roles.rows("e2e")
        weight = interval_weight(t, r) if self.interval_weight == "tan" else torch.ones_like(t)
        weight[adv] = 1.0
        if self.order >= 1:
            weight /= roles.total(*roles.names)
        else:
            graded = roles.rows("mul", "adv")
            kept = torch.zeros_like(weight)
            kept[graded] = weight[graded] / max(roles.total("mul", "adv"), 1)
            weight = kept
        groups, names = group_rows(roles.local, roles.names, t)
        optional: dict[str, Any] = {}
        if self.consistent:
            far = t >= r + self.time_step
            far[adv] = False
            consistent = torch.ones_like(far)
            consistent[adv] = False
            optional |= {
                "consistent": place(consistent),
                "coefficient": place(torch.where(far, (t - r) / self.time_step, torch.ones_like(t))),
                "integral": merged["integral"],
            }
        if gap is not None:
            gap_weight = torch.zeros_like(t)
            gap_weight[e2e] = self.rectification_weight / roles.total("e2e")
            full = torch.zeros_like(x)
            full[place(e2e)] = gap
            optional |= {"gap": full, "gap_weight": place(gap_weight)}
        return Targets(
            sample=place(torch.arange(len(t))),
            x_t=merged["x_t"],
            t=place(t),
            r=place(r),
            cond=cond,
            velocity=merged["velocity"],
            weight=place(weight),
            groups=place(groups),
            group_names=names,
            **optional,
        )

    # ---------------------------------------------------------------- loss
    def loss(self, nets: Nets, targets: Targets) -> LossTerms:
        """One graded pass over the given rows of the targets."""
        return graded_loss(nets, targets, self.distance, self.barron_alpha, self.barron_scale, self.residual_clamp)


def one_step(z: Tensor, cond: Tensor, most: int) -> Task:
    """One-step samples G(z) = z - F(z, 1, 0, c) of the online network (method 1)."""
    ones = torch.ones(len(z), dtype=z.dtype)
    (velocity,) = yield [Call(z, ones, torch.zeros_like(ones), cond, most)]
    return clean_estimate(z, velocity, ones)
