"""What a step reports about its targets, and a role that equals a special case of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainer.objectives.cases import (
    EQUAL_ROLES,
    assert_same_step,
    close,
    make,
    present,
    role_rows,
    roles_and_draws,
    run_step,
    samples,
    target_tensors,
    toy_nets,
)
from tests.trainer.objectives.toy import ToyNets, VectorConditions
from trainer.objectives.losses import rows_of_roles
from trainer.objectives.passes import run_unpacked
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TERMS, TwinFlowFull


def test_the_paper_form_reports_its_velocity_gap_and_the_pull_of_guidance_over_all_samples() -> None:
    batch, objective = samples(6), TwinFlowFull(enhanced_ratio=0.5)
    targets, _, _, draws = make(objective, toy_nets("online"), batch)
    pulled = targets.velocity[0::4] - (draws.z - batch.x)
    gap = present(targets.gap)[3::4]
    for name, values in (("guidance_pull", pulled), ("velocity_gap", gap)):
        squares = values.square().mean(dim=(1, 2, 3))
        assert bool((squares > 0).all())
        close(targets.tally[name], torch.stack([squares.sum(), squares.new_tensor(6.0)]))


@pytest.mark.parametrize("objective", [TwinFlow(), TwinFlowFull()])
def test_without_guidance_no_pull_is_reported(objective: Any) -> None:
    targets, *_ = make(objective, toy_nets("online"), samples(4))
    assert set(targets.tally) == {"velocity_gap"}


@pytest.mark.parametrize("objective", [TwinFlow(enhanced_ratio=0.5), TwinFlowFull(enhanced_ratio=0.5)])
def test_diagnostics_do_not_depend_on_ranks_or_packing(objective: Any) -> None:
    assert {"guidance_pull", "velocity_gap"} <= run_step(objective, toy_nets("online"), samples(8)).tally.keys()
    whole = run_step(objective, toy_nets("online"), samples(8), run=run_unpacked)
    assert_same_step(run_step(objective, toy_nets("online"), samples(8), world_size=4), whole)


def test_a_model_blind_to_its_condition_feels_no_pull() -> None:
    batch = samples(8)
    blind = replace(batch, null=VectorConditions(batch.cond.vectors))
    targets, *_ = make(TwinFlow(roles=EQUAL_ROLES, enhanced_ratio=0.9), toy_nets("online"), blind)
    assert targets.tally["guidance_pull"].tolist() == [0.0, 4.0]


@pytest.mark.parametrize("options", [{}, {"enhanced_ratio": 0.5}, {"image_free": True}, {"order": 1, "teacher": "ema"}])
def test_role_one_is_role_any_with_the_longest_jump(options: dict[str, Any]) -> None:
    batch, nets = samples(6), toy_nets(options.get("teacher", "online"))
    one, any_ = (TwinFlow(roles={"mul": 1, name: 2}, **options) for name in ("one", "any"))
    _, draws = roles_and_draws(any_, batch)
    longest = replace(draws, u_r=torch.ones_like(draws.u_r))
    made = []
    for objective, given in ((one, draws), (any_, longest)):
        roles = role_rows(objective, 0, 6)
        made.append(objective.targets(nets, batch.x, batch.cond, batch.null, roles, given))
    for name, value in target_tensors(made[1]).items():
        assert torch.equal(target_tensors(made[0])[name], value), name
    assert rows_of_roles(made[0]) == {"mul": 2, "one": 4} and rows_of_roles(made[1]) == {"mul": 2, "any": 4}
    shorter = any_.targets(nets, batch.x, batch.cond, batch.null, role_rows(any_, 0, 6), draws)
    assert not torch.equal(present(shorter.integral), present(made[0].integral))


def test_rows_are_counted_by_the_role_that_their_error_is_reported_under() -> None:
    targets, *_ = make(TwinFlowFull(), ToyNets(toy_nets("online").online), samples(5))
    assert rows_of_roles(targets) == dict.fromkeys(TERMS, 5)
    assert rows_of_roles(targets[:6]) == {"jump": 2, "flow": 2, "adv": 1, "e2e": 1}
