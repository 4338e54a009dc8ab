"""Blocks that compute in bfloat16 where an engine knows one dtype for the whole module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def compute_in_bfloat16(backbone: Any, device_type: str) -> None:
    """Blocks compute under autocast and hand on float32; the rest of the backbone never sees bfloat16 (law 3)."""
    for unit in backbone.shard_units():
        unit.forward = _autocast(unit.forward, device_type)


def _autocast(forward: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    @functools.wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        # No cache of casted weights: it would outlive the gathered ones.
        with torch.autocast(device_type, torch.bfloat16, cache_enabled=False):
            outputs = forward(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, outputs)

    return cast
