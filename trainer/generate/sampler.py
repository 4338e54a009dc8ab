"""Samplers of a few-, any- or multi-step model on the transport x_t = t z + (1 - t) x (UCGM-S, arXiv 2505.07447).

Read-outs of one evaluation F = F(x_t, t, r): x_hat = x_t - t F and z_hat = x_t + (1 - t) F; a step goes to
x_s = (1 - s) x_hat + s z_hat, which is Euler with F. The styles differ in the target time r they ask for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""F(x_t, t [B], r [B]); everything arrives in float64, the callable casts to what its network wants."""
FreshNoise = Callable[[int], Tensor]
"""Standard normal numbers for the i-th step, in the shape of the start noise; the same for the same i."""

# Time given to all steps but the last jump; method section 4, "Recommended", with the start moved from .999 to t = 1.
_MULTI_WARP = (1.17, 0.8, 1.1)
_FEW_GAPS = {1: 0.7, 2: 0.6}
_GAP = 0.5


@dataclass(frozen=True)
class Sampler:
    """How noise becomes a sample.

    steps: network evaluations at order 1. gaps (g0, g1): the first evaluation is at t = 1 - g0, and with g1 > 0 the
    last one is at t = g1; (0, 0) is the even grid from 1 to 0. warp (a, b, c): u -> (1 - (1 - u^a)^b)^c on u = 1 - t.
    style: target time of a step t -> s: r = 0 (few), s (any), t (multi; "mul" means the same).
    stochasticity p: share of the variance of z_hat that is drawn afresh in a step; 0 is the ODE, 1 re-noises wholly;
    "SDE" sets p = clamp(2 t |s - t| / s^2, 0, 1) in every step. (The published sampler keeps the first step's value.)
    extrapolation: from the third step on both read-outs move on by this multiple of their last change.
    order 2: ceil(steps / 2) steps, each but the last corrected by a second evaluation at (x_s, s).

    Raises ValueError for options out of range.
    """

    steps: int
    gaps: tuple[float, float] = (0.0, 0.0)
    warp: tuple[float, float, float] = (1.0, 1.0, 1.0)
    style: Literal["few", "any", "multi", "mul"] = "few"
    stochasticity: float | Literal["SDE"] = 0.0
    extrapolation: float = 0.0
    order: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, not {self.steps}")
        if self.style not in ("few", "any", "multi", "mul"):
            raise ValueError(f"sampling style is few, any or multi, not {self.style!r}")
        if self.order not in (1, 2):
            raise ValueError(f"sampling order is 1 or 2, not {self.order}")
        if min(self.gaps) < 0 or sum(self.gaps) >= 1:
            raise ValueError(f"sampler gaps are >= 0 with a sum below 1, not {self.gaps}")
        if min(self.warp) <= 0:
            raise ValueError(f"the warp's exponents are positive, not {self.warp}")
        if self.stochasticity != "SDE" and not 0.0 <= float(self.stochasticity) <= 1.0:
            raise ValueError(f"stochasticity is between 0 and 1 or 'SDE', not {self.stochasticity!r}")
        if self.extrapolation < 0:
            raise ValueError(f"extrapolation is >= 0, not {self.extrapolation}")

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample."""
        intervals = self._intervals
        return intervals if self.order == 1 else 2 * intervals - 1

    @property
    def _intervals(self) -> int:
        return self.steps if self.order == 1 else math.ceil(self.steps / 2)

    def grid(self) -> Tensor:
        """Times of the evaluations, descending, and the final 0: float64 [intervals + 1] on the CPU."""
        count, (first, last) = self._intervals, self.gaps
        if last == 0:
            u = torch.linspace(first, 1.0, count + 1, dtype=torch.float64)[:-1]
        else:
            u = torch.linspace(first, 1.0 - last, count, dtype=torch.float64)
        return torch.cat([1.0 - kumaraswamy(u, self.warp), torch.zeros(1, dtype=torch.float64)])

    def sample(self, velocity: Velocity, noise: Tensor, eps: FreshNoise | None = None) -> Tensor:
        """Samples [B, ...] in the dtype of `noise` [B, ...], which is x_t at t = 1. See `trajectory`."""
        x_hat = noise
        for x_hat in self._run(velocity, noise, eps):  # noqa: B007 (only the last one is kept in memory)
            pass
        return x_hat.to(noise.dtype)

    def trajectory(self, velocity: Velocity, noise: Tensor, eps: FreshNoise | None = None) -> Tensor:
        """The start noise and x_hat of every step, before extrapolation: float64 [intervals + 1, B, ...].

        eps is needed where stochasticity > 0 and there is a step that does not end at t = 0; else ValueError.
        """
        return torch.stack([noise.double(), *self._run(velocity, noise, eps)])

    def _run(self, velocity: Velocity, noise: Tensor, eps: FreshNoise | None) -> Iterator[Tensor]:
        """Yield x_hat of every step. The state is float64: 100 steps of a bf16 model add up no rounding."""
        x, times = noise.double(), self.grid().tolist()
        previous: tuple[Tensor, Tensor] | None = None
        for i, (t, s) in enumerate(pairwise(times)):
            f = _evaluate(velocity, x, t, self.target(t, s))
            raw = read_out(x, t, f)
            yield raw[0]
            if s == 0.0:
                return
            x_hat, z_hat = raw
            if self.extrapolation > 0 and previous is not None and i >= 2:
                x_hat = raw[0] + self.extrapolation * (raw[0] - previous[0])
                z_hat = raw[1] + self.extrapolation * (raw[1] - previous[1])
            previous = raw
            if self.order == 2:
                second = _evaluate(velocity, (1.0 - s) * x_hat + s * z_hat, s, self._second_target(s))
                change = (second - f) / 2.0
                x_hat, z_hat = x_hat - t * change, z_hat + (1.0 - t) * change
            x = self.jump(x_hat, z_hat, t, s, None if eps is None else partial(eps, i))

    def target(self, t: float, s: float) -> float:
        """Target time r of the evaluation that a step t -> s begins with."""
        return {"few": 0.0, "any": s, "multi": t, "mul": t}[self.style]

    def _second_target(self, s: float) -> float:
        """Target time of the evaluation at (x_s, s): again 0 (few), the step's own target (any), s (multi).

        With any and multi it is the velocity at s itself. Heun's rule is exact to second order for multi only; an exact
        any-step model needs no correction.
        """
        return 0.0 if self.style == "few" else s

    def jump(self, x_hat: Tensor, z_hat: Tensor, t: float, s: float, fresh: Callable[[], Tensor] | None) -> Tensor:
        """x_s from the read-outs at t. fresh draws standard normal numbers in their shape.

        Raises ValueError where they are needed and `fresh` is None.
        """
        share = self._share(t, s)
        if share > 0.0:
            if fresh is None:
                raise ValueError(f"a sampler with stochasticity {self.stochasticity} needs fresh noise: pass eps")
            z_hat = math.sqrt(1.0 - share) * z_hat + math.sqrt(share) * fresh().to(z_hat)
        return (1.0 - s) * x_hat + s * z_hat

    def _share(self, t: float, s: float) -> float:
        if self.stochasticity == "SDE":
            return min(max(abs(s - t) * 2.0 * t / s**2, 0.0), 1.0)
        return float(self.stochasticity)


def read_out(x_t: Tensor, t: float, f: Tensor) -> tuple[Tensor, Tensor]:
    """x_hat and z_hat of an evaluation f at (x_t, t)."""
    return x_t - t * f, x_t + (1.0 - t) * f


def kumaraswamy(u: Tensor, warp: tuple[float, ...]) -> Tensor:
    """(1 - (1 - u^a)^b)^c of u in [0, 1], warp = (a, b, c)."""
    a, b, c = warp
    return (1.0 - (1.0 - u**a) ** b) ** c


def _evaluate(velocity: Velocity, x: Tensor, t: float, r: float) -> Tensor:
    rows = x.shape[0]
    return velocity(x, x.new_full((rows,), t), x.new_full((rows,), r)).to(x)


def few(steps: int) -> Sampler:
    """Every evaluation looks at t = 0 and is re-noised wholly; the last one is at .6 (2 steps) or .5 (more)."""
    return Sampler(steps, gaps=(0.0, _FEW_GAPS.get(steps, _GAP)), style="few", stochasticity=1.0)


def any_step(steps: int) -> Sampler:
    """Jumps from time to time; the last one goes from .5 to 0."""
    return Sampler(steps, gaps=(0.0, _GAP), style="any")


def multi(steps: int) -> Sampler:
    """Euler on the ODE over the warped grid."""
    return Sampler(steps, warp=_MULTI_WARP, style="multi")


PRESETS: dict[str, Sampler] = {
    "1nfe": few(1),
    "2nfe": few(2),
    "4nfe": few(4),
    "any2": any_step(2),
    "any4": any_step(4),
    "any8": any_step(8),
    "multi30": multi(30),
    "multi32": multi(32),
    "multi100": multi(100),
}
"""The published recommendations, but from t = 1 (published: .999, which is not the time the noise has)."""

_FAMILIES: dict[str, Callable[[int], Sampler]] = {"few": few, "any": any_step, "multi": multi}


def preset(name: str) -> Sampler:
    """A sampler by name: one of PRESETS, or fewN, anyN, multiN. Raises ValueError with the choices."""
    if name in PRESETS:
        return PRESETS[name]
    match = re.fullmatch(r"(few|any|multi)(\d+)", name)
    if match and int(match[2]) > 0:
        return _FAMILIES[match[1]](int(match[2]))
    raise ValueError(f"unknown sampler {name!r}; choose {', '.join(PRESETS)}, or fewN, anyN, multiN with N steps")
