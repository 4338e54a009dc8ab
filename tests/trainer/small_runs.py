"""A short run in the process group that is there, watched through one fixed batch with fixed draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs import load
from trainer.build import build_objective, build_order, build_run
from trainer.engines.distributed import World
from trainer.loop import fit
from trainer.observe.tracking import NullTracker
from trainer.run import Run
from trainer.session import agree_on_folder
from trainer.signals import StopRequest
from trainer.training_data import read_data


def trained_loss(
    files: list[str | Path], overrides: list[str], then: Callable[..., Any] | None = None, *args: Any
) -> tuple[float, float, Any]:
    """Train a run that knows held-out data to its end: its held-out loss before and after, and then(run, *args)."""
    config = load.load(files, overrides)
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    manifest = read_data(config)
    order = build_order(config, manifest)
    folder = agree_on_folder(config, world, order.identity(), fresh=False, allow=[])
    objective, tracker = build_objective(config), NullTracker()
    run = build_run(config, world, folder, manifest, order, objective, StopRequest(), tracker)
    before = held_out_loss(run)
    assert fit(run)
    return before, held_out_loss(run), None if then is None else then(run, *args)


def held_out_loss(run: Run) -> float:
    return run.showcase.held_out(run)["held_out/loss"]
