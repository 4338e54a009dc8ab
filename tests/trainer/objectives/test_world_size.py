"""World size, accumulation and chunking change neither the calls of a rank nor the numbers of a step (laws 1, 2, 9)."""

from typing import Any

import pytest
import torch

from tests.trainer.objectives.cases import (
    PUBLISHED,
    SHAPE,
    TEACHERS,
    Step,
    assert_same_step,
    role_rows,
    run_step,
    samples,
    toy_nets,
)
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.objective import Rows
from trainer.objectives.rcgm import RCGM
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TwinFlowFull

OBJECTIVES = {
    "twinflow": TwinFlow,
    "twinflow_full": TwinFlowFull,
    "rcgm": RCGM,
}


def kinds(step: Step, mode: str) -> list[list[tuple[bool, bool]]]:
    """Of every rank: (by a separate teacher, graded) of its calls, in order."""
    alone = mode in ("ema", "frozen")
    return [[(alone and taught == rows, graded) for rows, taught, graded in calls] for calls in step.calls]


@pytest.mark.parametrize("chunk_rows", [None, 1, 2])
@pytest.mark.parametrize("mode", TEACHERS)
@pytest.mark.parametrize("cls", OBJECTIVES.values(), ids=OBJECTIVES)
def test_ranks_make_the_same_calls_and_add_up_to_the_single_rank(cls: Any, mode: str, chunk_rows: int | None) -> None:
    """Windows of 1, 2 and 3 rows per rank: smaller than the period of 4, so that ranks lack roles."""
    published = PUBLISHED if cls is TwinFlow else {}
    objective = cls(teacher=mode.split()[0], enhanced_ratio=0.5, **published)
    for global_batch, step, ranks in ((2, 0, (2,)), (2, 1, (2,)), (3, 2, (3,)), (6, 3, (2, 3))):
        whole = run_step(objective, toy_nets(mode), samples(global_batch), step)
        for world_size in ranks:
            split = run_step(objective, toy_nets(mode), samples(global_batch), step, world_size, 1, chunk_rows)
            assert_same_step(split, whole)
            first, *others = kinds(split, mode)
            assert all(other == first for other in others), (world_size, global_batch, step)


@pytest.mark.parametrize("options", [{"image_free": True}, {"published_partition": True}, {"order": 0}, {"order": 3}])
@pytest.mark.parametrize("mode", ["online", "ema", "frozen"])
def test_options_do_not_break_the_equality_over_ranks(options: dict[str, Any], mode: str) -> None:
    objective = TwinFlow(teacher=mode, enhanced_ratio=0.5, **PUBLISHED, **options)
    for world_size, micro_batch_size, chunk_rows in ((2, 2, None), (3, 1, 2), (6, 2, 1)):
        whole = run_step(objective, toy_nets(mode), samples(12))
        split = run_step(objective, toy_nets(mode), samples(12), 5, world_size, micro_batch_size, chunk_rows)
        assert_same_step(split, whole)
        assert len({tuple(calls) for calls in kinds(split, mode)}) == 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_flow_matching_adds_up_over_ranks(world_size: int) -> None:
    for distribution in ("uniform", "logit_normal"):
        objective = FlowMatching(time_distribution=distribution)
        whole = run_step(objective, toy_nets("online"), samples(6))
        assert_same_step(run_step(objective, toy_nets("online"), samples(6), 5, world_size, 1), whole)


@pytest.mark.parametrize(
    "objective",
    [
        TwinFlow(image_free=True, time_alpha=0.8, time_beta=1.3, **PUBLISHED),
        TwinFlow(time_distribution="logit_normal"),
        TwinFlowFull(),
        RCGM(),
        FlowMatching(),
        FlowMatching(time_distribution="logit_normal"),
    ],
    ids=lambda objective: type(objective).__name__,
)
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_a_row_draws_the_same_numbers_on_any_rank(objective: Any, world_size: int) -> None:
    ids = torch.arange(12)

    def draw(rank: int, world_size: int) -> dict[str, torch.Tensor]:
        roles = role_rows(objective, 4, 12, rank, world_size)
        local = ids.chunk(world_size)[rank]
        return vars(objective.draw(Rows(9, 4, local, roles), SHAPE, "cpu", torch.float64))

    whole, parts = draw(0, 1), [draw(rank, world_size) for rank in range(world_size)]
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values), name


@pytest.mark.parametrize(
    "objective", [TwinFlow(), TwinFlow(**PUBLISHED), TwinFlowFull(), FlowMatching()], ids=lambda o: type(o).__name__
)
def test_draws_change_with_step_and_seed_and_keep_to_their_ranges(objective: Any) -> None:
    def draw(seed: int, step: int) -> dict[str, torch.Tensor]:
        rows = Rows(seed, step, torch.arange(64), role_rows(objective, 0, 64))
        return vars(objective.draw(rows, SHAPE, "cpu", torch.float64))

    base = draw(1, 0)
    for other in (draw(1, 1), draw(2, 0)):
        for name, values in base.items():
            assert values.numel() == 0 or not (values == other[name]).any(), name
    assert all(values.dtype == torch.float64 for values in base.values())
    for name, values in base.items():
        if name.startswith(("t", "u")):
            assert values.min() >= 0 and values.max() <= 1
        elif values.numel():
            assert values.shape[1:] == SHAPE
            assert abs(values.mean()) < 0.3 and abs(values.std() - 1) < 0.3


def test_noises_of_one_row_are_different_numbers() -> None:
    rows = Rows(1, 0, torch.arange(8), role_rows(TwinFlow(**PUBLISHED), 0, 8))
    draws = TwinFlow(image_free=True, **PUBLISHED).draw(rows, SHAPE, "cpu", torch.float64)
    values = torch.cat([draws.z, draws.z_image_free, draws.z_adv, draws.z_rectify]).flatten()
    assert len(values.unique()) == len(values)
    times = torch.cat([draws.t, draws.u_r, draws.u_r_min, draws.t_rectify])
    assert len(times.unique()) == len(times)
