"""What the rows of a step are: times, inputs, targets, guidance, and the paper's form."""

import pytest
import torch

from tests.trainer.objectives.cases import (
    EQUAL_ROLES,
    Recording,
    Samples,
    close,
    column,
    golden_net,
    law9,
    make,
    present,
    role_rows,
    roles_and_draws,
    run_step,
    samples,
    toy_nets,
)
from tests.trainer.objectives.toy import VectorConditions
from trainer.objectives.consistency import effective_scale
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TwinFlowFull


# ---------------------------------------------------------------- roles
def test_times_of_every_role() -> None:
    objective = TwinFlow(roles=EQUAL_ROLES, time_max=0.9, consistency_ratio=0.6)
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


def test_rows_of_role_one_jump_from_their_time_to_the_data_and_are_guided() -> None:
    objective = TwinFlow(roles={"mul": 1, "one": 1}, enhanced_ratio=0.5, interval_weight="none")
    batch, nets = samples(8), toy_nets("online")
    targets, _, roles, draws = make(objective, nets, batch)
    one = roles.rows("one")
    close(targets.t[one], draws.t[one])
    assert torch.equal(targets.r[one], torch.zeros(4, dtype=torch.float64))
    assert present(targets.consistent)[one].all()
    x_t, t = targets.x_t[one], targets.t[one]
    with torch.no_grad():
        with_cond = nets.online(x_t, t, t, batch.cond.vectors[one])
        with_null = nets.online(x_t, t, t, batch.null.vectors[one])
    close(targets.velocity[one], (draws.z - batch.x)[one] + 0.5 * (with_cond - with_null))


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
    assert not present(targets.consistent)[adv].any() and torch.equal(targets.weight[adv], torch.full_like(one, 1 / 8))
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
        assert law9({"i": present(first.integral)[~touched]}, {"i": present(second.integral)[~touched]}) < 1e-12
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
    targets, _, roles, _ = make(TwinFlow(roles=EQUAL_ROLES, order=0), toy_nets("online"), samples(8))
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
    targets, _, roles, draws = make(TwinFlow(roles=EQUAL_ROLES, enhanced_ratio=0.7), nets, batch)
    rows = roles.rows("mul", "any")
    x_t, t = targets.x_t[rows], targets.t[rows]
    with torch.no_grad():
        with_cond = nets.online(x_t, t, t, batch.cond.vectors[rows])
        with_null = nets.online(x_t, t, t, batch.null.vectors[rows])
    close(targets.velocity[rows], (draws.z - batch.x)[rows] + 0.7 * (with_cond - with_null))


def test_the_pull_of_guidance_is_reported_over_the_guided_rows() -> None:
    targets, _, roles, draws = make(TwinFlow(roles=EQUAL_ROLES, enhanced_ratio=0.7), toy_nets("online"), samples(8))
    rows = roles.rows("mul", "any")
    moved = (targets.velocity - (draws.z - samples(8).x))[rows].square().flatten(1).mean(dim=1)
    close(targets.tally["guidance_pull"], torch.stack([moved.sum(), torch.tensor(4.0).double()]))


@pytest.mark.parametrize(
    ("teacher", "ratio", "image_free", "scale"),
    [
        ("online", 0.0, False, 1.0),
        ("online", 0.8, False, 5.0),
        ("ema", 0.5, False, 2.0),
        ("online", 1.0, False, float("inf")),
        ("ema", 4.0, False, float("inf")),
        ("frozen", 4.0, False, 5.0),
        ("frozen", 4.0, True, 4.0),
        ("frozen", 0.0, True, 1.0),
    ],
)
def test_the_effective_scale_of_a_guidance_ratio(teacher: str, ratio: float, image_free: bool, scale: float) -> None:
    assert effective_scale(ratio, teacher, image_free) == pytest.approx(scale)
    objective = TwinFlow(teacher=teacher, enhanced_ratio=ratio, image_free=image_free)
    assert objective.effective_guidance == pytest.approx(scale)
    if not image_free:
        assert TwinFlowFull(teacher=teacher, enhanced_ratio=ratio).effective_guidance == pytest.approx(scale)
    assert FlowMatching().effective_guidance == 1


def test_image_free_training_never_looks_at_the_latents() -> None:
    for teacher in ("online", "frozen"):
        objective = TwinFlow(image_free=True, enhanced_ratio=0.5, teacher=teacher)
        first = run_step(objective, toy_nets(teacher), samples(8))
        other = Samples(samples(8, seed=99).x, samples(8).cond, samples(8).null)
        second = run_step(objective, toy_nets(teacher), other)
        assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("teacher", ["online", "ema"])
def test_image_free_training_takes_the_models_own_samples_for_data(teacher: str) -> None:
    """Their noise is not the noise they are mixed with, and guidance adds to their velocity (E1)."""
    batch, nets = samples(8), toy_nets(teacher)
    targets, _, roles, draws = make(TwinFlow(image_free=True, enhanced_ratio=0.7, teacher=teacher), nets, batch)
    rows = roles.rows("e2e", "mul", "any")
    one, c = torch.ones(len(rows), dtype=torch.float64), batch.cond.vectors
    guide = nets.online if nets.teacher is None else nets.teacher
    with torch.no_grad():
        generated = draws.z_image_free - nets.online(draws.z_image_free, one, 0 * one, c[rows])
        plain = draws.z[rows] - generated
        x_t, t = targets.x_t[rows], targets.t[rows]
        pull = guide(x_t, t, t, c[rows]) - guide(x_t, t, t, batch.null.vectors[rows])
    guided = column((t < 1).double())
    close(targets.velocity[rows], plain + 0.7 * guided * pull)
    close(x_t, column(t) * draws.z[rows] + (1 - column(t)) * generated)


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
    assert present(targets.consistent).tolist() == [True, False, False, True] * 3
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
