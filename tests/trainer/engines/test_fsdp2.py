"""What the FSDP2 engine promises: gathers, precision, skipped updates, whose weights compute, how it is built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from configs.schema import Ema, Optimizer
from models.weights import plain_name
from tests.ranks import run_ranks
from tests.trainer.engines import toy
from tests.trainer.engines.running import (
    OPTIMIZER,
    RATE,
    ROWS,
    State,
    make_engine,
    outputs,
    outputs_by_weights,
    own_rows,
    plain_output,
    poisoned_step,
    shared_state,
    train_step,
    velocity,
)
from tests.trainer.engines.sameness import assert_same
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.objectives.objective import ONLINE, TEACHER

# ---- gathers


def _gathers(options: dict[str, Any], no_grad_passes: int, accumulation: int) -> list[int]:
    engine = make_engine(torch.float32, **options)
    counts = []
    for step in range(3):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            train_step(engine, step, torch.float32, accumulation, no_grad_passes)
        counts.append(sum(event.count for event in trace.key_averages() if event.key == "c10d::_allgather_base_"))
    return counts


@pytest.mark.parametrize("recompute", [True, False])
def test_kept_gathered_each_unit_is_gathered_once_a_step(recompute: bool) -> None:
    options = {"activation_checkpointing": recompute, "keep_gathered": True}
    assert run_ranks(_gathers, 2, options, 3, 2) == [[4, 4, 4]] * 2  # 3 blocks and the root


@pytest.mark.parametrize("recompute", [True, False])
def test_otherwise_blocks_are_gathered_for_every_pass_and_the_root_once(recompute: bool) -> None:
    # 3 blocks: 3 passes without gradient, 2 forward and 2 backward passes; the root: once.
    assert run_ranks(_gathers, 2, {"activation_checkpointing": recompute}, 3, 2) == [[3 * (3 + 2 * 2) + 1] * 3] * 2


# ---- precision


def _dtypes(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    model = toy.ToyBackbone(dtype=dtype)
    engine = FSDP2(FSDP2Options(**options), model, OPTIMIZER, Ema(decay=0.9), "online")
    master = torch.float64 if dtype == torch.float64 else torch.float32
    graded = own_rows(0, master)
    out = velocity(engine, graded)
    engine.backward(toy.loss(out, graded, ROWS))
    engine.step(RATE)
    blocks = set().union(*(block.seen for block in model.blocks))
    return {"blocks": blocks, "out": out.dtype, "state": {p.local.dtype for p in engine.parts()}, **model.seen}


@pytest.mark.parametrize("built", [torch.float32, torch.bfloat16])
def test_blocks_compute_in_bfloat16_and_all_else_in_float32(built: torch.dtype) -> None:
    found = run_ranks(_dtypes, 2, {"block_dtype": "bfloat16"}, built)[0]
    assert found.pop("blocks") == {torch.bfloat16}
    assert found.pop("state") == {torch.float32}
    assert set(found.values()) == {torch.float32} and {"t", "x_t", "embedding", "hidden", "out"} == set(found)


def test_a_float64_model_stays_float64_throughout() -> None:
    found = run_ranks(_dtypes, 2, {"block_dtype": "bfloat16"}, torch.float64)[0]
    assert found.pop("blocks") == found.pop("state") == set(found.values()) == {torch.float64}


# ---- fail together


def _poisoned(optimizer: str) -> list[Any]:
    options = Optimizer(name=optimizer, learning_rate=RATE)
    return poisoned_step(FSDP2(FSDP2Options(), toy.ToyBackbone(), options, Ema(decay=0.9), "online"))


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_a_non_finite_gradient_on_one_rank_skips_the_update_on_all(optimizer: str) -> None:
    for norm, unchanged, steps, recovered, moved in run_ranks(_poisoned, 2, optimizer):
        assert not norm < float("inf")
        assert unchanged and steps == 1
        assert 0 < recovered < float("inf") and moved


def _step_without_backward() -> str:
    with pytest.raises(RuntimeError) as caught:
        make_engine().step(RATE)
    return str(caught.value)


def test_a_step_without_gradients_names_the_parameters() -> None:
    message = run_ranks(_step_without_backward, 1)[0]
    assert "25 of 25 trainable parameters got no gradient" in message and "idle_parameters" in message


# ---- weights of others: average, teacher


TEACHERS: list[Any] = [
    ("online", {}),
    ("ema", {"keep_gathered": True}),
    ("frozen", {"cpu_offload": True, "prefetch": 2}),
]
TEACHERS += [("frozen", {}), ("ema", {"cpu_offload": True, "checkpoint_group": 2})]


def _by_weights(teacher: str, options: dict[str, Any]) -> dict[str, Any]:
    return outputs_by_weights(make_engine(teacher=teacher, **options), torch.float64)


@pytest.mark.parametrize(("teacher", "options"), TEACHERS)
def test_each_call_computes_with_the_weights_it_names(teacher: str, options: dict[str, Any]) -> None:
    for found in run_ranks(_by_weights, 2, teacher, options):
        same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # noqa: E731
        same(found["online"], found["expected"]["online"])
        same(found["evaluated"], found["expected"]["ema"])
        assert torch.equal(found["afterwards"], found["online"])
        assert (found["online"] - found["evaluated"]).norm() > 1e-3 < (found["online"] - found["initial"]).norm()
        wanted = {"online": found["online"], "ema": found["evaluated"], "frozen": found["initial"]}[teacher]
        same(found["teacher"], wanted)
        assert found["shares"] == (teacher == "online")
        assert found["averages"] == 25


def _mixed_rows() -> str:
    engine, rows = make_engine(teacher="frozen"), own_rows(0, torch.float64)
    weights = torch.full((len(rows["t"]),), ONLINE)
    weights[-1] = TEACHER
    with pytest.raises(AssertionError) as caught:
        engine.nets.velocity(rows["x_t"], rows["t"], rows["r"], rows["cond"], weights)
    return str(caught.value)


def test_rows_of_two_separate_modules_in_one_call_are_an_error() -> None:
    assert "rows of two separate modules" in run_ranks(_mixed_rows, 1)[0]


def _noted_passes() -> list[int]:
    engine = make_engine(teacher="frozen")
    noted = []
    for step in range(3):
        with torch.no_grad():
            velocity(engine, own_rows(step, torch.float64), TEACHER)
        train_step(engine, step, torch.float64, 1)
        state = engine._teacher._get_fsdp_state()  # type: ignore[union-attr, operator]
        noted.append(len(state._comm_ctx.post_forward_order))
    return noted


def test_passes_of_a_teacher_leave_nothing_behind() -> None:
    assert run_ranks(_noted_passes, 2) == [[0, 0, 0]] * 2


# ---- construction


def _from_meta(teacher: str) -> tuple[State, State, Tensor]:
    source = toy.ToyBackbone(dtype=torch.float64, seed=5)
    with torch.device("meta"):
        backbone = toy.ToyBackbone(dtype=torch.float64)

    def load(module: nn.Module) -> None:
        wanted = source.state_dict()
        for name, parameter in module.named_parameters():
            name = plain_name(name)
            rows = wanted[name].chunk(dist.get_world_size())
            mine = rows[dist.get_rank()] if dist.get_rank() < len(rows) else wanted[name][:0]
            with torch.no_grad():
                parameter.to_local().copy_(mine)  # type: ignore[attr-defined]
        module.table.copy_(source.table)  # type: ignore[union-attr, operator]

    engine = FSDP2(FSDP2Options(), backbone, OPTIMIZER, Ema(decay=0.9), teacher, load=load)
    return (
        shared_state(engine, "online"),
        shared_state(engine, "ema"),
        outputs(engine, torch.float64, TEACHER) - outputs(engine, torch.float64),
    )


@pytest.mark.parametrize("teacher", ["online", "ema"])
def test_a_backbone_on_meta_is_loaded_as_shards_before_copies_are_made(teacher: str) -> None:
    expected = toy.ToyBackbone(dtype=torch.float64, seed=5).state_dict()
    for online, average, difference in run_ranks(_from_meta, 2, teacher):
        assert_same(online, expected, 0.0)
        assert_same(average, expected, 0.0)
        assert not difference.any()


def _refused(options: dict[str, Any], teacher: str, decay: float) -> str:
    try:
        FSDP2(FSDP2Options(**options), toy.ToyBackbone(), OPTIMIZER, Ema(decay=decay), teacher)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "teacher", "decay", "message"),
    [
        ({"block_dtype": "float16"}, "online", 0.9, "engine.block_dtype is 'float16'"),
        ({"checkpoint_keep": "all"}, "online", 0.9, "choose nothing or products"),
        ({"checkpoint_group": 0}, "online", 0.9, "engine.checkpoint_group is 0; it must be 1 or more"),
        ({"replicate": 2}, "online", 0.9, "engine.replicate 2 must divide the number of ranks, 1"),
        ({}, "student", 0.9, "choose online, ema or frozen"),
        ({}, "ema", 0.0, "set teacher online, or ema.decay"),
    ],
)
def test_options_that_cannot_hold_are_refused_with_the_remedy(
    options: dict[str, Any], teacher: str, decay: float, message: str
) -> None:
    assert message in run_ranks(_refused, 1, options, teacher, decay)[0]


def _without_average() -> tuple[set[str], str]:
    engine = FSDP2(FSDP2Options(), toy.ToyBackbone(), OPTIMIZER, Ema(decay=0.0), "online")
    try:
        with engine.weights("ema"):
            return set(), ""
    except ValueError as error:
        return {p.group for p in engine.parts()}, str(error)


def _without_average_kept_gathered() -> tuple[Tensor, Tensor]:
    model, options = toy.ToyBackbone(dtype=torch.float64), FSDP2Options(keep_gathered=True)
    engine = FSDP2(options, model, OPTIMIZER, Ema(decay=0.0), "online")
    train_step(engine, 0, torch.float64, 2)
    return outputs(engine, torch.float64), plain_output(shared_state(engine, "online"))


def test_the_pass_after_an_update_sees_it_when_no_average_moves() -> None:
    for found, expected in run_ranks(_without_average_kept_gathered, 2):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_decay_zero_keeps_no_average() -> None:
    groups, message = run_ranks(_without_average, 1)[0]
    assert groups == {"parameter", "exp_avg", "exp_avg_sq"}
    assert "set ema.decay above 0" in message
