"""PyTorch FSDP2: parameters, gradients, moments and averaged weights as float32 shards, gathered unit by unit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from configs.schema import Ema as EmaOptions
from configs.schema import Optimizer as OptimizerOptions
from trainer.engines import optim, recompute, refusals, sharding
from trainer.engines.adapted import arranged, needs_second_module
from trainer.engines.distributed import default_device
from trainer.engines.networks import Networks
from trainer.engines.sharded_engine import ShardedEngine
from trainer.engines.shards import Shard, ShardedState


@dataclass
class FSDP2Options:
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    checkpoint_every: int = 1
    """Which blocks recompute: every k-th one (or group); the others keep their activations. 1: all."""
    checkpoint_group: int = 1
    """Blocks that recompute as one and keep the input of the first alone; they are gathered as one unit, too."""
    checkpoint_keep: str = "nothing"
    """nothing | products: what a recomputing block keeps all the same: the results of matrix products and attention, so
    that only what is cheap is computed again."""
    block_dtype: str = "float32"
    """float32 | bfloat16: what the backbone's blocks compute in. Times, inputs, the final projection and losses stay
    float32; a float64 model stays float64."""
    reduce_dtype: str = "float32"
    """float32 | bfloat16: what the gradients of the blocks are summed over ranks in."""
    keep_gathered: bool = False
    """Keep parameters gathered from the first pass of a step to its last backward: one all-gather per block and step
    instead of one per pass, for the memory of the whole model in block_dtype on every rank."""
    replicate: int = 1
    """Copies of the sharded model; ranks / replicate share one (HSDP). 1 shards over all ranks."""
    prefetch: int | None = None
    """Blocks gathered ahead of the one that computes, forwards and backwards, each of which takes the memory of a gathered
    block. null: as FSDP2 does, the next one."""
    base_dtype: str = "float32"
    """float32 | bfloat16: what the blocks' frozen weights under adapters (lora.rank) are kept in; bfloat16 needs
    engine.block_dtype=bfloat16, where it changes no number and halves their memory."""
    cpu_offload: bool = False
    """Keep parameters, gradients, moments and averages in host memory; the update runs on the CPU. Slow: for models that
    do not fit otherwise."""
    compile: bool = False
    """Compile each block (torch.compile)."""
    compile_backend: str = "inductor"
    """Backend of torch.compile; aot_eager traces without generating kernels, for looking for faults."""


class FSDP2(ShardedEngine):
    """Engine over `torch.distributed.fsdp.fully_shard`; the process group exists already.

    backbone: implements models.backbone.Backbone, on the CPU, on `device` or on meta; changed in place. teacher: online
    (rows share the module), ema (a second module whose shards are the averaged weights) or frozen (a second module with
    the initial weights); where the backbone has adapters they tell the rows of one module apart. device: None takes the
    process group's. load: fills the sharded parameters, called once before any copy of them is made; required when the
    backbone is on meta.

    Raises:
        ValueError: options that cannot hold together, with the remedy.
    """

    def __init__(
        self,
        options: FSDP2Options,
        backbone: Any,
        optimizer: OptimizerOptions,
        ema: EmaOptions,
        teacher: str,
        device: torch.device | None = None,
        load: Callable[[nn.Module], None] | None = None,
    ) -> None:
        _check(options, ema, teacher)
        self.device = device or default_device()
        optim.refuse(optimizer, torch.device("cpu") if options.cpu_offload else self.device)
        self.mesh = sharding.device_mesh(self.device, options.replicate)
        sharding.prepare_parameters(backbone, options.base_dtype)
        separate = copy.deepcopy(backbone).requires_grad_(False) if needs_second_module(backbone, teacher) else None
        layout = _layout(options, self.mesh)
        self._online = sharding.shard(backbone, layout, _checkpointed_units(options, backbone))
        sharding.fill(self._online, self.device, load, options.cpu_offload)
        self._teacher: nn.Module | None = None
        if separate is not None:
            self._teacher = sharding.shard(separate, layout)
            sharding.fill(self._teacher, self.device, self._copy_online, options.cpu_offload)
        self._parameters = sharding.sharded_parameters(self._online)
        # Plain tensors over the shards' memory: no DTensor dispatch in the update, and any optimizer will do.
        shards, averaged = arranged({name: self._shard(p) for name, p in self._parameters.items()}, backbone)
        if teacher == "ema" and self._teacher is not None:
            of_teacher = sharding.sharded_parameters(self._teacher)
            averaged = {name: sharding.local_part(shard).view(-1) for name, shard in of_teacher.items()}
        state = ShardedState(shards, optimizer, ema.decay, averaged, options.replicate)
        networks = Networks(self._online, self._teacher)
        super().__init__(self._online, networks, state, self._teacher if teacher == "ema" else None)

    def _shard(self, parameter: DTensor) -> Shard:
        """This rank's rows of a parameter; one rank of a replicated group writes them into checkpoints."""
        shape = tuple(parameter.shape)
        start = sharding.shard_start(shape, self.mesh.get_local_rank("shard"), self.mesh.size(-1))
        owned = self.mesh.ndim == 1 or self.mesh.get_local_rank("replicate") == 0
        return Shard(shape, start, sharding.local_part(parameter).view(-1), parameter.requires_grad, owned)

    def _copy_online(self, module: nn.Module) -> None:
        sharding.copy_into(module, self._online)

    def _release(self, module: nn.Module) -> None:
        sharding.free_gathered(module)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch, summed over ranks; every rank calls it equally often."""
        loss.backward()

    def _graded(self) -> set[str]:
        return {name for name, parameter in self._parameters.items() if parameter.grad is not None}

    def _gradients(self) -> dict[str, Tensor]:
        gradients = {name: cast(DTensor, self._parameters[name].grad) for name in self._state.trainable}
        return {name: sharding.local_part(gradient).view(-1) for name, gradient in gradients.items()}

    def _clear_gradients(self) -> None:
        for name in self._state.trainable:
            self._parameters[name].grad = None


def _check(options: FSDP2Options, ema: EmaOptions, teacher: str) -> None:
    refusals.refuse_dtypes(options)
    if options.base_dtype == "bfloat16" != options.block_dtype:
        raise ValueError("engine.base_dtype=bfloat16 needs engine.block_dtype=bfloat16")
    refusals.refuse_teacher(teacher, ema)
    if options.checkpoint_keep not in recompute.KEEPS:
        raise ValueError(f"engine.checkpoint_keep is {options.checkpoint_keep!r}; choose nothing or products")
    for knob in ("checkpoint_every", "checkpoint_group"):
        if getattr(options, knob) < 1:
            raise ValueError(f"engine.{knob} is {getattr(options, knob)}; it must be 1 or more")
    if options.prefetch is not None and options.prefetch < 0:
        raise ValueError(f"engine.prefetch is {options.prefetch}; write the number of blocks, or null")


def _layout(options: FSDP2Options, mesh: DeviceMesh) -> sharding.Layout:
    return sharding.Layout(
        mesh,
        options.block_dtype,
        options.reduce_dtype,
        options.keep_gathered,
        offload=options.cpu_offload,
        prefetch=options.prefetch,
        compile=options.compile_backend if options.compile else None,
    )


def _checkpointed_units(options: FSDP2Options, backbone: Any) -> list[list[nn.Module]] | None:
    if not options.activation_checkpointing:
        return None
    every, group, keep = options.checkpoint_every, options.checkpoint_group, options.checkpoint_keep
    return recompute.checkpoint_blocks(backbone, every, group, keep)
