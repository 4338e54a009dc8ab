"""What an objective refuses, and with which words."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainer.objectives.cases import EQUAL_ROLES, SHAPE, role_rows, samples, toy_nets
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.objective import Rows
from trainer.objectives.rcgm import RCGM
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TwinFlowFull

OBJECTIVES = {cls.__name__: cls for cls in (TwinFlow, TwinFlowFull, RCGM, FlowMatching)}


def targets(objective: Any, x: torch.Tensor | None = None, **changed_draws: Any) -> Any:
    batch, nets = samples(4), toy_nets("online")
    roles = role_rows(objective, 0, 4)
    draws = objective.draw(Rows(0, 0, torch.arange(4), roles), SHAPE, "cpu", torch.float64)
    draws = replace(draws, **{name: change(getattr(draws, name)) for name, change in changed_draws.items()})
    made = objective.targets(nets, batch.x if x is None else x, batch.cond, batch.null, roles, draws)
    return made, nets


@pytest.mark.parametrize("cls", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_not_finite_are_refused_by_row(cls: Any, value: float) -> None:
    x = samples(4).x.clone()
    x[1, 0, 1, 2] = x[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"latents of rows \[1, 3\] are not finite"):
        targets(cls(), x)


@pytest.mark.parametrize(
    "objective", [TwinFlow(roles=EQUAL_ROLES), TwinFlowFull(), RCGM()], ids=lambda o: type(o).__name__
)
def test_a_target_time_above_its_time_is_refused_by_row(objective: Any) -> None:
    with pytest.raises(ValueError, match=r"rows \[2\]: times must satisfy 0 <= r <= t <= 1; row 2 has t=.*, r="):
        targets(objective, u_r=lambda u: u.index_fill(0, torch.tensor([2]), -0.1))
    with pytest.raises(ValueError, match=r"rows \[0\]: times must satisfy"):
        targets(objective, u_r=lambda u: u.index_fill(0, torch.tensor([0]), 1.1))


def test_the_short_jumps_of_mul_rows_are_checked_too() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\]: times must satisfy"):
        targets(TwinFlow(roles=EQUAL_ROLES), u_r_min=lambda u: u.index_fill(0, torch.tensor([1]), -0.1))


@pytest.mark.parametrize("cls", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_time_that_is_not_a_number_is_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"rows \[3\]: times must satisfy"):
        targets(cls(), t=lambda t: t.index_fill(0, torch.tensor([3]), float("nan")))


@pytest.mark.parametrize("cls", [TwinFlowFull, FlowMatching])
def test_times_outside_the_unit_interval_are_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"rows \[0, 2\]: times must satisfy"):
        targets(cls(), t=lambda t: t.index_fill(0, torch.tensor([0, 2]), 1.5))


def test_production_times_are_clamped_as_published() -> None:
    made, _ = targets(TwinFlow(roles={"any": 1}), t=lambda t: t + 2)
    assert torch.equal(made.t, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("cls", [TwinFlow, TwinFlowFull, RCGM])
def test_negative_orders_are_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"objective.order is -1; it must be 0 or more"):
        cls(order=-1)


@pytest.mark.parametrize("cls", [TwinFlow, TwinFlowFull, RCGM])
def test_unknown_teachers_are_refused_with_the_known_ones(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"objective.teacher is 'student'; write one of online, ema, frozen"):
        cls(teacher="student")


@pytest.mark.parametrize("cls", OBJECTIVES.values(), ids=OBJECTIVES)
def test_unknown_distances_are_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"objective.distance is 'huber'; write one of barron, l2"):
        cls(distance="huber")


@pytest.mark.parametrize("roles", [{"e2e": 1, "mul": -1}, {"e2e": 0, "any": 0}, {"any": 0.5}, {}])
def test_role_weights_that_are_negative_fractional_or_all_zero_are_refused(roles: dict[str, Any]) -> None:
    for cls in (TwinFlow, RCGM):
        with pytest.raises(ValueError, match=r"role weights must be integers >= 0 and not all zero"):
            cls(roles=roles)


def test_unknown_roles_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown role \['two'\]; the roles are e2e, mul, any, one, adv"):
        TwinFlow(roles={"two": 1, "any": 1})


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (TwinFlow, {"consistency_ratio": 1.2}, r"consistency_ratio is 1.2; it is a share of t in \[0, 1\]"),
        (TwinFlow, {"consistency_ratio": -0.1}, "consistency_ratio is -0.1"),
        (TwinFlow, {"time_step": 0.0}, "time_step is 0.0; it must be positive"),
        (TwinFlow, {"time_step": float("nan")}, "time_step is nan; it must be positive"),
        (TwinFlow, {"time_max": 1.5}, "time_max is 1.5; times live in"),
        (TwinFlow, {"time_alpha": -1.0}, "time_alpha is -1.0; it must be positive"),
        (TwinFlow, {"residual_clamp": 0.0}, "residual_clamp is 0.0; it must be positive"),
        (TwinFlow, {"rectification_clamp": -1.0}, "rectification_clamp is -1.0; it must be positive"),
        (TwinFlow, {"rectification_weight": -0.5}, "rectification_weight is -0.5; it must be 0 or more"),
        (TwinFlow, {"interval_weight": "linear"}, "interval_weight is 'linear'; write one of tan, none"),
        (TwinFlow, {"time_distribution": "normal"}, "time_distribution is 'normal'; write one of beta, logit_normal"),
        (TwinFlowFull, {"time_step": 0.0}, "time_step is 0.0; it must be positive"),
        (TwinFlowFull, {"residual_clamp": -1.0}, "residual_clamp is -1.0; it must be positive"),
        (TwinFlowFull, {"rectification_clamp": 0.0}, "rectification_clamp is 0.0; it must be positive"),
        (TwinFlowFull, {"barron_scale": 0.0}, "barron_scale is 0.0; it must be positive"),
        (TwinFlowFull, {"rectification_weight": -0.5}, "rectification_weight is -0.5; it must be 0 or more"),
        (FlowMatching, {"barron_scale": 0.0}, "barron_scale is 0.0; it must be positive"),
        (FlowMatching, {"time_std": -1.0}, "time_std is -1.0; it must be positive"),
        (
            FlowMatching,
            {"time_distribution": "beta"},
            "time_distribution is 'beta'; write one of uniform, logit_normal",
        ),
    ],
)
def test_impossible_options_are_refused_by_name(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"objective.{words}"):
        cls(**options)


def test_guidance_that_diverges_is_left_to_the_configuration() -> None:
    """Recorded numbers of such settings must stay reproducible."""
    made, _ = targets(TwinFlow(enhanced_ratio=4.0))
    assert torch.isfinite(made.velocity).all()
