"""DeepSpeed's side of the ZeRO engine: its configuration, its partitions of a module, its masters and gradients.

The only file that knows DeepSpeed's own structures. DeepSpeed is imported on first use: it takes seconds.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.weights import FlatPart, plain_name
from trainer.engines.shards import Shard

_JOINED: list[Any] = []
"""The process group that DeepSpeed knows."""


@functools.cache
def library(device_type: str) -> Any:
    """The module deepspeed, quiet: its errors alone reach the log."""
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An all-reduce through shared memory for CPU ranks, which nothing here calls. Left on, it is compiled when the ranks
    # start, and a rank that is killed meanwhile leaves a lock behind which every later run waits for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join(device: torch.device) -> Any:
    """DeepSpeed on top of the process group that exists already; the module deepspeed."""
    deepspeed = library(device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed.zero.Init reads it; a world of one may have no torchrun
    _forget_earlier_world(deepspeed)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _forget_earlier_world(deepspeed: Any) -> None:
    """Ranks of a pool leave one process group and join another, each with a past of its own.

    DeepSpeed would go on with the group that is gone, and compare numbers of modules that differ between the ranks.
    """
    world = dist.group.WORLD
    if _JOINED and _JOINED[-1] is world:
        return
    _JOINED[:] = [world]
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    deepspeed.zero.Init.param_id = 0
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    (counter,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    counter[0] = 0


def configuration(
    stage: int,
    reduce_dtype: str,
    bucket_elements: int,
    prefetch_elements: int,
    offload: tuple[bool, bool],
    overlap: bool,
) -> dict[str, Any]:
    """DeepSpeed's configuration of a module of ours. offload: (optimizer state, parameters) to the host's memory.

    DeepSpeed neither clips, skips nor steps: `step` is ours, so the accumulation boundary is unmanaged.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket_elements,
        "allgather_bucket_size": bucket_elements,
        "stage3_prefetch_bucket_size": prefetch_elements,
        "stage3_param_persistence_threshold": 0,  # a persistent copy would outlive the update
        "memory_efficient_linear": False,  # it replaces torch.nn.functional.linear in the whole process
    }
    for section, wanted in zip(("offload_optimizer", "offload_param"), offload, strict=True):
        if wanted:
            zero[section] = {"device": "cpu", "pin_memory": overlap}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "communication_data_type": {"float32": "fp32", "bfloat16": "bf16"}[reduce_dtype],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the backbone's own names."""
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def split(module: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Stage 3: leave every rank its part of every parameter; one whole parameter at a time is in memory.

    Parameters on meta get memory without content, which `fill` gives them. Buffers move to the device.
    """
    init = library(device.type).zero.Init(config_dict_or_path=config)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(owner, name, parameter)
            init._convert_to_zero_parameters([parameter])
        for name, buffer in list(owner.named_buffers(recurse=False)):
            moved = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            owner._buffers[name] = moved


def fill(module: nn.Module, load: Callable[[nn.Module], None]) -> None:
    """Let `load` fill this rank's parts: each parameter carries them as `flat_part` meanwhile (models/weights.py)."""
    parameters = list(named(module).values())
    for parameter in parameters:
        parameter.flat_part = _flat_part(parameter)  # type: ignore[attr-defined]
    try:
        load(module)
    finally:
        for parameter in parameters:
            del parameter.flat_part  # type: ignore[attr-defined]


def _flat_part(parameter: Any) -> FlatPart:
    """The real elements of a partition, without the padding that makes all ranks' partitions equally long."""
    size, rank = parameter.ds_tensor.ds_numel, dist.get_rank()
    start = min(rank * size, parameter.ds_numel)
    length = min(size, parameter.ds_numel - start)
    return FlatPart(tuple(parameter.ds_shape), start, parameter.ds_tensor.detach()[:length])


def parts(module: nn.Module) -> dict[str, FlatPart]:
    """This rank's part of every parameter of a module in stage 3: the memory that the next gather reads."""
    return {name: _flat_part(parameter) for name, parameter in named(module).items()}


def release(engine: Any) -> None:
    """Drop what a module in stage 3 has gathered; the next pass gathers anew."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)  # a teacher has no optimizer around it
    if hasattr(offload, "partition_all_parameters"):
        offload.partition_all_parameters()


class Stage3:
    """Masters and gradients of a module whose parameters, gradients and moments are partitioned tensor by tensor."""

    def __init__(self, engine: Any) -> None:
        self._optimizer, self._module = engine.optimizer, engine.module

    def shards(self) -> dict[str, Shard]:
        return {name: self._shard(parameter) for name, parameter in named(self._module).items()}

    def _shard(self, parameter: Any) -> Shard:
        part = _flat_part(parameter)
        local = self._master(parameter, len(part.local)) if parameter.requires_grad else part.local
        return Shard(part.shape, part.start, local, parameter.requires_grad)

    def _master(self, parameter: Any, length: int) -> Tensor:
        group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        flat: Tensor = self._optimizer.fp32_partitioned_groups_flat[group]
        return flat.detach()[offset : offset + length]

    def gradients(self) -> dict[str, Tensor]:
        """This rank's gradients since the last `clear`, summed over micro-batches and averaged over ranks."""
        self._optimizer.finalize_gradient_accumulation_boundary()
        position = {
            id(parameter): (group, index)
            for group, parameters in enumerate(self._optimizer.fp16_groups)
            for index, parameter in enumerate(parameters)
        }
        by_group = self._optimizer.get_fp32_grad_partitions()
        found = {}
        for name, parameter in named(self._module).items():
            if parameter.requires_grad:
                group, index = position[id(parameter)]
                found[name] = by_group[group][index].view(-1)[: len(_flat_part(parameter).local)]
        return found

    def publish(self) -> None:
        """Make passes compute with the masters, where they are not the partitions themselves (offload)."""
        for parameter in named(self._module).values():
            if parameter.requires_grad:
                local = _flat_part(parameter).local
                master = self._master(parameter, len(local))
                if master.data_ptr() != local.data_ptr():
                    local.copy_(master)

    def clear(self) -> None:
        """Forget the gradients, also of a parameter that the next backward might leave out."""
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer.grad_partitions_flat_buffer.zero_()
        optimizer._offload_boundary_param_ids = set()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()


class Stage2:
    """Masters and gradients where every rank holds the parameters and its share of one flattened buffer of the rest."""

    def __init__(self, engine: Any) -> None:
        self._optimizer, self._module = engine.optimizer, engine.module

    def shards(self) -> dict[str, Shard]:
        return {name: self._shard(parameter) for name, parameter in named(self._module).items()}

    def _shard(self, parameter: Any) -> Shard:
        shape = tuple(parameter.shape)
        if not parameter.requires_grad:
            return Shard(shape, 0, parameter.detach().view(-1), False, owned=dist.get_rank() == 0)
        mapping = parameter._hp_mapping
        if mapping is None:
            device = self._optimizer.single_partition_of_fp32_groups[0].device
            return Shard(shape, parameter.numel(), torch.empty(0, device=device), True)
        return Shard(shape, mapping.lp_fragment_address.start, mapping.hp_fragment.detach().view(-1), True)

    def gradients(self) -> dict[str, Tensor]:
        """As Stage3.gradients."""
        self._optimizer.finalize_gradient_accumulation_boundary()
        trained = {name: parameter for name, parameter in named(self._module).items() if parameter.requires_grad}
        return {name: self._gradient(parameter) for name, parameter in trained.items()}

    @staticmethod
    def _gradient(parameter: Any) -> Tensor:
        if parameter._hp_mapping is None:
            return torch.empty(0, device=parameter.device)
        fragment: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return fragment.view(-1)

    def publish(self) -> None:
        """Give every rank the masters of all."""
        self._optimizer.update_lp_params()

    def clear(self) -> None:
        """Forget the gradients."""
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for group in range(len(optimizer.bit16_groups)):
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        optimizer.micro_step_id = -1
