"""The network of a checkpoint or a model folder, sharded over the ranks, for sampling alone: no moments, no averages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from models import lora, weights
from models.weights import ADAPTER
from trainer import initial_weights
from trainer.build import use_attention
from trainer.engines import sharding
from trainer.engines.engine import TensorPart
from trainer.engines.networks import Networks
from trainer.origin import Origin
from trainer.plugins import plugin
from trainer.saving import unsaved_weights


def architecture(origin: Origin) -> Any:
    """The backbone without weights (on meta), with adapters where the run trained those."""
    backbone_class, model = plugin("model", origin.config.model)
    backbone = backbone_class.from_folder(model.path, latents=model.latents, dtype=getattr(torch, model.dtype))
    if origin.config.lora.rank is not None:
        lora.add(backbone, origin.config.lora, "online")
    return backbone


def load(origin: Origin, which: str, backbone: Any, device: torch.device) -> Networks:
    """`architecture`'s backbone, in place, ready for passes; see `filled`."""
    block_dtype = origin.config.engine.get("block_dtype", "float32")
    use_attention(backbone, plugin("model", origin.config.model)[1], block_dtype, device)
    module = filled(origin, which, backbone, device)
    if origin.single_time:
        module.register_forward_pre_hook(_ask_at_one_time, prepend=True)
    return Networks(module, None)


def _ask_at_one_time(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x_t, t, r, *others = args
    return (x_t, t - (t if r is None else r) / 2, None, *others)


def filled(origin: Origin, which: str, backbone: Any, device: torch.device) -> nn.Module:
    """`architecture`'s backbone, in place, with this rank's shards of the weights. Collective; on one rank the shards are
    the whole. which: online | ema.

    Raises CheckpointError where the checkpoint and the base model do not go together.
    """
    engine = origin.config.engine
    sharding.prepare_parameters(backbone, engine.get("base_dtype", "float32"))
    backbone.requires_grad_(False)
    mesh = sharding.device_mesh(device)
    module = sharding.shard(backbone, sharding.Layout(mesh, block_dtype=engine.get("block_dtype", "float32")))
    sharding.fill(module, device, lambda empty: _fill(empty, origin, which))
    return module


def _fill(module: Any, origin: Origin, which: str) -> None:
    source, path = origin.reader, origin.config.model["path"]
    if source is None:
        module.load(path)
    elif origin.config.lora.rank is None:
        if _has_tables(module):
            module.load(path)
        initial_weights.fill(module, source, which)
    else:
        initial_weights.restore_adapters(origin.config, source, which, module)
        found = unsaved_weights.fingerprint(_base_parts(module), rounded=True)
        unsaved_weights.check({unsaved_weights.BASE: found}, source.certificate.metadata, path)


def _has_tables(module: nn.Module) -> bool:
    """Whether there are saved tensors that are never trained; a checkpoint does not hold them."""
    return any(not isinstance(tensor, nn.Parameter) for _, tensor in weights.named_tensors(module))


def _base_parts(module: nn.Module) -> Iterator[TensorPart]:
    """This rank's parts of the weights under adapters."""
    for name, parameter in sharding.sharded_parameters(module).items():
        if not ADAPTER.search(name):
            shape, mesh = tuple(parameter.shape), parameter.device_mesh
            start = sharding.shard_start(shape, mesh.get_local_rank(), mesh.size())
            yield TensorPart("parameter", name, shape, start, sharding.local_part(parameter).view(-1))
