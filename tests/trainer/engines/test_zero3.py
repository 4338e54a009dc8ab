"""What the ZeRO engine promises: the same step as a plain process, skipped updates, whose weights compute, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Ema, Optimizer
from models.weights import FlatPart, plain_name
from tests.ranks import run_ranks
from tests.trainer.engines import toy
from tests.trainer.engines.running import (
    OPTIMIZER,
    RATE,
    State,
    make_zero3,
    outputs,
    outputs_by_weights,
    poisoned_step,
    shared_state,
    train_step,
)
from tests.trainer.engines.sameness import assert_same
from tests.trainer.engines.test_fsdp2_sameness import plain_run
from trainer.engines.engine import whole
from trainer.engines.zero3 import Zero3, Zero3Options
from trainer.objectives.objective import TEACHER

FLOAT32 = torch.float32
COUNT = 24  # rows of a global batch that 1, 2 and 3 ranks cut into 1 and 4 micro-batches
GROUPS = ("parameter", "exp_avg", "exp_avg_sq", "ema")
TIMEOUT = 240  # the first case imports DeepSpeed on every rank

# ---- sameness

CASES: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"activation_checkpointing": False}, 4),
    ({"offload_optimizer": True, "bucket_elements": 64}, 4),
    ({"offload_parameters": True, "prefetch_elements": 64}, 1),
    ({"stage": 2}, 1),
    ({"stage": 2, "bucket_elements": 64}, 4),
]


def _runs(steps: int) -> list[dict[str, Any]]:
    found = []
    for options, accumulation in CASES:
        engine = make_zero3(**options)
        norms = [train_step(engine, step, FLOAT32, accumulation, count=COUNT) for step in range(steps)]
        found.append({"norms": norms, **{group: whole(engine, group) for group in GROUPS}})
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_partitioned_step_equals_the_plain_one(world_size: int) -> None:
    plain = plain_run(torch.float64, 3, COUNT)
    for of_rank in run_ranks(_runs, world_size, 3, timeout=TIMEOUT):
        for found in of_rank:
            assert found["norms"] == pytest.approx(plain["norms"], rel=1e-5)
            for group in GROUPS:
                assert_same(found[group], plain[group], 1e-5)


# ---- fail together


def _poisoned(options: dict[str, Any]) -> list[Any]:
    return poisoned_step(make_zero3(**options))


@pytest.mark.parametrize("options", [{}, {"stage": 2}, {"offload_optimizer": True}])
def test_a_non_finite_gradient_on_one_rank_skips_the_update_on_all(options: dict[str, Any]) -> None:
    for norm, unchanged, steps, recovered, moved in run_ranks(_poisoned, 2, options, timeout=TIMEOUT):
        assert not norm < float("inf")
        assert unchanged and steps == 1
        assert 0 < recovered < float("inf") and moved


def _step_without_backward() -> str:
    engine = make_zero3()
    train_step(engine, 0, FLOAT32, 1)
    with pytest.raises(RuntimeError) as caught:
        engine.step(RATE)
    return str(caught.value)


def test_a_step_without_gradients_names_the_parameters() -> None:
    message = run_ranks(_step_without_backward, 1, timeout=TIMEOUT)[0]
    assert "25 of 25 trainable parameters got no gradient" in message and "idle_parameters" in message


# ---- weights of others: average, teacher


def _by_weights(teacher: str, options: dict[str, Any]) -> dict[str, Any]:
    return outputs_by_weights(make_zero3(teacher, **options), FLOAT32)


@pytest.mark.parametrize(
    ("teacher", "options"),
    [("online", {}), ("online", {"stage": 2}), ("ema", {}), ("frozen", {}), ("ema", {"offload_optimizer": True})],
)
def test_each_call_computes_with_the_weights_it_names(teacher: str, options: dict[str, Any]) -> None:
    for found in run_ranks(_by_weights, 2, teacher, options, timeout=TIMEOUT):
        same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
        same(found["online"], found["expected"]["online"])
        same(found["evaluated"], found["expected"]["ema"])
        assert torch.equal(found["afterwards"], found["online"])
        assert (found["online"] - found["evaluated"]).norm() > 1e-3 < (found["online"] - found["initial"]).norm()
        wanted = {"online": found["online"], "ema": found["evaluated"], "frozen": found["initial"]}[teacher]
        same(found["teacher"], wanted)
        assert found["shares"] == (teacher == "online")
        assert (found["averages"], found["parameters"]) == (25, 27)


# ---- precision


def _dtypes(options: dict[str, Any]) -> dict[str, set[torch.dtype]]:
    model = toy.ToyBackbone()
    seen: dict[str, set[torch.dtype]] = {"up": set(), "into": set(), "out": set()}
    for name, module in (("up", model.blocks[1].up), ("into", model.into), ("out", model.out)):
        module.register_forward_hook(lambda _, inputs, output, name=name: seen[name].update({output.dtype}))
    engine = Zero3(Zero3Options(**options), model, OPTIMIZER, Ema(decay=0.9), "online")
    train_step(engine, 0, FLOAT32, 1)
    return seen | {"root": set(model.seen.values()), "state": {p.local.dtype for p in engine.parts()}}


@pytest.mark.parametrize("stage", [3, 2])
def test_blocks_compute_in_bfloat16_and_all_else_in_float32(stage: int) -> None:
    found = run_ranks(_dtypes, 2, {"block_dtype": "bfloat16", "reduce_dtype": "bfloat16", "stage": stage})[0]
    assert found.pop("up") == {torch.bfloat16}
    assert set().union(*found.values()) == {FLOAT32} and {"into", "out", "root", "state"} == set(found)


# ---- construction


def _from_meta(teacher: str, stage: int) -> tuple[State, State, Tensor]:
    source = toy.ToyBackbone(seed=5)
    with torch.device("meta"):
        backbone = toy.ToyBackbone()

    def load(module: nn.Module) -> None:
        wanted = source.state_dict()
        for name, parameter in module.named_parameters():
            whole = wanted[plain_name(name)].flatten()
            part = getattr(parameter, "flat_part", None) or FlatPart(parameter.shape, 0, parameter.data.view(-1))
            part.local.copy_(whole[part.start : part.start + len(part.local)])
        module.table.copy_(source.table)  # type: ignore[union-attr, operator]

    options = Zero3Options(stage=stage)
    engine = Zero3(options, backbone, OPTIMIZER, Ema(decay=0.9), teacher, load=load)
    return (
        shared_state(engine, "online"),
        shared_state(engine, "ema"),
        outputs(engine, FLOAT32, TEACHER) - outputs(engine, FLOAT32),
    )


@pytest.mark.parametrize(("teacher", "stage"), [("online", 3), ("ema", 3), ("online", 2)])
def test_a_backbone_on_meta_is_loaded_as_parts_before_copies_are_made(teacher: str, stage: int) -> None:
    expected = toy.ToyBackbone(seed=5).state_dict()
    for online, average, difference in run_ranks(_from_meta, 2, teacher, stage, timeout=TIMEOUT):
        assert_same(online, expected, 0.0)
        assert_same(average, expected, 0.0)
        assert not difference.any()


def _refused(options: dict[str, Any], teacher: str, built: torch.dtype, optimizer: str) -> str:
    backbone = toy.ToyBackbone(dtype=built)
    try:
        Zero3(Zero3Options(**options), backbone, Optimizer(name=optimizer), Ema(decay=0.9), teacher)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "teacher", "built", "optimizer", "message"),
    [
        ({"block_dtype": "float16"}, "online", FLOAT32, "adamw", "engine.block_dtype is 'float16'"),
        ({"stage": 1}, "online", FLOAT32, "adamw", "engine.stage is 1; choose 3 or 2"),
        ({"bucket_elements": 0}, "online", FLOAT32, "adamw", "engine.bucket_elements is 0"),
        ({"stage": 2, "offload_parameters": True}, "online", FLOAT32, "adamw", "set engine.stage=3"),
        ({"stage": 2}, "ema", FLOAT32, "adamw", "or objective.teacher=online"),
        ({}, "student", FLOAT32, "adamw", "choose online, ema or frozen"),
        ({}, "online", torch.float64, "adamw", "set model.dtype=float32, or engine.name=fsdp2"),
        ({}, "online", FLOAT32, "adamw8bit", "set optimizer.name=adamw"),
    ],
)
def test_options_that_cannot_hold_are_refused_with_the_remedy(
    options: dict[str, Any], teacher: str, built: torch.dtype, optimizer: str, message: str
) -> None:
    assert message in run_ranks(_refused, 1, options, teacher, built, optimizer, timeout=TIMEOUT)[0]
