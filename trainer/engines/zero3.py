"""DeepSpeed ZeRO: it partitions, gathers and reduces; the update, the average and the checkpoint are those of FSDP2."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Ema as EmaOptions
from configs.schema import Optimizer as OptimizerOptions
from trainer.engines import optim, partition, refusals, sharding
from trainer.engines.autocast import compute_in_bfloat16
from trainer.engines.distributed import default_device
from trainer.engines.engine import TensorPart
from trainer.engines.networks import Networks
from trainer.engines.recompute import checkpoint_blocks
from trainer.engines.shards import ShardedState
from trainer.objectives.objective import Nets


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


class Zero3:
    """Engine over DeepSpeed's ZeRO stages 3 and 2; the process group exists already.

    backbone: implements models.backbone.Backbone, on the CPU, on `device` or on meta; changed in place. teacher: online
    (rows share the module), ema (a second module whose partitions are the averaged weights) or frozen (a second module
    with the initial weights). device: None takes the process group's. load: fills the parameters, called once before
    any copy of them is made; required when the backbone is on meta. In stage 3 a parameter is one whole tensor at a
    time until it is partitioned, and `load` finds this rank's elements at its attribute `flat_part`.

    Raises:
        ValueError: options that cannot hold together, with the remedy.
    """

    device: torch.device
    nets: Nets

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
        _check(options, ema, teacher)
        self.device = device or default_device()
        optim.refuse(optimizer, torch.device("cpu") if options.offload_optimizer else self.device)
        self._ranks = dist.get_world_size()
        sharding.prepare_parameters(backbone)
        if next(backbone.parameters()).dtype != torch.float32:
            raise ValueError("DeepSpeed has no float64 training: set model.dtype=float32, or engine.name=fsdp2")
        separate = copy.deepcopy(backbone).requires_grad_(False) if teacher != "online" else None
        self._deepspeed = partition.join(self.device)
        config = _configuration(options, self.device)
        self._online = self._initialize(backbone, options, config, load)
        self._teacher: Any = None
        if separate is not None:
            self._teacher = self._initialize(separate, options, config, self._copy_online)
        self._networks = Networks(self._online, self._teacher)
        self.nets = self._networks
        self._masters = partition.Stage3(self._online) if options.stage == 3 else partition.Stage2(self._online)
        averaged = None
        self._averages_in_teacher = teacher == "ema"
        if self._averages_in_teacher and self._teacher is not None:
            averaged = {name: part.local for name, part in partition.parts(self._teacher.module).items()}
        self._state = ShardedState(self._masters.shards(), optimizer, ema.decay, averaged)
        self._graded: set[str] = set()
        self._watch_gradients()
        self._swapped = False

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
                note = functools.partial(lambda name, _: self._graded.add(name), name)
                parameter.register_post_accumulate_grad_hook(note)

    def _free_gathered(self) -> None:
        """Before partitions are written: the next pass must gather anew."""
        while self._networks.passed:
            partition.release(self._networks.passed.pop())

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch, summed over ranks; every rank calls it equally often."""
        # DeepSpeed averages over ranks; the contract is the sum.
        self._online.backward(loss * self._ranks, scale_wrt_gas=False)

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Clip to the global norm, update, clear gradients. The global norm before clipping, a scalar on the device.

        A norm that is not finite leaves parameters, moments and step count as they were, on all ranks alike.

        Raises:
            RuntimeError: a trainable parameter received no gradient in this step.
        """
        assert not self._swapped, "an optimizer step within weights('ema')"
        missing = [name for name in self._state.trainable if name not in self._graded]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._state.trainable)} trainable parameters got no gradient, first "
                f"{missing[:3]}: call backward before step; parameters that never get one belong in the backbone's "
                "idle_parameters"
            )
        self._free_gathered()
        norm = self._state.update(self._masters.gradients(), learning_rate)
        self._masters.publish()
        self._masters.clear()
        self._graded.clear()
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
        self._masters.publish()
        self._swapped = not self._swapped

    def parts(self) -> Iterator[TensorPart]:
        """Parameters, moments and averaged weights as flat views of this rank's memory, in an order equal on all ranks.

        A load may write them; load_counters puts what was written in force.
        """
        assert not self._swapped, "a checkpoint within weights('ema')"
        self._free_gathered()
        return self._state.parts()

    def counters(self) -> dict[str, float]:
        """optimizer_step: updates made (skipped steps do not count); ema_decay: the decay rate k in force."""
        return self._state.counters()

    def load_counters(self, counters: dict[str, float]) -> None:
        """Put `counters()` of a checkpoint in force, and what was written to `parts()`; collective.

        Raises:
            KeyError: a counter is missing.
        """
        self._state.load_counters(counters)
        self._masters.publish()

    def full_state(self, which: str) -> dict[str, Tensor]:
        """All parameters and persistent buffers by name on the CPU of rank 0, an empty dict elsewhere. Collective.

        Frozen parameters have no average and are the same in both. One whole tensor at a time is on the device.

        Raises:
            ValueError: unknown name, or no averaged weights are kept.
        """
        refusals.refuse_weights(which, self._state.ema is not None)
        state: dict[str, Tensor] = {}
        for name in partition.named(self._online.module):
            whole = self._state.gather(name, which)
            if whole is not None:
                state[name] = whole
        if dist.get_rank() == 0:
            state |= sharding.persistent_buffers(self._online.module)
        return state


def _check(options: Zero3Options, ema: EmaOptions, teacher: str) -> None:
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
        if teacher != "online":
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
