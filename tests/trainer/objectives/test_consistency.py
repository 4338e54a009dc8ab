import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.objectives.cases import EQUAL_ROLES, golden_net, run_step, samples, toy_nets
from trainer.objectives.consistency import consistency_residual, effective_scale, enhance, path_integral
from trainer.objectives.objective import Roles
from trainer.objectives.passes import Call, Task
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_random import TwinFlowDraws

Field = Callable[[Tensor, Tensor, Tensor], Tensor]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drive(task: Task, net: Callable[[Call], Tensor]) -> tuple[Any, list[Call]]:
    """Run one task alone; its result and its calls."""
    seen: list[Call] = []
    outputs: list[Tensor] | None = None
    while True:
        try:
            calls = next(task) if outputs is None else task.send(outputs)
        except StopIteration as stop:
            return stop.value, seen
        outputs = [net(call) for call in calls]
        seen += calls


def residual(net: Field, v: Tensor, x_t: Tensor, t: Tensor, r: Tensor, order: int, d: float) -> Tensor:
    """q of B1 on interior rows: (t - r) F / d - I / d - v."""
    rows = torch.arange(len(t))
    integral, _ = drive(
        consistency_residual(x_t, v, t, r, rows, len(t), order, d, teacher=False), lambda c: net(c.x_t, c.t, c.r)
    )
    return (t - r)[:, None] / d * net(x_t, t, r) - integral - v


