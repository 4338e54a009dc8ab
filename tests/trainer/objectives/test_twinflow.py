"""What the rows of a step are: times, inputs, targets, guidance, rectification, and where gradients do not flow."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.objectives.cases import Samples, golden_net, law9, role_rows, run_step, samples, toy_nets
from tests.trainer.objectives.toy import ToyNets, VectorConditions
from trainer.objectives.objective import LossTerms, Roles, Rows, Targets
from trainer.objectives.rcgm import RCGM
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TwinFlowFull


class Recording(ToyNets):
    """Keeps the inputs and outputs of every call."""

    def __init__(self, online: torch.nn.Module, teacher: torch.nn.Module | None = None) -> None:
        super().__init__(online, teacher)
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        out = super().velocity(x_t, t, r, cond, weights)
        self.seen.append((x_t, t, r, out))
        return out


def roles_and_draws(objective: Any, batch: Samples, step: int = 0) -> tuple[Roles, Any]:
    roles = role_rows(objective, step, len(batch.x))
    rows = Rows(7, step, torch.arange(len(batch.x)), roles)
    return roles, objective.draw(rows, tuple(batch.x.shape[1:]), "cpu", torch.float64)


def make(objective: Any, nets: Any, batch: Samples, step: int = 0) -> tuple[Targets, LossTerms, Roles, Any]:
    roles, draws = roles_and_draws(objective, batch, step)
    targets = objective.targets(nets, batch.x, batch.cond, batch.null, roles, draws)
    return targets, objective.loss(nets, targets), roles, draws


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


# ---------------------------------------------------------------- roles
def test_times_of_every_role() -> None:
    objective = TwinFlow(time_max=0.9, consistency_ratio=0.6)
    targets, _, roles, draws = make(objective, toy_nets("online"), samples(32))
    e2e, mul, any_, adv = (roles.rows(name) for name in ("e2e", "mul", "any", "adv"))
    t = 0.9 * draws.t
    assert torch.equal(targets.t[e2e], torch.ones(8, dtype=torch.float64))
    assert torch.equal(targets.r[e2e], torch.zeros(8, dtype=torch.float64))
    close(targets.t[mul], t[mul])
    close(targets.r[mul], t[mul] * (1 - 0.05 * draws.u_r_min[mul]))
    close(targets.t[any_], t[any_])
    close(targets.r[any_], t[any_] * (1 - 0.6 * draws.u_r[any_]))
    assert torch.equal(targets.t[adv], targets.r[adv]) and bool((targets.t[adv] < 0).all())
    close(targets.t[adv], -t[adv])


def test_data_rows_mix_data_and_noise_and_e2e_rows_are_pure_noise() -> None:
    batch = samples(8)
    targets, _, roles, draws = make(TwinFlow(), toy_nets("online"), batch)
    data, e2e = roles.rows("mul", "any"), roles.rows("e2e")
    t = column(draws.t)
    close(targets.x_t[data], (t * draws.z + (1 - t) * batch.x)[data])
    assert torch.equal(targets.x_t[e2e], draws.z[e2e])
    rows = roles.rows("e2e", "mul", "any")
    close(targets.velocity[rows], (draws.z - batch.x)[rows])


def test_adv_rows_flow_to_the_models_own_samples_at_negative_time() -> None:
    batch, nets = samples(8), Recording(golden_net(1))
    targets, _, roles, draws = make(TwinFlow(), nets, batch)
    adv = roles.rows("adv")
    one, c = torch.ones(len(adv), dtype=torch.float64), batch.cond.vectors[adv]
    generated = draws.z_adv - nets.online(draws.z_adv, one, 0 * one, c).detach()
    s = column(draws.t)[adv]
    close(targets.x_t[adv], s * draws.z[adv] + (1 - s) * generated)
    close(targets.velocity[adv], draws.z[adv] - generated)
    assert not targets.consistent[adv].any() and torch.equal(targets.weight[adv], torch.full_like(one, 1 / 8))
    x_t, t, r, _ = nets.seen[-1]
    assert torch.equal(t[adv], r[adv]) and bool((t[adv] < 0).all())
    assert torch.equal(x_t[adv], targets.x_t[adv])


def test_adv_rows_have_plain_flow_matching_as_their_loss() -> None:
    objective = TwinFlow(roles={"adv": 1}, distance="l2")
    nets = toy_nets("online")
    targets, out, *_ = make(objective, nets, samples(5))
    prediction = nets.online(targets.x_t, targets.t, targets.r, targets.cond.vectors)
    close(out.total, (prediction - targets.velocity).square().mean())


def test_the_callers_latents_are_not_written_to() -> None:
    for objective in (TwinFlow(image_free=True, enhanced_ratio=0.5), TwinFlowFull(enhanced_ratio=0.5)):
        batch = samples(8)
        make(objective, toy_nets("online"), batch)
        assert torch.equal(batch.x, samples(8).x)


def test_every_row_keeps_its_own_condition() -> None:
    """Changing the condition of one sample changes nothing but that sample's rows."""
    for objective in (TwinFlow(enhanced_ratio=0.5), TwinFlowFull(enhanced_ratio=0.5)):
        batch = samples(8)
        changed = Samples(
            batch.x, VectorConditions(batch.cond.vectors.index_fill(0, torch.tensor([5]), 0.3)), batch.null
        )
        first, *_ = make(objective, toy_nets("online"), batch, step=1)
        second, *_ = make(objective, toy_nets("online"), changed, step=1)
        touched = first.sample == 5
        assert torch.equal(first.x_t[~touched], second.x_t[~touched])
        assert law9({"i": first.integral[~touched]}, {"i": second.integral[~touched]}) < 1e-12
        assert not torch.equal(first.cond.vectors[touched], second.cond.vectors[touched])


