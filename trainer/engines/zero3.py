"""DeepSpeed ZeRO: it partitions, gathers and reduces; the update, the average and the checkpoint are those of FSDP2."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Ema as EmaOptions
from configs.schema import Optimizer as OptimizerOptions
from trainer.engines import optim, partition, refusals, sharding
from trainer.engines.adapted import adapters_of, arranged, needs_second_module
from trainer.engines.autocast import compute_in_bfloat16
from trainer.engines.distributed import default_device
from trainer.engines.networks import Networks
from trainer.engines.recompute import checkpoint_blocks
from trainer.engines.sharded_engine import ShardedEngine
from trainer.engines.shards import ShardedState


@dataclass
class Zero3Options:
    stage: int = 3
    """3 | 2. 3 partitions parameters, gradients and moments; 2 keeps the parameters whole on every rank."""
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass. Without it stage 3 keeps the gathered weights of all blocks from the
    forward pass to the backward pass."""
    block_dtype: str = "float32"
    """float32 | bfloat16: what matrix products and attention in the backbone's blocks compute in, by autocast.
    Parameters are float32 and travel so: DeepSpeed knows one dtype for a module, and times, inputs and the final
    projection must stay float32. Moments are float32."""
    reduce_dtype: str = "float32"
    """float32 | bfloat16: what gradients are summed over ranks in."""
    offload_optimizer: bool = False
    """Keep moments and master weights in the host's memory and update there (stage 3)."""
    offload_parameters: bool = False
    """Keep the partitions of the parameters in the host's memory between gathers (stage 3)."""
    bucket_elements: int = 50_000_000
    """Gradients reduced by one collective, and the buffer for them [elements]."""
    prefetch_elements: int = 50_000_000
    """Parameters gathered ahead of the module that computes (stage 3) [elements]."""


class Zero3(ShardedEngine):
    """Engine over DeepSpeed's ZeRO stages 3 and 2; the process group exists already.

    backbone: implements models.backbone.Backbone, on the CPU, on `device` or on meta; changed in place. teacher: online
    (rows share the module), ema (a second module whose partitions are the averaged weights) or frozen (a second module
    with the initial weights). device: None takes the process group's. load: fills the parameters, called once before
    any copy of them is made; required when the backbone is on meta. In stage 3 a parameter is one whole tensor at a
    time until it is partitioned, and `load` finds this rank's elements at its attribute `flat_part`.

    Raises:
        ValueError: options that cannot hold together, with the remedy.
    """

    def __init__(
        self,
        options: Zero3Options,
        backbone: Any,
        optimizer: OptimizerOptions,
        ema: EmaOptions,
        teacher: str,
        device: torch.device | None = None,
        load: Callable[[nn.Module], None] | None = None,
    ) -> None:
        _check(options, ema, teacher, adapted=adapters_of(backbone) is not None)
        self.device = device or default_device()
        optim.refuse(optimizer, torch.device("cpu") if options.offload_optimizer else self.device)
        self._ranks = dist.get_world_size()
        sharding.prepare_parameters(backbone)
        if next(backbone.parameters()).dtype != torch.float32:
            raise ValueError("DeepSpeed has no float64 training: set model.dtype=float32, or engine.name=fsdp2")
        separate = copy.deepcopy(backbone).requires_grad_(False) if needs_second_module(backbone, teacher) else None
        self._deepspeed = partition.join(self.device)
        config = _configuration(options, self.device)
        self._online = self._initialize(backbone, options, config, load)
        self._teacher: Any = None
        if separate is not None:
            self._teacher = self._initialize(separate, options, config, self._copy_online)
        self._masters = partition.Stage3(self._online) if options.stage == 3 else partition.Stage2(self._online)
        shards, averaged = arranged(self._masters.shards(), backbone)
        if teacher == "ema" and self._teacher is not None:
            averaged = {name: part.local for name, part in partition.parts(self._teacher.module).items()}
        state = ShardedState(shards, optimizer, ema.decay, averaged)
        networks = Networks(self._online, self._teacher)
        super().__init__(self._online.module, networks, state, self._teacher if teacher == "ema" else None)
        self._with_gradient: set[str] = set()
        self._watch_gradients()

    def _initialize(
        self, module: Any, options: Zero3Options, config: dict[str, Any], load: Callable[[nn.Module], None] | None
    ) -> Any:
        """Partition, fill and wrap one module."""
        if load is None and any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError("the backbone was built on meta: the engine needs `load` to fill its parameters")
        if options.block_dtype == "bfloat16":
            compute_in_bfloat16(module, self.device.type)
        trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if options.activation_checkpointing and trainable:
            checkpoint_blocks(module, every=1, group=1, keep="nothing")
        if options.stage == 3:
            partition.split(module, config, self.device)
            if load is not None:
                partition.fill(module, load)
        else:
            sharding.fill(module, self.device, load)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # DeepSpeed wants an optimizer to know what is trained; it has no state and makes no step.
        named = torch.optim.SGD(parameters, lr=0.0) if parameters else None
        engine, *_ = self._deepspeed.initialize(model=module, optimizer=named, config=config)
        return engine

    def _copy_online(self, module: nn.Module) -> None:
        source = partition.parts(self._online.module)
        for name, part in partition.parts(module).items():
            part.local.copy_(source[name].local)
        buffers = dict(self._online.module.named_buffers())
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])

    def _watch_gradients(self) -> None:
        """Note which parameters get a gradient: DeepSpeed's buffers do not tell."""
        for name, parameter in partition.named(self._online.module).items():
            if parameter.requires_grad:
                note = functools.partial(lambda name, _: self._with_gradient.add(name), name)
                parameter.register_post_accumulate_grad_hook(note)

    def _release(self, module: Any) -> None:
        partition.release(module)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch, summed over ranks; every rank calls it equally often."""
        # DeepSpeed averages over ranks; the contract is the sum.
        self._online.backward(loss * self._ranks, scale_wrt_gas=False)

    def _graded(self) -> set[str]:
        return self._with_gradient

    def _gradients(self) -> dict[str, Tensor]:
        return self._masters.gradients()

    def _clear_gradients(self) -> None:
        self._masters.clear()
        self._with_gradient.clear()

    def _publish(self) -> None:
        self._masters.publish()


def _check(options: Zero3Options, ema: EmaOptions, teacher: str, adapted: bool) -> None:
    refusals.refuse_dtypes(options)
    refusals.refuse_teacher(teacher, ema)
    if options.stage not in (2, 3):
        raise ValueError(f"engine.stage is {options.stage}; choose 3 or 2")
    for knob in ("bucket_elements", "prefetch_elements"):
        if getattr(options, knob) < 2 or getattr(options, knob) % 2:
            raise ValueError(f"engine.{knob} is {getattr(options, knob)}; it must be even and positive")
    if options.stage == 2:
        for knob in ("offload_optimizer", "offload_parameters"):
            if getattr(options, knob):
                raise ValueError(f"engine.{knob} needs partitioned parameters: set engine.stage=3")
        if adapted and teacher == "ema":
            raise ValueError("averaged adapters as the teacher need partitioned parameters: set engine.stage=3")
        if teacher != "online" and not adapted:
            raise ValueError(
                f"a separate teacher ({teacher}) in stage 2 would be a second whole model on every rank: set "
                "engine.stage=3, or objective.teacher=online"
            )


def _configuration(options: Zero3Options, device: torch.device) -> dict[str, Any]:
    return partition.configuration(
        options.stage,
        options.reduce_dtype,
        options.bucket_elements,
        options.prefetch_elements,
        (options.offload_optimizer, options.offload_parameters),
        overlap=device.type == "cuda",
    )
