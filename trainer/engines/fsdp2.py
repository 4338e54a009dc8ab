"""PyTorch FSDP2: parameters, gradients, moments and averaged weights as float32 shards, gathered unit by unit."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from configs.schema import Ema as EmaOptions
from configs.schema import Optimizer as OptimizerOptions
from trainer.engines import optim, recompute, refusals, sharding
from trainer.engines.distributed import default_device
from trainer.engines.engine import TensorPart
from trainer.engines.networks import Networks
from trainer.engines.shards import Shard, ShardedState
from trainer.objectives.objective import Nets


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
    cpu_offload: bool = False
    """Keep parameters, gradients, moments and averages in host memory; the update runs on the CPU. Slow: for models that
    do not fit otherwise."""
    compile: bool = False
    """Compile each block (torch.compile)."""
    compile_backend: str = "inductor"
    """Backend of torch.compile; aot_eager traces without generating kernels, for looking for faults."""


class FSDP2:
    """Engine over `torch.distributed.fsdp.fully_shard`; the process group exists already.

    backbone: implements models.backbone.Backbone, on the CPU, on `device` or on meta; changed in place. teacher: online
    (rows share the module), ema (a second module whose shards are the averaged weights) or frozen (a second module with
    the initial weights). device: None takes the process group's. load: fills the sharded parameters, called once before
    any copy of them is made; required when the backbone is on meta.

    Raises:
        ValueError: options that cannot hold together, with the remedy.
    """

    device: torch.device
    nets: Nets

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
        sharding.prepare_parameters(backbone)
        separate = copy.deepcopy(backbone).requires_grad_(False) if teacher != "online" else None
        layout = _layout(options, self.mesh)
        self._online = sharding.shard(backbone, layout, _checkpointed_units(options, backbone))
        sharding.fill(self._online, self.device, load, options.cpu_offload)
        self._teacher: nn.Module | None = None
        if separate is not None:
            self._teacher = sharding.shard(separate, layout)
            sharding.fill(self._teacher, self.device, self._copy_online, options.cpu_offload)
        self._networks = Networks(self._online, self._teacher)
        self.nets = self._networks
        self._parameters = sharding.sharded_parameters(self._online)
        averaged = None
        self._averages_in_teacher = teacher == "ema"
        if self._averages_in_teacher and self._teacher is not None:
            of_teacher = sharding.sharded_parameters(self._teacher)
            averaged = {name: sharding.local_part(shard).view(-1) for name, shard in of_teacher.items()}
        # Plain tensors over the shards' memory: no DTensor dispatch in the update, and any optimizer will do.
        shards = {name: self._shard(parameter) for name, parameter in self._parameters.items()}
        self._state = ShardedState(shards, optimizer, ema.decay, averaged, options.replicate)
        self._swapped = False

    def _shard(self, parameter: DTensor) -> Shard:
        """This rank's rows of a parameter; one rank of a replicated group writes them into checkpoints."""
        shape = tuple(parameter.shape)
        start = sharding.shard_start(shape, self.mesh.get_local_rank("shard"), self.mesh.size(-1))
        owned = self.mesh.ndim == 1 or self.mesh.get_local_rank("replicate") == 0
        return Shard(shape, start, sharding.local_part(parameter).view(-1), parameter.requires_grad, owned)

    def _copy_online(self, module: nn.Module) -> None:
        sharding.copy_into(module, self._online)

    def _free_gathered(self) -> None:
        """Before shards are written: the next pass must gather anew."""
        while self._networks.passed:
            sharding.free_gathered(self._networks.passed.pop())

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch, summed over ranks; every rank calls it equally often."""
        loss.backward()

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Clip to the global norm, update, clear gradients. The global norm before clipping, a scalar on the device.

        A norm that is not finite leaves parameters, moments and step count as they were, on all ranks alike.

        Raises:
            RuntimeError: a trainable parameter received no gradient in this step.
        """
        assert not self._swapped, "an optimizer step within weights('ema')"
        self._free_gathered()
        trained = self._state.trainable
        gradients = {name: self._parameters[name].grad for name in trained}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(trained)} trainable parameters got no gradient, first {missing[:3]}: "
                "call backward before step; parameters that never get one belong in the backbone's idle_parameters"
            )
        local = {name: sharding.local_part(cast(DTensor, gradient)).view(-1) for name, gradient in gradients.items()}
        norm = self._state.update(local, learning_rate)
        for name in trained:
            self._parameters[name].grad = None
        return norm.to(self.device)

    def update_ema(self) -> None:
        """Move the averaged weights once; after the optimizer step (law 4)."""
        if self._state.ema is not None:
            self._free_gathered()
            self._state.ema.update()

    @contextlib.contextmanager
    def weights(self, which: str) -> Iterator[None]:
        """Within the context `nets` computes with "online" or "ema" parameters; for passes without gradient.

        Raises:
            ValueError: unknown name, or no averaged weights are kept.
        """
        refusals.refuse_weights(which, self._state.ema is not None)
        if which == "online":
            yield
        elif self._averages_in_teacher and self._teacher is not None:
            with self._networks.evaluate(self._teacher):
                yield
        else:
            self._exchange()
            try:
                yield
            finally:
                self._exchange()

    def _exchange(self) -> None:
        assert self._state.ema is not None
        self._free_gathered()
        self._state.ema.swap()
        self._swapped = not self._swapped

    def parts(self) -> Iterator[TensorPart]:
        """Parameters, moments and averaged weights as flat views of this rank's shards, in an order equal on all ranks.

        A load may write them: the next pass gathers anew.
        """
        assert not self._swapped, "a checkpoint within weights('ema')"
        self._free_gathered()
        return self._state.parts()

    def counters(self) -> dict[str, float]:
        """optimizer_step: updates made (skipped steps do not count); ema_decay: the decay rate k in force."""
        return self._state.counters()

    def load_counters(self, counters: dict[str, float]) -> None:
        """Put `counters()` of a checkpoint in force, and what was written to `parts()`; KeyError where one is missing."""
        self._state.load_counters(counters)

    @torch.no_grad()
    def full_state(self, which: str) -> dict[str, Tensor]:
        """All parameters and persistent buffers by name on the CPU of rank 0, an empty dict elsewhere. Collective.

        Frozen parameters have no average and are the same in both. One whole tensor at a time is on the device.

        Raises:
            ValueError: unknown name, or no averaged weights are kept.
        """
        refusals.refuse_weights(which, self._state.ema is not None)
        state: dict[str, Tensor] = {}
        for name in self._parameters:
            whole = self._state.gather(name, which)
            if whole is not None:
                state[name] = whole
        if dist.get_rank() == 0:
            state |= sharding.persistent_buffers(self._online)
        return state


def _check(options: FSDP2Options, ema: EmaOptions, teacher: str) -> None:
    refusals.refuse_dtypes(options)
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
