"""Steps on one rank of FSDP2 against plain autograd on the CPU (law 9), and in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Ema, Lora
from models import tiny
from tests.gpu.conftest import Places
from tests.gpu.steps import BETA, OPTIMIZER, RATE, ROWS, engine_gradients, loaded, plain_gradients
from tests.trainer.bare_run import EVEN, bare_run
from tests.trainer.engines.sameness import assert_same
from trainer import loop
from trainer.engines.distributed import World
from trainer.engines.engine import whole
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.objectives.twinflow import TwinFlow
from trainer.observe.flops import PassFlops
from trainer.observe.metrics import Tally

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
BFLOAT16 = {"velocity": 0.03, "gradients": 0.1}
"""Distance from float32 as a share of its norm, over all elements; one rounding to bfloat16 is up to .004."""


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of all tensors together, as a share of the norm."""
    assert found.keys() == expected.keys()
    squares = [
        ((found[n].double() - e.double()).square().sum(), e.double().square().sum()) for n, e in expected.items()
    ]
    off, all_of_it = (float(sum(part)) for part in zip(*squares, strict=True))
    return math.sqrt(off / all_of_it)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_a_step_equals_the_plain_one(world: World, places: Places, dtype: torch.dtype) -> None:
    """Float32 against float32: its sinusoids alone change gradients by 1e-5, which says nothing of a device."""
    expected = plain_gradients(loaded("qwen_image", places("qwen_image"), dtype), dtype)
    found = engine_gradients(loaded("qwen_image", places("qwen_image"), dtype), world.device, dtype)
    assert_same(found, expected, BOUNDS[dtype])


@pytest.mark.parametrize("options", [{"checkpoint_group": 2}, {"checkpoint_keep": "products"}, {"cpu_offload": True}])
def test_no_option_changes_the_step(world: World, places: Places, options: dict[str, object]) -> None:
    expected = plain_gradients(loaded("qwen_image", places("qwen_image"), torch.float64), torch.float64)
    backbone = loaded("qwen_image", places("qwen_image"), torch.float64)
    assert_same(engine_gradients(backbone, world.device, torch.float64, **options), expected, 1e-12)


def test_a_step_of_adapters_equals_the_plain_one(world: World, places: Places) -> None:
    place, adapters = places("qwen_image"), Lora(rank=2)
    expected = plain_gradients(loaded("qwen_image", place, torch.float64, adapters), torch.float64)
    found = engine_gradients(loaded("qwen_image", place, torch.float64, adapters), world.device, torch.float64)
    assert len(found) > 40 and all(".lora_" in name for name in found)
    assert_same(found, expected, 1e-12)


def test_adapters_on_a_bfloat16_base(world: World, places: Places) -> None:
    place, adapters, dtype = places("qwen_image"), Lora(rank=2), torch.float32
    exact = engine_gradients(loaded("qwen_image", place, dtype, adapters), world.device, dtype)
    backbone = loaded("qwen_image", place, dtype, adapters)
    found = engine_gradients(backbone, world.device, dtype, block_dtype="bfloat16", base_dtype="bfloat16")
    assert 1e-4 < distance(found, exact) < BFLOAT16["gradients"]


def graded_pass(name: str, place: Path, device: torch.device, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Velocity of four rows and the gradients of its square, by parameter."""
    backbone = loaded(name, place, torch.float32)
    x, cond, _ = (part.to(device) for part in tiny.example(backbone, ROWS))
    t = torch.tensor([0.9, 0.5, 0.2, -0.6], device=device)
    engine = FSDP2(FSDP2Options(**options), backbone, OPTIMIZER, Ema(decay=0.0), "online", device)
    velocity = engine.nets.velocity(x, t, t / 2, cond)
    engine.backward(velocity.square().sum())
    engine.step(RATE)
    return velocity.detach(), {n: m.cpu() / (1 - BETA) for n, m in whole(engine, "exp_avg").items()}


@pytest.mark.parametrize("name", sorted(tiny.SMALLEST))
def test_bfloat16_blocks_stay_near_float32(world: World, places: Places, name: str) -> None:
    velocity, gradients = graded_pass(name, places(name), world.device)
    near, near_gradients = graded_pass(name, places(name), world.device, block_dtype="bfloat16")
    assert near.dtype == torch.float32
    assert 1e-4 < distance({"": near}, {"": velocity}) < BFLOAT16["velocity"]
    assert 1e-4 < distance(near_gradients, gradients) < BFLOAT16["gradients"]


def test_compiled_blocks_make_the_same_pass(world: World, places: Places) -> None:
    """On the CPU they are traced alone: generating code takes a minute there."""
    backend = "inductor" if world.device.type == "cuda" else "aot_eager"
    place, plain = places("qwen_image"), {"activation_checkpointing": False}
    velocity, gradients = graded_pass("qwen_image", place, world.device, **plain)
    compiled = graded_pass("qwen_image", place, world.device, compile=True, compile_backend=backend, **plain)
    assert_same({"velocity": compiled[0], **compiled[1]}, {"velocity": velocity, **gradients}, 1e-5)


def test_a_step_of_the_loop_never_waits_for_the_device(world: World, places: Places) -> None:
    """What tests/trainer/test_host_waits.py counts on meta, by CUDA's own word; the CPU has nothing to wait for."""
    place, objective = places("qwen_image"), TwinFlow(order=2, roles={**EVEN}, enhanced_ratio=0.5, teacher="ema")
    backbone = loaded("qwen_image", place, torch.float32)
    options = FSDP2Options(block_dtype="bfloat16")
    engine = FSDP2(options, backbone, OPTIMIZER, Ema(decay=0.9), objective.teacher, world.device)
    run = bare_run(backbone, PassFlops(backbone), objective, engine, ROWS)
    tally = Tally(world.device)
    for _ in range(2):  # tables, buffers, and the name of every metric are new in the first steps
        loop.train_step(run, run.batch, tally)
    if world.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loop.train_step(run, run.batch, tally)
    finally:
        if world.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    found = tally.reduce()
    assert math.isfinite(found["loss"]) and found["grad_norm"] > 0
