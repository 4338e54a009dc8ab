"""A whole TwinFlow step of the real (tiny) Qwen-Image on FSDP2 ranks against one plain process (law 9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Ema, Optimizer
from models import tiny
from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage
from tests.ranks import run_ranks
from tests.trainer.engines.sameness import assert_same, errors
from trainer.engines.engine import whole
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.objectives.objective import Nets, Rows
from trainer.objectives.roles import assign
from trainer.objectives.twinflow import TwinFlow

BATCH, BETA = 8, 0.9
OBJECTIVE = TwinFlow(order=2, teacher="online", enhanced_ratio=0.5, roles={"e2e": 1, "mul": 1, "any": 1, "adv": 1})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    assert tiny.write(path, "pipeline", seed=0)
    return path


def build(folder: Path, dtype: torch.dtype) -> QwenImage:
    model = QwenImage.from_folder(folder, device="cpu", dtype=dtype)
    model.load(str(folder))
    with torch.no_grad():  # a fresh E2 equals E1: make target times matter on their own
        model.time_text_embed_2.timestep_embedder.linear_2.weight.mul_(1.5)
    return model


def samples(rows: slice, dtype: torch.dtype) -> tuple[Tensor, Conditioning, Conditioning]:
    """Latents, conditions with 2 to 5 real text tokens, null conditions with 1, of the step's rows."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, 4, 4, 6, generator=generator, dtype=torch.float64)
    embeds = torch.randn(2 * BATCH, 5, 16, generator=generator, dtype=torch.float64)
    lengths = torch.cat([torch.arange(BATCH) % 4 + 2, torch.ones(BATCH, dtype=torch.int64)])
    both = Conditioning(embeds.to(dtype), torch.arange(5) < lengths[:, None])
    return x[rows].to(dtype), both[:BATCH][rows], both[BATCH:][rows]


class PlainNets:
    shares_module = True

    def __init__(self, model: QwenImage) -> None:
        self.model = model

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        return self.model(x_t, t, r, cond)


def losses(nets: Nets, rank: int, world_size: int, micro_batch_size: int, dtype: torch.dtype) -> Any:
    """The losses of this rank's micro-batches, one after the other."""
    size = BATCH // world_size
    rows = slice(rank * size, (rank + 1) * size)
    x, cond, null = samples(rows, dtype)
    roles = assign(OBJECTIVE.role_weights, 5, BATCH, rank, world_size)
    draws = OBJECTIVE.draw(Rows(0, 5, torch.arange(BATCH)[rows], roles), tuple(x.shape[1:]), dtype=torch.float64)
    draws = type(draws)(**{name: value.to(dtype) for name, value in vars(draws).items()})
    targets = OBJECTIVE.targets(nets, x, cond, null, roles, draws)
    for begin in range(0, len(targets), micro_batch_size):
        yield OBJECTIVE.loss(nets, targets[begin : begin + micro_batch_size]).total


def plain_gradients(folder: Path) -> dict[str, Tensor]:
    model = build(folder, torch.float64)
    for loss in losses(PlainNets(model), 0, 1, BATCH, torch.float64):
        loss.backward()
    idle = set(model.idle_parameters())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and name not in idle}


def sharded_gradients(folder: Path, cases: list[tuple[torch.dtype, bool, int]]) -> list[dict[str, Tensor]]:
    """Gradients of (dtype, activation checkpointing, micro-batch size), read from the first moments of one update."""
    found = []
    for dtype, recompute, micro_batch_size in cases:
        optimizer = Optimizer(learning_rate=1e-3, betas=(BETA, 0.99), max_grad_norm=0.0)
        options = FSDP2Options(activation_checkpointing=recompute)
        engine = FSDP2(options, build(folder, dtype), optimizer, Ema(decay=0.0), "online")
        for loss in losses(engine.nets, dist.get_rank(), dist.get_world_size(), micro_batch_size, dtype):
            engine.backward(loss)
        engine.step(1e-3)
        found.append({name: m / (1 - BETA) for name, m in whole(engine, "exp_avg").items()})
    return found


CASES = [
    (dtype, recompute, size) for dtype in (torch.float64, torch.float32) for recompute, size in ((True, 4), (False, 1))
]


def test_a_sharded_twinflow_step_of_qwen_image_has_the_plain_gradients(folder: Path) -> None:
    expected = plain_gradients(folder)
    for of_rank in run_ranks(sharded_gradients, 2, folder, CASES, timeout=180):
        for (dtype, *_), found in zip(CASES, of_rank, strict=True):
            assert_same(found, expected, 1e-12 if dtype == torch.float64 else 1e-5)


def test_the_measure_sees_a_wrong_normalisation(folder: Path) -> None:
    expected = plain_gradients(folder)
    halved = {name: gradient / 2 for name, gradient in expected.items()}
    assert max(errors(halved, expected).values()) > 0.4