@pytest.mark.parametrize("step", range(4))
def test_a_step_without_some_roles_is_normal(step: int) -> None:
    for rows in (1, 2, 3):
        targets, out, roles, _ = make(TwinFlow(enhanced_ratio=0.5), toy_nets("online"), samples(rows), step)
        assert torch.isfinite(out.total)
        assert ("rectify" in out.terms) == (roles.total("e2e") > 0)
        assert len(targets) == rows


def test_a_collection_of_roles_changes_only_the_weights_at_order_zero() -> None:
    """Order 0: the mean over mul and adv rows; e2e and any rows have no base loss."""
    targets, _, roles, _ = make(TwinFlow(order=0), toy_nets("online"), samples(8))
    kept, dropped = roles.rows("mul", "adv"), roles.rows("e2e", "any")
    assert torch.equal(targets.weight[dropped], torch.zeros(4, dtype=torch.float64))
    assert torch.equal(targets.weight[roles.rows("adv")], torch.full((2,), 1 / 4, dtype=torch.float64))
    assert bool((targets.weight[kept] >= 1 / 4).all())
    assert targets.consistent is None


# ---------------------------------------------------------------- guidance and image-free training
def test_rows_at_time_one_are_guided_only_if_the_range_goes_beyond() -> None:
    batch = samples(8)

    def guided(interval: tuple[float, float]) -> set[str]:
        objective = TwinFlow(enhanced_ratio=0.5, enhanced_range=interval)
        targets, _, roles, draws = make(objective, toy_nets("online"), batch)
        changed = ((targets.velocity - (draws.z - batch.x)).flatten(1).abs() > 1e-9).any(dim=1)
        changed[roles.rows("adv")] = False
        return {roles.names[i] for i in roles.local[changed].tolist()}

    assert guided((0.0, 1.0)) == {"mul", "any"}
    assert guided((0.0, 1.5)) == {"e2e", "mul", "any"}
    assert guided((1.5, 2.0)) == set()


def test_guided_rows_move_along_the_difference_that_the_condition_makes() -> None:
    batch, nets = samples(8), toy_nets("online")
    targets, _, roles, draws = make(TwinFlow(enhanced_ratio=0.7), nets, batch)
    rows = roles.rows("mul", "any")
    x_t, t = targets.x_t[rows], targets.t[rows]
    with torch.no_grad():
        with_cond = nets.online(x_t, t, t, batch.cond.vectors[rows])
        with_null = nets.online(x_t, t, t, batch.null.vectors[rows])
    close(targets.velocity[rows], (draws.z - batch.x)[rows] + 0.7 * (with_cond - with_null))


