"""As much of a run as loop.train_step needs, over a tiny backbone and precomputed data, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from configs.schema import Optimizer, Schedule
from data.batch import Batch, Embeddings, Precomputed
from models import tiny
from models.backbone import Conditioning
from trainer.encoding import Encoding
from trainer.objectives.objective import Objective
from trainer.observe.counting import CountedNets
from trainer.observe.flops import PassFlops
from trainer.plugins import plugin
from trainer.stages import Stages
from trainer.updates import Updates

EVEN: Mapping[str, int] = {"e2e": 1, "mul": 1, "any": 1, "adv": 1}
"""Roles of which four rows hold one each."""


def unloaded(name: str, place: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The backbone of models/backbones/<name>.py in a model folder, on meta."""
    return plugin("model", {"name": name})[0].from_folder(place, dtype=dtype)


def bare_run(backbone: Any, flops: PassFlops, objective: Objective, engine: Any, rows: int) -> SimpleNamespace:
    """A run of one rank before its first step, in micro-batches of two, and `batch`, what its loader would give.

    backbone: for the shapes of data alone; engine: makes passes and updates.
    """
    x, cond, null = tiny.example(backbone, rows)
    config = SimpleNamespace(
        train=SimpleNamespace(micro_batch_size=2, chunk_rows=5, steps=10),
        schedule=Schedule(),
        optimizer=Optimizer(),
        run=SimpleNamespace(seed=0),
    )
    return SimpleNamespace(
        config=config,
        step=0,
        batch=_batch(backbone, x, cond),
        nets=CountedNets(engine.nets, flops),
        engine=engine,
        encoding=Encoding(
            load_text=_no_encoder,
            load_latents=_no_encoder,
            device=engine.device,
            needs_null=objective.needs_null,
            latent_shape=backbone.latent_shape,
            stored_null=null[:1],
        ),
        objective=objective,
        stages=Stages(),
        updates=Updates(),
        sample_log=None,
        world=SimpleNamespace(rank=0, world_size=1),
    )


def _batch(backbone: Any, x: Tensor, cond: Conditioning) -> Batch:
    keys = tuple(str(row) for row in range(len(x)))
    height, width = (edge * backbone.pixels_per_latent for edge in x.shape[-2:])
    made = Precomputed(Embeddings(cond.embeds, cond.mask, cond.pooled), x)
    rows, epochs = torch.arange(len(x)), (0,) * len(x)
    return Batch(0, (height, width), rows, None, keys, keys, keys, epochs, precomputed=made)


def _no_encoder() -> Any:
    raise AssertionError("precomputed data needs no encoder")
