"""A frozen teacher is the weights that the run started with: not saved, but the same after every resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.trainer.engines import toy
from tests.trainer.saving.parts import alone, small_engine
from trainer.engines.fsdp2 import FSDP2
from trainer.objectives.objective import ONLINE, TEACHER
from trainer.saving import unsaved_weights
from trainer.saving.certificate import CheckpointError


def _velocities(engine: FSDP2) -> list[torch.Tensor]:
    """Of this network and of its teacher, for the same rows."""
    rows = toy.batch(6, 0, torch.float32)
    with torch.no_grad():
        return [
            engine.nets.velocity(rows["x_t"], rows["t"], rows["r"], rows["cond"], torch.full((6,), kind))
            for kind in (ONLINE, TEACHER)
        ]


def _train_and_save(folder: str) -> Any:
    engine, checkpoints = small_engine("frozen"), alone(Path(folder))
    initial = unsaved_weights.fingerprints(engine, "frozen")
    for step in range(3):
        rows = toy.cut(toy.batch(12, step, torch.float32), dist.get_rank(), dist.get_world_size())
        weights = torch.full((len(rows["t"]),), ONLINE)
        velocity = engine.nets.velocity(rows["x_t"], rows["t"], rows["r"], rows["cond"], weights)
        engine.backward(toy.loss(velocity, rows, 12))
        engine.step(0.02)
    checkpoints.save(engine, 3, seconds=0.0)
    checkpoints.finish()
    return initial, _velocities(engine), unsaved_weights.fingerprints(engine, "frozen")


def _resume(folder: str) -> Any:
    engine, checkpoints = small_engine("frozen"), alone(Path(folder))
    initial = unsaved_weights.fingerprints(engine, "frozen")
    assert checkpoints.resume(engine).step == 3
    return initial, _velocities(engine)


def test_a_resumed_run_has_the_trained_network_and_the_initial_teacher(tmp_path: Path) -> None:
    initial, (online, teacher), trained = run_ranks(_train_and_save, 2, str(tmp_path))[0]
    assert not torch.allclose(online, teacher)
    for ranks in (1, 2, 3):
        again, (resumed, same_teacher) = run_ranks(_resume, ranks, str(tmp_path))[0]
        assert torch.allclose(resumed, online, atol=1e-6)
        assert torch.allclose(same_teacher, teacher, atol=1e-6)
        unsaved_weights.check(again, initial, "model")
    with pytest.raises(CheckpointError, match=r"weights in model .*not those that this run was started with.*--fresh"):
        unsaved_weights.check(trained, initial, "model")
    unsaved_weights.check(trained, {}, "model")  # of a checkpoint that does not say
