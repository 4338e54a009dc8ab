"""Activation checkpointing: which blocks recompute in the backward pass, in what groups, and what they keep."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEEPS = ("nothing", "products")
"""Choices of engine.checkpoint_keep."""
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_ATTENTION = ("scaled_dot_product", "flash_attn")


def checkpoint_blocks(backbone: Any, every: int, group: int, keep: str) -> list[list[nn.Module]]:
    """Make every `every`-th group of `group` blocks recompute, in place; the shard units, one list per group.

    Blocks are the backbone's checkpoint units. With group > 1 the blocks of a recomputing group become one shard unit,
    so that a recomputation finds all of its parameters gathered; other blocks stay units of their own. No group holds
    blocks of different lists.

    Raises:
        ValueError: group > 1 for a backbone whose shard units are not its checkpoint units, or no chain.
    """
    names = list(backbone.checkpoint_units())
    context = _context(keep)
    if group == 1:
        for name in names[::every]:
            parent, _, child = name.rpartition(".")
            wrapped = checkpoint_wrapper(backbone.get_submodule(name), **context)
            setattr(backbone.get_submodule(parent), child, wrapped)
        return [[unit] for unit in backbone.shard_units()]
    blocks = [backbone.get_submodule(name) for name in names]
    if blocks != list(backbone.shard_units()):
        raise ValueError(
            f"engine.checkpoint_group={group} needs shard units that are the checkpoint units, which "
            f"{type(backbone).__name__} has not; set engine.checkpoint_group=1"
        )
    units: list[list[nn.Module]] = []
    for index, chosen in enumerate(_groups(names, blocks, group)):
        if index % every:
            units += [[block] for block in chosen]
        else:
            _join(chosen, list(backbone.chained_inputs()), context)
            units.append(chosen)
    return units


def _groups(names: Sequence[str], blocks: Sequence[nn.Module], size: int) -> Iterator[list[nn.Module]]:
    """Blocks in groups of `size`; those of different lists, which hand on different things, never share one."""
    for _, members in itertools.groupby(range(len(names)), key=lambda index: names[index].rpartition(".")[0]):
        chain = [blocks[index] for index in members]
        for begin in range(0, len(chain), size):
            yield chain[begin : begin + size]


def _join(blocks: Sequence[nn.Module], chained: Sequence[str], context: dict[str, Any]) -> None:
    """The first block's forward runs all of them under one checkpoint; the others hand its outputs on.

    A backbone calls its blocks one after the other, so neither its forward nor a parameter's name changes.
    """
    names = list(inspect.signature(blocks[0].forward).parameters)
    forwards = [block.forward for block in blocks]

    def run(**inputs: Any) -> Any:
        for forward in forwards:
            outputs = forward(**inputs)
            inputs |= zip(chained, _as_tuple(outputs), strict=True)
        return outputs

    def first(*args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        return checkpoint(run, use_reentrant=False, **context, **inputs)

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        outputs = tuple(inputs[name] for name in chained)
        return outputs if len(outputs) > 1 else outputs[0]

    for block in blocks[1:]:
        block.forward = hand_on
    blocks[0].forward = first


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _context(keep: str) -> dict[str, Any]:
    """Argument of torch.utils.checkpoint: what is entered around the forward pass and around the recomputation."""
    if keep == "products":
        return {"context_fn": functools.partial(create_selective_checkpoint_contexts, _keep_products)}
    return {}


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Matrix products and attention cost the time of a block; what lies between them is cheap to compute again."""
    name = getattr(operator, "overloadpacket", operator).__name__
    expensive = name in _PRODUCTS or any(part in name for part in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if expensive else CheckpointPolicy.PREFER_RECOMPUTE