def test_image_free_training_never_looks_at_the_latents() -> None:
    for teacher in ("online", "frozen"):
        objective = TwinFlow(image_free=True, enhanced_ratio=0.5, teacher=teacher)
        first = run_step(objective, toy_nets(teacher), samples(8))
        other = Samples(samples(8, seed=99).x, samples(8).cond, samples(8).null)
        second = run_step(objective, toy_nets(teacher), other)
        assert torch.equal(first.loss, second.loss)


def test_image_free_training_with_a_frozen_teacher_replaces_the_velocity() -> None:
    batch, nets = samples(8), toy_nets("frozen")
    targets, _, roles, _ = make(TwinFlow(image_free=True, enhanced_ratio=3.0, teacher="frozen"), nets, batch)
    rows = roles.rows("mul", "any")
    x_t, t = targets.x_t[rows], targets.t[rows]
    assert nets.teacher is not None
    with torch.no_grad():
        with_cond = nets.teacher(x_t, t, t, batch.cond.vectors[rows])
        with_null = nets.teacher(x_t, t, t, batch.null.vectors[rows])
    close(targets.velocity[rows], with_null + 3.0 * (with_cond - with_null))


# ---------------------------------------------------------------- rectification
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
    close(targets.gap[e2e], expected)
    assert expected.abs().max() == 0.3
    assert torch.equal(targets.gap_weight[e2e], torch.full_like(one, 0.5 / len(e2e)))
    others = roles.rows("mul", "any", "adv")
    assert not targets.gap[others].any() and not targets.gap_weight[others].any()


def test_the_velocity_gap_is_reported_over_the_e2e_rows() -> None:
    targets, _, roles, _ = make(TwinFlow(), toy_nets("online"), samples(8))
    squares = targets.gap[roles.rows("e2e")].square().flatten(1).mean(dim=1)
    torch.testing.assert_close(targets.tally["velocity_gap"], torch.stack([squares.sum(), torch.tensor(2.0).double()]))


@pytest.mark.parametrize("options", [{"rectification_weight": 0.0}, {"consistency_ratio": 0.5}])
def test_rectification_off_makes_no_passes_and_no_term(options: dict[str, float]) -> None:
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


# ---------------------------------------------------------------- paper form
def test_the_paper_form_gives_every_sample_a_row_of_every_term() -> None:
    batch, nets = samples(3), toy_nets("online")
    targets, out, _, draws = make(TwinFlowFull(distance="l2"), nets, batch)
    one = torch.ones(3, dtype=torch.float64)
    times = torch.stack([draws.t, draws.t, -draws.t, one], dim=1).flatten()
    ends = torch.stack([draws.t * (1 - draws.u_r), draws.t, -draws.t, 0 * one], dim=1).flatten()
    close(targets.t, times)
    close(targets.r, ends)
    assert targets.sample.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(targets.cond.vectors, batch.cond.vectors[targets.sample])
    assert torch.equal(targets.x_t[3::4], draws.z)
    x_t = column(draws.t) * draws.z + (1 - column(draws.t)) * batch.x
    close(targets.x_t[0::4], x_t)
    close(targets.x_t[1::4], x_t)
    with torch.no_grad():
        generated = draws.z - nets.online(draws.z, one, 0 * one, batch.cond.vectors)
    close(targets.x_t[2::4], column(draws.t) * draws.z + (1 - column(draws.t)) * generated)
    close(targets.velocity[2::4], draws.z - generated)
    assert targets.consistent.tolist() == [True, False, False, True] * 3
    assert set(out.terms) == {"base", "rectify"}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_loss_does_not_depend_on_how_often_a_sample_is_repeated(rows: int) -> None:
    """Normalised by the global batch: equal samples with equal draws give the loss of one."""
    objective, nets = TwinFlowFull(), toy_nets("online")
    one = samples(1)
    roles, draws = roles_and_draws(objective, one)
    many_roles = role_rows(objective, 0, rows)
    repeated = type(draws)(**{name: value.repeat_interleave(rows, dim=0) for name, value in vars(draws).items()})
    index = torch.zeros(rows, dtype=torch.int64)
    single = objective.loss(nets, objective.targets(nets, one.x, one.cond, one.null, roles, draws))
    many = objective.loss(
        nets, objective.targets(nets, one.x[index], one.cond[index], one.null[index], many_roles, repeated)
    )
    close(many.total, single.total)
