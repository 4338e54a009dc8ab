"""Law 1: packed passes are few, of the known number, and give what the unpacked ones give (law 9 in float64)."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.objectives.cases import (
    PUBLISHED,
    SHAPE,
    TEACHERS,
    assert_same_step,
    role_rows,
    run_step,
    samples,
    toy_nets,
)
from tests.trainer.objectives.toy import VectorConditions
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.passes import Call, Task, run_packed, run_unpacked
from trainer.objectives.rcgm import RCGM
from trainer.objectives.twinflow import TwinFlow
from trainer.objectives.twinflow_full import TwinFlowFull

BATCHES = (1, 2, 3, 4, 5, 8)
ORDERS = (0, 1, 2, 3)


def expected_passes(objective: Any, mode: str, rows: int, step: int) -> tuple[int, int]:
    """Law 1's no-grad passes (of the online or shared module, of a separate teacher), with the roles of this step."""
    roles = role_rows(objective, step, rows)
    if isinstance(objective, FlowMatching):
        return 0, 0
    if isinstance(objective, TwinFlowFull):
        i, a, e, n = 0, 1, 2, objective.order
        g = int(objective.needs_null)
    else:
        data = roles.total("e2e", "mul", "any", "one") > 0
        i = int(objective.image_free and data)
        g = int(objective.needs_null and roles.total("mul", "any", "one") > 0)
        n = objective.order if objective.consistent and data else 0
        a = int(roles.total("adv") > 0)
        e = 2 if objective.rectifies and roles.total("e2e") > 0 else 0
    if mode == "ema":
        return max(i, e, a), g + n
    if mode == "frozen":
        return max(i + n, e, a), g
    return max(i + g + n, e, a), 0


def counted(calls: list[tuple[int, int, bool]]) -> tuple[int, int, int]:
    """No-grad calls with online rows, those of teacher rows alone, graded calls."""
    no_grad = [(rows, taught) for rows, taught, graded in calls if not graded]
    alone = sum(rows == taught for rows, taught in no_grad)
    return len(no_grad) - alone, alone, len(calls) - len(no_grad)


def check(objective: Any, mode: str, rows: int, step: int) -> None:
    batch = samples(rows)
    reference = run_step(objective, toy_nets(mode), batch, step, run=run_unpacked)
    for chunk_rows in (None, *([1] if rows <= 3 else []), *([3] if rows >= 3 else [])):
        packed = run_step(objective, toy_nets(mode), batch, step, chunk_rows=chunk_rows)
        assert_same_step(packed, reference)
        (calls,) = packed.calls
        online, teacher = expected_passes(objective, mode, rows, step)
        if chunk_rows is not None:
            assert all(n <= chunk_rows for n, _, graded in calls if not graded)
        elif mode in ("ema", "frozen"):
            assert counted(calls) == (online, teacher, 1), (objective, mode, rows)
        else:
            assert (sum(counted(calls)[:2]), counted(calls)[2]) == (online, 1), (objective, mode, rows)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", TEACHERS)
def test_twinflow_packed_equals_unpacked(mode: str, order: int) -> None:
    for rows, guidance, image_free in itertools.product(BATCHES, (0.0, 0.5), (False, True)):
        objective = TwinFlow(
            order=order, teacher=mode.split()[0], enhanced_ratio=guidance, image_free=image_free, **PUBLISHED
        )
        check(objective, mode, rows, step=rows)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", TEACHERS)
def test_twinflow_full_packed_equals_unpacked(mode: str, order: int) -> None:
    for index, rows in enumerate(BATCHES):
        guidance = 0.5 * ((index + order) % 2)
        check(TwinFlowFull(order=order, teacher=mode.split()[0], enhanced_ratio=guidance), mode, rows, step=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", TEACHERS)
def test_rcgm_packed_equals_unpacked(mode: str, order: int) -> None:
    for index, rows in enumerate(BATCHES):
        guidance = 0.5 * ((index + order) % 2)
        check(RCGM(order=order, teacher=mode.split()[0], enhanced_ratio=guidance), mode, rows, step=rows)


@pytest.mark.parametrize("rows", BATCHES)
def test_flow_matching_needs_no_pass_but_the_graded_one(rows: int) -> None:
    check(FlowMatching(), "online", rows, step=0)


VARIANTS = {
    "default recipe": {name: getattr(TwinFlow(), name) for name in PUBLISHED},
    "published partition": {"published_partition": True},
    "barron alpha 0": {"barron_alpha": 0.0},
    "l2": {"distance": "l2", "interval_weight": "none"},
    "guided e2e": {"enhanced_ratio": 0.5, "enhanced_range": (-0.5, 1.5)},
    "short jumps": {"consistency_ratio": 0.3},
    "no jumps": {"consistency_ratio": 0.0},
    "no adv": {"roles": {"e2e": 2, "mul": 1, "any": 1}},
    "role one": {"roles": {"e2e": 1, "mul": 1, "one": 1, "adv": 1}, "enhanced_ratio": 0.5},
    "role one image-free": {"roles": {"mul": 1, "one": 1, "adv": 1}, "enhanced_ratio": 0.5, "image_free": True},
    "unequal": {"roles": {"e2e": 1, "mul": 2, "any": 1, "adv": 0}},
    "beta times": {"time_alpha": 0.8, "time_beta": 1.2, "time_max": 0.9},
    "logit normal": {"time_distribution": "logit_normal", "time_mean": 0.4},
}


@pytest.mark.parametrize("mode", TEACHERS)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_packed_equals_unpacked(options: dict[str, Any], mode: str) -> None:
    for rows in (4, 7):
        check(TwinFlow(teacher=mode.split()[0], **(PUBLISHED | options)), mode, rows, step=1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_the_online_teacher_needs_far_fewer_passes_than_the_published_code(order: int, guidance: float) -> None:
    """Published: 4 + N + 2g + i per micro-batch, the graded one among them."""
    nets = toy_nets("online")
    run_step(TwinFlow(order=order, enhanced_ratio=guidance, **PUBLISHED), nets, samples(8))
    assert len(nets.calls) == max((guidance > 0) + order, 2) + 1 < 4 + order + 2 * (guidance > 0)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 6, 12])
