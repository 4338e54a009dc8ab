"""How a backbone becomes FSDP2 modules: what is frozen, recomputed, sharded, gathered, and in which precision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from models.weights import ADAPTER, plain_name
from trainer.engines.adapted import adapters_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """mesh: dimension "shard", before it "replicate" for HSDP. block_dtype, reduce_dtype: float32 | bfloat16. offload:
    shards live in host memory. prefetch: units gathered ahead, None as FSDP2 does. compile: backend, None for eager."""

    mesh: DeviceMesh
    block_dtype: str = "float32"
    reduce_dtype: str = "float32"
    keep_gathered: bool = False
    offload: bool = False
    prefetch: int | None = None
    compile: str | None = None


def device_mesh(device: torch.device, replicate: int = 1) -> DeviceMesh:
    """All ranks as one dimension "shard", or as "replicate" x "shard"; collective.

    Raises:
        ValueError: `replicate` does not divide the ranks.
    """
    ranks = dist.get_world_size()
    if replicate < 1 or ranks % replicate:
        raise ValueError(f"engine.replicate {replicate} must divide the number of ranks, {ranks}")
    if replicate == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))


def prepare_parameters(backbone: Any, base_dtype: str = "float32") -> None:
    """Freeze the idle parameters and hold the others in float32 (float64 in a float64 model) as master weights.

    Idle parameters are frozen before sharding: they would have moments in a loaded optimizer but none in a trained one.
    base_dtype: of the blocks' frozen weights under adapters, float32 | bfloat16; what is outside the blocks stays
    float32, because it computes so (law 3).

    Raises:
        ValueError: an idle parameter that the backbone does not have.
    """
    parameters = dict(backbone.named_parameters())
    unknown = [name for name in backbone.idle_parameters() if name not in parameters]
    if unknown:
        raise ValueError(f"idle_parameters of {type(backbone).__name__} names unknown parameters: {unknown[:5]}")
    idle = [parameters[name].requires_grad_(False) for name in backbone.idle_parameters()]
    if idle:
        log.info(
            "frozen, since the loss does not depend on them: %d tensors, %.4g M parameters: %s",
            len(idle),
            sum(parameter.numel() for parameter in idle) / 1e6,
            ", ".join(backbone.idle_parameters()[:8]) + (", ..." if len(idle) > 8 else ""),
        )
    master = torch.float64 if all(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
    for parameter in parameters.values():
        parameter.data = parameter.data.to(master)
    if base_dtype == "bfloat16" and adapters_of(backbone) is not None and master == torch.float32:
        for unit in backbone.shard_units():
            for name, parameter in unit.named_parameters():
                if not ADAPTER.search(name):
                    parameter.data = parameter.data.bfloat16()


def shard(backbone: Any, layout: Layout, units: Sequence[Sequence[nn.Module]] | None = None) -> nn.Module:
    """Wrap in place: one FSDP2 unit per entry of `units` (each shard unit by default), the rest in the root's unit.

    units: in order of the pass, activation checkpointing done already (trainer/engines/recompute.py); compilation comes
    here, between the two. Units compute in block_dtype and the last one hands on float32; the root casts nothing, so
    that times, embeddings and the final projection stay float32 (law 3).
    """
    units = [[unit] for unit in backbone.shard_units()] if units is None else units
    if layout.compile is not None:
        for unit in units:
            # The forward alone: FSDP2's hooks stay outside, and no parameter changes its name. Of joined blocks the
            # first computes for all.
            unit[0].forward = torch.compile(unit[0].forward, backend=layout.compile)
    float64 = next(backbone.parameters()).dtype == torch.float64
    policy = _block_policy(layout, float64)
    offload = CPUOffloadPolicy(pin_memory=layout.mesh.device_type == "cuda") if layout.offload else OffloadPolicy()
    for index, unit in enumerate(units):
        last = index == len(units) - 1 and policy.param_dtype is not None
        own = replace(policy, output_dtype=torch.float32) if last else policy
        fully_shard(
            list(unit) if len(unit) > 1 else unit[0],
            mesh=layout.mesh,
            mp_policy=own,
            offload_policy=offload,
            reshard_after_forward=not layout.keep_gathered,
        )
    # The root's unit is small (embeddings, last projection): it is gathered once a step in either mode.
    root = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(backbone, mesh=layout.mesh, mp_policy=root, offload_policy=offload, reshard_after_forward=False)
    backbone.set_reshard_after_backward(False, recurse=layout.keep_gathered)
    if layout.prefetch is not None:
        _prefetch([cast(FSDPModule, unit[0]) for unit in units], layout.prefetch)
    for module in _units(backbone):
        # Gradients are the sum over ranks; gloo knows no scaled reduction, and NCCL needs none.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return backbone


def _prefetch(units: Sequence[FSDPModule], depth: int) -> None:
    """While a unit computes, the `depth` units after it (before it, in the backward pass) are gathered."""
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[index + 1 : index + 1 + depth]))
        unit.set_modules_to_backward_prefetch(list(reversed(units[max(index - depth, 0) : index])))


def _block_policy(layout: Layout, float64: bool) -> MixedPrecisionPolicy:
    if float64:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    reduce_dtype = torch.bfloat16 if layout.reduce_dtype == "bfloat16" else torch.float32
    if layout.block_dtype == "float32":
        return MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)


def _units(root: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in root.modules() if isinstance(module, FSDPModule))


def fill(
    root: nn.Module, device: torch.device, load: Callable[[nn.Module], None] | None, offload: bool = False
) -> None:
    """Give meta parameters memory, now that they are shards, and call `load` (where there is one) to fill them.

    Shards lie on `device`, or in host memory where they are offloaded; buffers always on `device`.

    Raises:
        ValueError: parameters on meta and no load.
    """

    def materialise(tensor: Tensor) -> Tensor:
        place = torch.device("cpu") if offload and isinstance(tensor, DTensor) else device
        return torch.empty_like(tensor, device=place) if tensor.is_meta else tensor.to(place)

    if any(parameter.is_meta for parameter in root.parameters()):
        if load is None:
            raise ValueError("the backbone was built on meta: the engine needs `load` to fill its shards")
        root._apply(materialise)
    if load is not None:
        load(root)


def sharded_parameters(root: nn.Module) -> dict[str, DTensor]:
    """Shards by the backbone's own parameter names; they stay the same objects while units are gathered.

    Only valid while nothing is gathered, as right after sharding.
    """
    return {plain_name(name): cast(DTensor, parameter) for name, parameter in root.named_parameters()}


def local_part(tensor: DTensor) -> Tensor:
    """This rank's elements, sharing memory with the shard, outside autograd."""
    with torch.no_grad():
        return tensor.to_local()


