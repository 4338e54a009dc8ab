"""What the tests of checkpoints save: tensors of known numbers, and a small engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from configs.schema import Checkpoint, Ema, Optimizer
from tests.trainer.engines import toy
from trainer.engines.engine import TensorPart
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.saving import checkpoint_store
from trainer.saving.checkpoint import Checkpoints
from trainer.saving.checkpoint_store import CheckpointStore, LocalCheckpoints


def parts_of(values: dict[str, torch.Tensor], group: str = "parameter") -> list[TensorPart]:
    return [TensorPart(group, name, tuple(v.shape), 0, v.view(-1)) for name, v in values.items()]


def numbered(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(6.0).reshape(2, 3) + step, "b": torch.full((4,), float(step))}


def alone(folder: Path | str | CheckpointStore, keep_last: int = 2, keep_every: int = 0) -> Checkpoints:
    options = Checkpoint(keep_last=keep_last, keep_every=keep_every)
    return Checkpoints(folder, options, {"engine": "fsdp2"})


def latest(folder: Path) -> Path | None:
    """Folder of the newest complete checkpoint."""
    name = checkpoint_store.latest(LocalCheckpoints(folder))
    return None if name is None else folder / name


def small_engine(teacher: str = "online", **options: Any) -> FSDP2:
    return FSDP2(
        FSDP2Options(**options), toy.ToyBackbone(seed=3), Optimizer(learning_rate=0.02), Ema(decay=0.9), teacher
    )
