"""Frozen encoders as shards over the ranks: gathered for a call, outside the optimizer's engine (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from trainer.engines.sharding import free_gathered


def shard_frozen(root: nn.Module, units: Sequence[nn.Module], methods: Sequence[str], mesh: DeviceMesh) -> None:
    """Shard a module without gradients in place, onto the mesh's device.

    units: modules gathered one after the other; what they leave is gathered as one. methods: what of `root` is called,
    beside its forward. Every call gathers each unit once for every time that it runs: ranks must make the same calls in
    the same order, whatever their number of rows, and a method that loops over rows must do so in the root's unit.

    Raises:
        ValueError: a parameter that is trained.
    """
    trained = [name for name, parameter in root.named_parameters() if parameter.requires_grad]
    if trained:
        raise ValueError(f"only frozen modules can be sharded for inference, but these are trained: {trained[:5]}")
    for module in (*units, root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    root.register_forward_hook(_free)
    for name in methods:
        register_fsdp_forward_method(root, name)
        setattr(root, name, _freeing(root, getattr(root, name)))


def _free(module: nn.Module, arguments: Any, output: Any) -> None:
    """FSDP2 notes the order of all passes until the next backward, which never comes here."""
    free_gathered(module)


def _freeing(root: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            result = method(*args, **kwargs)
        free_gathered(root)
        return result

    return called