def test_there_is_one_graded_pass_per_micro_batch_and_no_more_other_passes(micro_batch_size: int) -> None:
    nets = toy_nets("online")
    whole = run_step(TwinFlow(enhanced_ratio=0.5, **PUBLISHED), toy_nets("online"), samples(12))
    made = run_step(TwinFlow(enhanced_ratio=0.5, **PUBLISHED), nets, samples(12), micro_batch_size=micro_batch_size)
    assert [rows for rows, _, graded in nets.calls if graded] == [micro_batch_size] * (12 // micro_batch_size)
    assert [graded for *_, graded in nets.calls] == [False] * 3 + [True] * (12 // micro_batch_size)
    assert_same_step(made, whole)


def test_the_frozen_teachers_guidance_comes_first() -> None:
    nets = toy_nets("frozen")
    run_step(TwinFlow(teacher="frozen", enhanced_ratio=2.0, **PUBLISHED), nets, samples(8))
    assert [taught == rows for rows, taught, _ in nets.calls] == [True, False, False, False]


def make_task(rows: int, most: int, chain: int, conditions: list[int], teacher: bool = False) -> Task:
    """A chain of calls, each on what the one before gave."""
    x = torch.arange(rows, dtype=torch.float64)[:, None].repeat(1, 6).reshape(-1, *SHAPE)
    t = torch.full((rows,), 0.5, dtype=torch.float64)
    for _ in range(chain):
        (x,) = yield [Call(x, t, t, torch.tensor(conditions, dtype=torch.int64), most, teacher)]
    return x


CONDITIONS = VectorConditions(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["online", "ema", "ema shared"])
@pytest.mark.parametrize("chunk_rows", [None, 1, 2, 5])
def test_ranks_with_unequal_rows_or_none_make_equally_many_calls(mode: str, chunk_rows: int | None) -> None:
    """`most` is what all ranks know; a rank without rows stands in with single rows of weight 0."""
    kinds = []
    for mine in ([0, 1, 2, 0, 1], [2], []):
        nets = toy_nets(mode)
        tasks = [
            make_task(len(mine), 5, 3, mine, teacher=mode != "online"),
            make_task(len(mine), 5, 2, mine),
        ]
        outputs = run_packed(tasks, nets, CONDITIONS, chunk_rows)
        assert [len(out) for out in outputs] == [len(mine)] * 2
        kinds.append([mode == "ema" and taught == rows for rows, taught, _ in nets.calls])
        assert all(rows >= 1 for rows, _, _ in nets.calls)
        if chunk_rows:
            assert all(rows <= chunk_rows for rows, _, _ in nets.calls)
    assert kinds[0] == kinds[1] == kinds[2]


def test_outputs_go_back_to_the_task_that_asked() -> None:
    def run(order: list[int]) -> list[Tensor]:
        tasks = [make_task(2, 2, 1, [0, 1]), make_task(1, 1, 3, [2]), make_task(3, 3, 2, [2, 1, 0], teacher=True)]
        done = run_packed([tasks[i] for i in order], toy_nets("ema"), CONDITIONS)
        return [done[order.index(i)] for i in range(3)]

    for first, second in zip(run([0, 1, 2]), run([2, 0, 1]), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    nets = toy_nets("online")
    alone = run_packed([make_task(1, 1, 1, [2])], nets, CONDITIONS)[0]
    expected = nets.online(
        torch.zeros(1, *SHAPE, dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64),
        CONDITIONS.vectors[2:],
    )
    torch.testing.assert_close(alone, expected)
