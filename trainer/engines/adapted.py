"""What adapters change for an engine: what is trained, what a checkpoint holds, where averages live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.lora import Adapters
from trainer.engines.shards import Shard


def adapters_of(backbone: Any) -> Adapters | None:
    """The adapters on a backbone; None where it is trained in full."""
    found: Adapters | None = getattr(backbone, "adapters", None)
    return found


def needs_second_module(backbone: Any, teacher: str) -> bool:
    """Whether teacher rows (online | ema | frozen) run in a module of their own: not where adapters tell rows apart."""
    return teacher != "online" and adapters_of(backbone) is None


def arranged(shards: Mapping[str, Shard], backbone: Any) -> tuple[dict[str, Shard], dict[str, Tensor] | None]:
    """The shards of the training state, and this rank's memory of averages that passes compute with, by trained name
    (None: there is none). The frozen base is part of the state, but of no checkpoint."""
    adapters = adapters_of(backbone)
    if adapters is None:
        return dict(shards), None
    averages = {name: twin for name in shards if adapters.holds(name) and (twin := adapters.average_of(name))}
    kept = {
        name: replace(shard, saved=adapters.holds(name))
        for name, shard in shards.items()
        if name not in averages.values()
    }
    return kept, {name: shards[twin].local for name, twin in averages.items()} or None