@torch.no_grad()
def copy_into(target: nn.Module, source: nn.Module) -> None:
    """Copy the shards of an equally sharded module, and its buffers."""
    of_source = sharded_parameters(source)
    for name, shard_ in sharded_parameters(target).items():
        local_part(shard_).copy_(local_part(of_source[name]))
    buffers = _named_buffers(source)
    for name, buffer in _named_buffers(target).items():
        buffer.copy_(buffers[name])


def free_gathered(root: nn.Module) -> None:
    """Drop gathered parameters of a module that has made a pass; the next pass gathers anew.

    FSDP2 leaves the root gathered after a pass without backward, and notes the order of all passes until the next
    backward, which a teacher never has; reset_iter_state frees both.
    """
    reset = getattr(root, "reset_iter_state", None)  # absent before torch 2.13
    if reset is not None:
        reset()
    for module in _units(root):
        module.reshard()


def shard_start(shape: tuple[int, ...], rank: int, ranks: int) -> int:
    """Offset in the flattened tensor of a rank's rows: chunks of ceil(n / ranks) rows, as torch.chunk cuts them."""
    rows = shape[0]
    first = min(rank * -(-rows // ranks), rows)
    return first * int(torch.Size(shape[1:]).numel())


def persistent_buffers(root: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the buffers that a saved model holds, by the backbone's own names."""
    kept = set(root.state_dict(keep_vars=True))
    buffers = _named_buffers(root)
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers.items() if name in kept}


def _named_buffers(root: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): buffer for name, buffer in root.named_buffers()}
