"""The tensors of an exported transformer: the checkpoint's, or the base's with the checkpoint's adapters merged in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import lora_files, weights
from models.lora import ONLINE
from models.weights import ADAPTER, base_name
from trainer.engines import sharding
from trainer.engines.distributed import process_group
from trainer.generate import network
from trainer.origin import Origin
from trainer.saving.certificate import CheckpointError


@dataclass(frozen=True)
class Tensors:
    """stored: name -> meta tensor of the shape and dtype that it has; parameters: those of them that are trained; read:
    the values of one."""

    stored: dict[str, Tensor]
    parameters: set[str]
    read: Callable[[str], Tensor]


def tensors(origin: Origin, which: str) -> Tensors:
    """Of a run's checkpoint; which: online | ema. Adapters are merged, for which the whole base is read into memory.

    Raises CheckpointError where the checkpoint and the base model do not go together.
    """
    backbone = network.architecture(origin)
    stored = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.named_tensors(backbone)}
    parameters = {base_name(name) for name, _ in backbone.named_parameters() if not ADAPTER.search(name)}
    if origin.config.lora.rank is not None:
        return Tensors(stored, parameters, _merged(origin, which, backbone))
    saved = origin.saved(which)
    shapes = {name: tuple(stored[name].shape) for name in parameters}
    if shapes != {name: tuple(tensor.shape) for name, (_, tensor) in saved.items()}:
        raise CheckpointError(
            f"the checkpoint and the base model {origin.base} hold other parameters; name with --base the folder that the "
            "run was trained from"
        )
    base = weights.component(origin.base, "transformer")

    def read(name: str) -> Tensor:
        # What the checkpoint does not hold, tables that are never trained, is the base's.
        return origin.whole(which, name) if name in saved else weights.read(base, name)

    return Tensors(stored, parameters, read)


def _merged(origin: Origin, which: str, backbone: Any) -> Callable[[str], Tensor]:
    options = origin.config.lora
    second_times = f"{backbone.time_embedding}_2."
    with process_group(60.0, "cpu"):
        module: Any = network.filled(origin, which, backbone, torch.device("cpu"))
        whole = {name: sharding.local_part(shard) for name, shard in sharding.sharded_parameters(module).items()}
        whole |= sharding.persistent_buffers(module)
    base = {base_name(name): tensor for name, tensor in whole.items() if not ADAPTER.search(name)}

    def read(name: str) -> Tensor:
        if options.variant == "single_time" and name.startswith(second_times):
            # With zeros the second embedding counts for nothing whatever r is; the scheduler hands in t - r/2.
            return torch.zeros_like(base[name])
        stem = name.removesuffix(".weight")
        pair = {key: whole[key] for matrix in "AB" if (key := f"{stem}.lora_{matrix}.{ONLINE}.weight") in whole}
        return lora_files.merge(pair, {name: base[name]}, options)[name]

    return read


def adapters(origin: Origin, which: str) -> dict[str, Tensor]:
    """The adapters of a run's checkpoint by parameter name. Raises CheckpointError where it holds none."""
    found = {name: origin.whole(which, name) for name in origin.saved(which) if ADAPTER.search(name)}
    if not found:
        assert origin.reader is not None
        raise CheckpointError(f"{origin.reader.url} holds no adapters: lora.rank was null; leave out --adapters")
    return found