def exponential(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Mean velocity from t to r of dx/dt = .7 x."""
    interval = (t - r)[:, None]
    return torch.where(interval == 0, 0.7 * x_t, x_t * -torch.expm1(-0.7 * interval) / interval)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("d", "expected"), [(0.01, -0.002102), (0.001, -0.000209)])
def test_exact_mean_velocity_of_an_exponential_leaves_the_known_residual(order: int, d: float, expected: float) -> None:
    x = column(1.3)[:, None]
    q = residual(exponential, 0.7 * x, x, column(0.8), column(0.2), order, d)
    assert q.item() == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_constant_field_has_no_residual(order: int) -> None:
    x, v = samples(5).x, torch.full((5, 1, 2, 3), 0.37, dtype=torch.float64)
    t, r = column(1.0, 0.8, 0.5, 0.31, 0.02), column(0.0, 0.79, 0.2, 0.3, 0.0)
    rows = torch.arange(5)
    integral, _ = drive(
        consistency_residual(x, v, t, r, rows, 5, order, 0.01, teacher=False), lambda c: torch.full_like(c.x_t, 0.37)
    )
    far = (t >= r + 0.01)[:, None, None, None]
    coefficient = torch.where(far, (t - r)[:, None, None, None] / 0.01, 1.0)
    assert (coefficient * v - integral - v).abs().max() < 1e-12


def test_residual_tends_to_the_total_derivative_as_the_first_step_shrinks() -> None:
    """N=1, d -> 0: q = F - v + (t - r) dF/dt along the path x' = v (method 9)."""
    net, batch = golden_net(4, shape=(3,)), samples(4, shape=(3,))
    t, r, v = column(0.9, 0.7, 0.5, 1.0), column(0.1, 0.6, 0.0, 0.0), samples(4, seed=9, shape=(3,)).x
    c = batch.cond.vectors

    def field(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return net(x_t, t, r, c)

    with torch.no_grad():
        pair: Any = torch.func.jvp(lambda x, time: field(x, time, r), (batch.x, t), (v, torch.ones_like(t)))
        along, slope = pair
        limit = along - v + (t - r)[:, None] * slope
        errors = [(residual(field, v, batch.x, t, r, 1, d) - limit).norm().item() for d in (2e-3, 1e-3)]
    assert errors[1] < 1e-2 * limit.norm()
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_sub_steps_are_even_and_end_at_the_target_time(order: int) -> None:
    t, r = column(0.9, 0.3), column(0.2, 0.25)
    x = torch.ones(2, 3, dtype=torch.float64)
    _, calls = drive(path_integral(x, t, r, torch.arange(2), 2, order, teacher=True), lambda c: torch.zeros_like(c.x_t))
    assert len(calls) == order
    for i, call in enumerate(calls):
        torch.testing.assert_close(call.t, t + (r - t) * i / order)
        torch.testing.assert_close(call.r, t + (r - t) * (i + 1) / order)
        assert call.teacher
    assert torch.equal(calls[-1].r, r)


def test_sub_steps_follow_the_teachers_path() -> None:
    """One Euler step of the exact mean velocity lands on the trajectory, so N steps add up to x_t - x_r."""
    x, t, r = column(1.3, -2.0)[:, None], column(0.8, 1.0), column(0.2, 0.0)
    total, _ = drive(
        path_integral(x, t, r, torch.arange(2), 2, 3, teacher=False), lambda c: exponential(c.x_t, c.t, c.r)
    )
    torch.testing.assert_close(total, x - x * torch.exp(-0.7 * (t - r))[:, None])


def test_rows_inside_the_first_step_cost_no_network_row_and_stay_finite() -> None:
    t, r = column(0.5, 0.5, 0.5, 0.0), column(0.5, 0.495, 0.2, 0.0)
    x = torch.ones(4, 3, dtype=torch.float64)
    integral, calls = drive(
        consistency_residual(x, x, t, r, torch.arange(4), 4, 2, 0.01, teacher=False), lambda c: torch.ones_like(c.x_t)
    )
    assert [call.cond.tolist() for call in calls] == [[2], [2]]
    assert torch.equal(integral[[0, 1, 3]], torch.zeros(3, 3, dtype=torch.float64))
    assert torch.isfinite(integral).all()


def test_a_whole_step_with_target_time_equal_to_time_is_flow_matching_and_finite() -> None:
    """Boundary rows regress on clip(F - v), with time 0 among them."""
    objective = TwinFlow(roles={"any": 1}, rectification_weight=0.0, interval_weight="none", distance="l2")
    batch, nets = samples(3), toy_nets("online")
    z = samples(3, seed=8).x
    t, zero, none = column(0.6, 1.0, 0.0), torch.zeros(3, dtype=torch.float64), z[:0]
    roles = Roles(("any",), torch.zeros(3, dtype=torch.int64), torch.tensor([[3]]))
    draws = TwinFlowDraws(t, zero, zero, z, none, none, none, zero[:0])
    targets = objective.targets(nets, batch.x, batch.cond, batch.null, roles, draws)
    out = objective.loss(nets, targets)
    mixed = t[:, None, None, None] * z + (1 - t)[:, None, None, None] * batch.x
    clipped = (nets.online(mixed, t, t, batch.cond.vectors) - (z - batch.x)).clamp(-1, 1)
    torch.testing.assert_close(out.total, clipped.square().mean())
    out.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in nets.online.parameters() if p.grad is not None)


@pytest.mark.parametrize("ratio", [0.5, 0.8, -0.5])
def test_guidance_by_the_model_itself_settles_at_its_effective_scale(ratio: float) -> None:
    """E1 with an online teacher: the fixed point of M(c) = v + rho (M(c) - M(o)) is u + (c - u) / (1 - rho)."""
    c, u = samples(1, shape=(4,)).x, samples(1, seed=6, shape=(4,)).x
    learnt = c
    for _ in range(200):
        task = enhance(c, c, column(0.5), torch.tensor([0]), torch.tensor([1]), 1, ratio, (0.0, 1.0), teacher=False)
        now = {0: learnt, 1: u}
        learnt, _ = drive(task, lambda call, now=now: now[int(call.cond)])  # type: ignore[misc]
    torch.testing.assert_close(learnt, u + effective_scale(ratio, "online") * (c - u))


def test_guidance_by_a_frozen_teacher_has_scale_one_plus_the_ratio() -> None:
    c, u = samples(1, shape=(4,)).x, samples(1, seed=6, shape=(4,)).x
    task = enhance(c, c, column(0.5), torch.tensor([0]), torch.tensor([1]), 1, 4.0, (0.0, 1.0), teacher=True)
    guided, calls = drive(task, lambda call: c if call.cond.item() == 0 else u)
    torch.testing.assert_close(guided, u + effective_scale(4.0, "frozen") * (c - u))
    assert [call.teacher for call in calls] == [True, True]


def test_replacing_guidance_discards_the_velocity_of_the_data() -> None:
    """E2: M(o) + rho (M(c) - M(o)), whose effective scale is rho."""
    c, u = samples(1, shape=(4,)).x, samples(1, seed=6, shape=(4,)).x
    task = enhance(c, 100 * c, column(0.5), torch.tensor([0]), torch.tensor([1]), 1, 4.0, (0, 1), True, replace=True)
    guided, _ = drive(task, lambda call: c if call.cond.item() == 0 else u)
    torch.testing.assert_close(guided, u + effective_scale(4.0, "frozen", image_free=True) * (c - u))


def test_guidance_acts_strictly_inside_its_range() -> None:
    t, x = column(0.0, 0.2, 0.5, 0.8, 1.0), torch.zeros(5, 3, dtype=torch.float64)
    rows = torch.arange(5)

    def touched(interval: tuple[float, float]) -> list[int]:
        task = enhance(x, x, t, rows, rows + 5, 5, 1.0, interval, teacher=False)
        guided, calls = drive(task, lambda call: (call.cond < 5).double()[:, None].expand_as(call.x_t))
        assert torch.equal(calls[1].cond, calls[0].cond + 5)
        assert torch.equal(calls[0].t, calls[0].r)
        return torch.nonzero(guided[:, 0]).flatten().tolist()

    assert touched((0.0, 1.0)) == [1, 2, 3]
    assert touched((0.2, 0.8)) == [2]
    assert touched((-1.0, 2.0)) == [0, 1, 2, 3, 4]


def test_the_residual_of_a_good_model_is_clipped_for_few_elements_only() -> None:
    """Diagnostics count clipped elements against the rows that have a consistency target."""
    tally = run_step(TwinFlow(roles=EQUAL_ROLES, residual_clamp=math.inf), toy_nets("online"), samples(8)).tally
    assert tally["clamped_share"].tolist() == [0, 6]
    tight_objective = TwinFlow(roles=EQUAL_ROLES, residual_clamp=1e-9)
    tight = run_step(tight_objective, toy_nets("online"), samples(8)).tally["clamped_share"]
    assert tight.tolist() == pytest.approx([6, 6])
