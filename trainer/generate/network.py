"""The network of a checkpoint or a model folder, sharded over the ranks, for sampling alone: no moments, no averages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models import weights
from trainer import initial_weights
from trainer.build import use_attention
from trainer.engines import sharding
from trainer.engines.networks import Networks
from trainer.origin import Origin
from trainer.plugins import plugin


def architecture(origin: Origin) -> Any:
    """The backbone without weights (on meta)."""
    backbone_class, model = plugin("model", origin.config.model)
    return backbone_class.from_folder(model.path, latents=model.latents, dtype=getattr(torch, model.dtype))


def load(origin: Origin, which: str, backbone: Any, device: torch.device) -> Networks:
    """Fill `architecture`'s backbone, in place, with this rank's shards of the weights, and make it ready for passes.
    Collective; on one rank the shards are the whole. which: online | ema.

    Raises CheckpointError where the checkpoint and the base model do not go together.
    """
    sharding.prepare_parameters(backbone)
    backbone.requires_grad_(False)
    block_dtype = origin.config.engine.get("block_dtype", "float32")
    use_attention(backbone, plugin("model", origin.config.model)[1], block_dtype, device)
    layout = sharding.Layout(sharding.device_mesh(device), block_dtype=block_dtype)
    module = sharding.shard(backbone, layout)
    sharding.fill(module, device, lambda empty: _fill(empty, origin, which))
    return Networks(module, None)


def _fill(module: Any, origin: Origin, which: str) -> None:
    if origin.reader is None or _has_tables(module):
        module.load(origin.config.model["path"])
    if origin.reader is not None:
        initial_weights.fill(module, origin.reader, which)


def _has_tables(module: nn.Module) -> bool:
    """Whether there are saved tensors that are never trained; a checkpoint does not hold them."""
    return any(not isinstance(tensor, nn.Parameter) for _, tensor in weights.named_tensors(module))
