"""The rectification term: its direction, its inputs, and where gradients do not flow."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.objectives.cases import (
    EQUAL_ROLES,
    Recording,
    Samples,
    close,
    column,
    golden_net,
    make,
    present,
    samples,
    toy_nets,
)
from tests.trainer.objectives.toy import ToyNets, VectorConditions
from trainer.objectives.rcgm import RCGM
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TwinFlowFull


class RealAndFake(torch.nn.Module):
    """F is a parameter per row at (1, 0); elsewhere a constant that knows real (t > 0) from fake (t < 0) flow."""

    def __init__(self, rows: int, real: float, fake: float) -> None:
        super().__init__()
        self.jump = torch.nn.Parameter(torch.zeros(rows, 1, 2, 3, dtype=torch.float64))
        self.real, self.fake = real, fake

    def forward(self, x_t: Tensor, t: Tensor, r: Tensor, c: Tensor) -> Tensor:
        row = c[:, 0].round().long()
        real, fake = torch.full_like(t, self.real), torch.full_like(t, self.fake)
        other = column(torch.where(t > 0, real, fake)).expand_as(x_t)
        return torch.where(column((t == 1) & (r == 0)), self.jump[row], other)


@pytest.mark.parametrize("cls", [TwinFlow, TwinFlowFull])
@pytest.mark.parametrize(
    ("real", "fake", "clamp"), [(0.7, 0.2, 1.0), (0.2, 0.7, 1.0), (3.0, 0.0, 1.0), (3.0, 0.0, 9.0)]
)
def test_descent_moves_the_generators_velocity_by_real_minus_fake(
    cls: Any, real: float, fake: float, clamp: float
) -> None:
    """-dL_rect/dF = 2 lambda clip(F_real - F_fake) / (D |E|) under l2: F toward F + dv."""
    batch = samples(4)
    batch = Samples(batch.x, VectorConditions(torch.arange(4, dtype=torch.float64)[:, None]), batch.null)

    def gradient(weight: float) -> Tensor:
        net = RealAndFake(4, real, fake)
        options: dict[str, Any] = {"roles": {"e2e": 1}} if cls is TwinFlow else {}
        objective = cls(rectification_weight=weight, rectification_clamp=clamp, distance="l2", **options)
        make(objective, ToyNets(net), batch)[1].total.backward()
        assert net.jump.grad is not None
        return net.jump.grad

    dv = max(-clamp, min(clamp, real - fake))
    close(-(gradient(0.8) - gradient(0.0)), torch.full((4, 1, 2, 3), 2 * 0.8 * dv / (6 * 4), dtype=torch.float64))


def test_the_gap_is_taken_at_noised_one_step_samples_at_both_signs_of_one_time() -> None:
    batch, nets = samples(8), Recording(golden_net(1))
    targets, _, roles, draws = make(TwinFlow(rectification_clamp=0.3), nets, batch)
    e2e = roles.rows("e2e")
    one, c = torch.ones(len(e2e), dtype=torch.float64), batch.cond.vectors[e2e]
    with torch.no_grad():
        generated = draws.z[e2e] - nets.online(draws.z[e2e], one, 0 * one, c)
        s = draws.t_rectify
        noised = column(s) * draws.z_rectify + (1 - column(s)) * generated
        expected = (nets.online(noised, -s, -s, c) - nets.online(noised, s, s, c)).clamp(-0.3, 0.3)
    gap, gap_weight = present(targets.gap), present(targets.gap_weight)
    close(gap[e2e], expected)
    assert expected.abs().max() == 0.3
    assert torch.equal(gap_weight[e2e], torch.full_like(one, 0.5 / len(e2e)))
    others = roles.rows("mul", "any", "adv")
    assert not gap[others].any() and not gap_weight[others].any()


def test_the_velocity_gap_is_reported_over_the_e2e_rows() -> None:
    targets, _, roles, _ = make(TwinFlow(roles=EQUAL_ROLES), toy_nets("online"), samples(8))
    squares = present(targets.gap)[roles.rows("e2e")].square().flatten(1).mean(dim=1)
    torch.testing.assert_close(targets.tally["velocity_gap"], torch.stack([squares.sum(), torch.tensor(2.0).double()]))


@pytest.mark.parametrize("options", [{"rectification_weight": 0.0}, {"consistency_ratio": 0.5}])
def test_rectification_off_makes_no_passes_and_no_term(options: dict[str, Any]) -> None:
    nets = Recording(golden_net(1))
    targets, out, *_ = make(TwinFlow(roles={"e2e": 1}, **options), nets, samples(4))
    assert targets.gap is None and set(out.terms) == {"base"}
    assert not any((t < 0).any() for _, t, _, _ in nets.seen)
    assert not RCGM().rectifies and "adv" not in RCGM().role_weights


class Leaky(ToyNets):
    """No-grad passes are made by a copy that keeps its gradients whatever the grad mode: nothing may flow into it."""

    def __init__(self, online: torch.nn.Module) -> None:
        super().__init__(online)
        self.copy = copy.deepcopy(online)

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            return self.online(x_t, t, r, cond.vectors)
        with torch.enable_grad():
            return self.copy(x_t, t, r, cond.vectors)


@pytest.mark.parametrize("objective", [TwinFlow(enhanced_ratio=0.5), TwinFlow(image_free=True), TwinFlowFull()])
def test_no_gradient_flows_into_fake_samples_real_and_fake_passes_or_teachers(objective: Any) -> None:
    nets = Leaky(golden_net(1))
    targets, out, *_ = make(objective, nets, samples(8))
    out.total.backward()
    assert all(p.grad is None for p in nets.copy.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in nets.online.parameters())
    assert not any(value.requires_grad for value in vars(targets).values() if isinstance(value, Tensor))
