"""The FSDP2 engine on gloo ranks against a plain single process (law 9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import run_ranks
from tests.trainer.engines import toy
from tests.trainer.engines.running import (
    RATE,
    ROWS,
    make_engine,
    own_rows,
    train_step,
    velocity,
)
from tests.trainer.engines.sameness import assert_same
from trainer.engines.engine import whole


def plain_run(dtype: torch.dtype, steps: int, count: int = ROWS) -> dict[str, Any]:
    """torch's own AdamW, clipping and averaging on the whole batch in one process."""
    model = toy.ToyBackbone(dtype=dtype)
    trainable = {name: p for name, p in model.named_parameters() if name not in model.idle_parameters()}
    optimizer = torch.optim.AdamW(trainable.values(), RATE, (0.9, 0.99), 1e-8, weight_decay=0.01, foreach=False)
    averaged = {name: p.detach().clone() for name, p in trainable.items()}
    norms, first, k = [], {}, 0.45
    for step in range(steps):
        gradients = toy.plain_gradients(model, toy.batch(count, step, dtype))
        first = first or gradients
        norms.append(float(nn.utils.clip_grad_norm_(trainable.values(), 1.0)))
        optimizer.step()
        for name, p in trainable.items():
            averaged[name].mul_(k).add_(p.detach(), alpha=1 - k)
        k += (1 - k) * (0.9 - k) / 2
    moments = {m: {name: optimizer.state[p][m] for name, p in trainable.items()} for m in ("exp_avg", "exp_avg_sq")}
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return {"gradients": first, "norms": norms, "parameter": parameters, "ema": averaged, **moments}


def _sharded_run(options: dict[str, Any], dtype: torch.dtype, accumulation: int, steps: int) -> dict[str, Any]:
    engine = make_engine(dtype, **options)
    rows = own_rows(0, dtype)
    for part in range(accumulation):
        graded = toy.cut(rows, part, accumulation)
        engine.backward(toy.loss(velocity(engine, graded), graded, ROWS))
    trainable = {name: p for name, p in engine._parameters.items() if p.requires_grad}
    gradients = {name: p.grad.full_tensor() for name, p in trainable.items()}  # type: ignore[union-attr]
    for parameter in trainable.values():
        parameter.grad = None
    norms = [train_step(engine, step, dtype, accumulation) for step in range(steps)]
    groups = ("parameter", "exp_avg", "exp_avg_sq", "ema")
    return {"gradients": gradients, "norms": norms, **{group: whole(engine, group) for group in groups}}


def _sharded_runs(cases: list[tuple[dict[str, Any], torch.dtype, int, int]]) -> list[dict[str, Any]]:
    return [_sharded_run(*case) for case in cases]


CASES = [
    ({"activation_checkpointing": recompute, "keep_gathered": keep}, accumulation)
    for recompute, keep, accumulation in [(True, False, 2), (False, False, 1), (True, True, 2), (False, True, 4)]
]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_sharded_step_equals_the_plain_one(world_size: int) -> None:
    cases = [
        (options, dtype, accumulation if ROWS % (world_size * accumulation) == 0 else 2, steps)
        for options, accumulation in CASES
        for dtype, steps in ((torch.float64, 4), (torch.float32, 1))
    ]
    plain = {dtype: plain_run(torch.float64, steps) for _, dtype, _, steps in cases}
    for of_rank in run_ranks(_sharded_runs, world_size, cases):
        for (_, dtype, _, _), found in zip(cases, of_rank, strict=True):
            bound = 1e-12 if dtype == torch.float64 else 1e-5
            expected = plain[dtype]
            assert found["norms"] == pytest.approx(expected["norms"], rel=bound)
            for group in ("gradients", "parameter", "exp_avg", "exp_avg_sq", "ema"):
                assert_same(found[group], expected[group], bound)


OPTIONS = [
    {"checkpoint_every": 2},
    {"checkpoint_group": 2},
    {"checkpoint_group": 2, "checkpoint_every": 2, "keep_gathered": True},
    {"checkpoint_group": 3, "checkpoint_keep": "products"},
    {"checkpoint_keep": "products"},
    {"prefetch": 2},
    {"prefetch": 0, "checkpoint_group": 2},
    {"cpu_offload": True},
    {"cpu_offload": True, "keep_gathered": True, "activation_checkpointing": False},
    {"compile": True, "compile_backend": "aot_eager"},
    {"compile": True, "compile_backend": "aot_eager", "checkpoint_group": 2, "checkpoint_keep": "products"},
    {"compile": True, "compile_backend": "aot_eager", "activation_checkpointing": False},
]


@pytest.mark.slow
def test_no_option_of_the_engine_changes_the_step() -> None:
    plain = plain_run(torch.float64, 2)
    cases = [(options, torch.float64, 2, 2) for options in OPTIONS]
    for of_rank in run_ranks(_sharded_runs, 2, cases, timeout=240):
        for options, found in zip(OPTIONS, of_rank, strict=True):
            assert found["norms"] == pytest.approx(plain["norms"], rel=1e-12), options
            for group in ("gradients", "parameter", "exp_avg", "exp_avg_sq", "ema"):
                assert_same(found[group], plain[group], 1e-12)


def test_a_replicated_mesh_makes_the_same_step() -> None:
    plain = plain_run(torch.float64, 3)
    found = run_ranks(_sharded_run, 4, {"replicate": 2}, torch.float64, 1, 3, timeout=120)
    for of_rank in found:
        assert of_rank["norms"] == pytest.approx(plain["norms"], rel=1e-12)
        assert_same(of_rank["parameter"], plain["parameter"], 1e-12)
