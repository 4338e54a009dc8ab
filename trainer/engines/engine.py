"""The contract of a sharding engine: the only place that knows how parameters, gradients and moments are spread."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.objectives.objective import Nets


@dataclass(frozen=True)
class TensorPart:
    """One rank's contiguous part of a tensor of the training state, flattened row-major.

    group: parameter | exp_avg | exp_avg_sq | ema | ...; name: the parameter's name; shape: of the whole tensor;
    start: offset of `local` in the flattened tensor; local: 1-D view of this rank's elements, written by a load.
    owned: whether this rank writes it (one rank of a replicated group does).
    """

    group: str
    name: str
    shape: tuple[int, ...]
    start: int
    local: Tensor
    owned: bool = True


class Engine(Protocol):
    """Built by trainer/build.py from the engine's options, the optimizer section and a backbone on any device.

    The loss of a step is the sum over ranks and micro-batches: the engine undoes every averaging of its own.
    """

    device: torch.device
    nets: Nets

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one micro-batch."""

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update unless a gradient is not finite, clear gradients; the global gradient norm before clipping."""

    def update_ema(self) -> None:
        """Move the averaged weights once; after the optimizer step (law 4)."""

    def weights(self, which: str) -> AbstractContextManager[None]:
        """Within the context `nets` computes with "online" or "ema" parameters."""

    def parts(self) -> Iterator[TensorPart]:
        """Everything tensor-like that a checkpoint holds, in an order equal on all ranks."""

    def unsaved(self) -> Iterator[TensorPart]:
        """Frozen parameters that `parts` leaves out because they are loaded anew at every start: the base of adapters."""

    def counters(self) -> dict[str, float]:
        """Scalars that belong to the state: optimizer step, EMA decay in force."""

    def load_counters(self, counters: dict[str, float]) -> None: ...

    def full_state(self, which: str) -> dict[str, Tensor]:
        """All parameters by name on the CPU of rank 0, an empty dict elsewhere; which = online | ema."""


def whole(engine: Engine, group: str) -> dict[str, Tensor]:
    """Whole tensors of a group of the state from all ranks' parts; NaN where no rank has an element. Collective."""
    mine = [(p.name, p.shape, p.start, p.local.clone()) for p in engine.parts() if p.group == group and p.owned]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    state: dict[str, Tensor] = {}
    for name, shape, start, local in itertools.chain(*everyone):
        tensor = state.setdefault(name, torch.full(shape, float("nan"), dtype=local.dtype))
        tensor.view(-1)[start : start + local.numel()] = local
    return state
