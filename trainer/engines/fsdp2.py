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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from configs.schema import Ema as EmaOptions
from configs.schema import Optimizer as OptimizerOptions
from trainer.engines import optim, sharding
from trainer.engines.distributed import default_device
from trainer.engines.ema import Ema
from trainer.engines.engine import TensorPart
from trainer.engines.networks import Networks
from trainer.objectives.objective import Nets


@dataclass
class FSDP2Options:
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
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
        self._mesh = _mesh(self.device, options.replicate)
        self._max_grad_norm = optimizer.max_grad_norm
        sharding.prepare_parameters(backbone)
        separate = copy.deepcopy(backbone).requires_grad_(False) if teacher != "online" else None
        layout = sharding.Layout(self._mesh, options.block_dtype, options.reduce_dtype, options.keep_gathered)
        self._online = sharding.shard(backbone, layout, options.activation_checkpointing)
        sharding.fill(self._online, self.device, load)
        self._teacher: nn.Module | None = None
        if separate is not None:
            self._teacher = sharding.shard(separate, layout)
            sharding.fill(self._teacher, self.device, lambda module: sharding.copy_into(module, self._online))
        self._networks = Networks(self._online, self._teacher)
        self.nets = self._networks
        self._parameters = sharding.sharded_parameters(self._online)
        # Plain tensors over the shards' memory: no DTensor dispatch in the update, and any optimizer will do.
        trainable = {name: parameter for name, parameter in self._parameters.items() if parameter.requires_grad}
        self._leaves = {name: nn.Parameter(sharding.local_part(parameter)) for name, parameter in trainable.items()}
        self._optimizer = optim.build_optimizer(optimizer, list(self._leaves.values()))
        self._averages_in_teacher = teacher == "ema"
        self._averaged = self._average_shards() if ema.decay else {}
        self._ema = self._make_ema(ema.decay) if ema.decay else None
        self._swapped = False

    def _average_shards(self) -> dict[str, DTensor]:
        if self._averages_in_teacher and self._teacher is not None:
            of_teacher = sharding.sharded_parameters(self._teacher)
            return {name: of_teacher[name] for name in self._leaves}
        return {name: cast(DTensor, self._parameters[name].detach().clone()) for name in self._leaves}

    def _make_ema(self, decay: float) -> Ema:
        return Ema(
            decay, [sharding.local_part(shard) for shard in self._averaged.values()], list(self._leaves.values())
        )

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
        missing = [name for name in self._leaves if self._parameters[name].grad is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._leaves)} trainable parameters got no gradient, first {missing[:3]}: "
                "call backward before step; parameters that never get one belong in the backbone's idle_parameters"
            )
        for name, leaf in self._leaves.items():
            leaf.grad = sharding.local_part(cast(DTensor, self._parameters[name].grad))
        leaves = list(self._leaves.values())
        norm = self._global_norm(leaves)
        if self._max_grad_norm:
            nn.utils.clip_grads_with_norm_(leaves, self._max_grad_norm, norm)
        optim.apply_update(self._optimizer, learning_rate, torch.isfinite(norm))
        for name, leaf in self._leaves.items():
            leaf.grad = self._parameters[name].grad = None
        return norm

    def _global_norm(self, leaves: list[nn.Parameter]) -> Tensor:
        # The shards of one replica hold every element once; float64 keeps the sum of squares from overflowing.
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None and leaf.numel()]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        if gradients:
            squares += nn.utils.get_total_norm(gradients).double().square()
        dist.all_reduce(squares, group=self._mesh.get_group("shard"))
        return squares.sqrt().to(leaves[0].dtype)

    def update_ema(self) -> None:
        """Move the averaged weights once; after the optimizer step (law 4)."""
        if self._ema is not None:
            self._free_gathered()
            self._ema.update()

    @contextlib.contextmanager
    def weights(self, which: str) -> Iterator[None]:
        """Within the context `nets` computes with "online" or "ema" parameters; for passes without gradient.

        Raises:
            ValueError: unknown name, or no averaged weights are kept.
        """
        _check_weights(which, self._ema)
        if which == "online" or self._ema is None:
            yield
        elif self._averages_in_teacher and self._teacher is not None:
            with self._networks.evaluate(self._teacher):
                yield
        else:
            self._exchange(self._ema)
            try:
                yield
            finally:
                self._exchange(self._ema)

    def _exchange(self, ema: Ema) -> None:
        self._free_gathered()
        ema.swap()
        self._swapped = not self._swapped

    def parts(self) -> Iterator[TensorPart]:
        """Parameters, moments and averaged weights as flat views of this rank's shards, in an order equal on all ranks.

        A load may write them: the next pass gathers anew.
        """
        assert not self._swapped, "a checkpoint within weights('ema')"
        self._free_gathered()
        owned = self._mesh.ndim == 1 or self._mesh.get_local_rank("replicate") == 0
        for name, parameter in self._parameters.items():
            shape = tuple(parameter.shape)
            start = sharding.shard_start(shape, self._mesh.get_local_rank("shard"), self._mesh.size(-1))
            tensors = {"parameter": sharding.local_part(parameter)}
            if name in self._leaves:
                state = self._optimizer.state[self._leaves[name]]
                tensors |= {moment: state[moment] for moment in optim.MOMENTS}
            if name in self._averaged:
                tensors["ema"] = sharding.local_part(self._averaged[name])
            for group, local in tensors.items():
                yield TensorPart(group, name, shape, start, local.view(-1), owned)

    def counters(self) -> dict[str, float]:
        """optimizer_step: updates made (skipped steps do not count); ema_decay: the decay rate k in force."""
        steps = float(self._optimizer.state[next(iter(self._leaves.values()))]["step"])
        return {"optimizer_step": steps} | ({"ema_decay": self._ema.k} if self._ema else {})

    def load_counters(self, counters: dict[str, float]) -> None:
        """Put `counters()` of a checkpoint in force; KeyError where one is missing."""
        for leaf in self._leaves.values():
            self._optimizer.state[leaf]["step"].fill_(counters["optimizer_step"])
        if self._ema:
            self._ema.k = counters["ema_decay"]

    @torch.no_grad()
    def full_state(self, which: str) -> dict[str, Tensor]:
        """All parameters and persistent buffers by name on the CPU of rank 0, an empty dict elsewhere. Collective.

        Frozen parameters have no average and are the same in both. One whole tensor at a time is on the device.

        Raises:
            ValueError: unknown name, or no averaged weights are kept.
        """
        _check_weights(which, self._ema)
        state: dict[str, Tensor] = {}
        rank = dist.get_rank()
        for name, parameter in self._parameters.items():
            full = (self._averaged.get(name, parameter) if which == "ema" else parameter).full_tensor()
            if rank == 0:
                state[name] = full.to("cpu", copy=True)
        if rank == 0:
            state |= sharding.persistent_buffers(self._online)
        return state


def _check(options: FSDP2Options, ema: EmaOptions, teacher: str) -> None:
    for knob in ("block_dtype", "reduce_dtype"):
        if getattr(options, knob) not in ("float32", "bfloat16"):
            raise ValueError(f"engine.{knob} is {getattr(options, knob)!r}; choose float32 or bfloat16")
    if teacher not in ("online", "ema", "frozen"):
        raise ValueError(f"teacher is {teacher!r}; choose online, ema or frozen")
    if teacher == "ema" and not ema.decay:
        raise ValueError(
            "an ema teacher with ema.decay 0 is the online network itself: set teacher online, or ema.decay"
        )


def _check_weights(which: str, ema: Ema | None) -> None:
    if which not in ("online", "ema"):
        raise ValueError(f"weights are {which!r}; choose online or ema")
    if which == "ema" and ema is None:
        raise ValueError("no averaged weights are kept: set ema.decay above 0, or use the online weights")


def _mesh(device: torch.device, replicate: int) -> DeviceMesh:
    ranks = dist.get_world_size()
    if replicate < 1 or ranks % replicate:
        raise ValueError(f"engine.replicate {replicate} must divide the number of ranks, {ranks}")
    if replicate == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))
