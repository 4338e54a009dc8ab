"""One rank's shards as plain flat tensors: how they are updated and averaged, and what of them a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import Optimizer as OptimizerOptions
from trainer.engines import optim
from trainer.engines.ema import Ema
from trainer.engines.engine import TensorPart


@dataclass(frozen=True)
class Shard:
    """Elements [start, start + len(local)) of a flattened parameter of `shape`.

    local: 1-D view of them, updated in place; trainable: whether it has moments and an average; owned: whether this
    rank writes it into a checkpoint; saved: whether a checkpoint holds it at all.
    """

    shape: tuple[int, ...]
    start: int
    local: Tensor
    trainable: bool
    owned: bool = True
    saved: bool = True


class ShardedState:
    """Parameters, moments and averaged weights of this rank, by parameter name.

    decay: of the averaged weights, 0 keeps none. averaged: memory that holds them already, by name; None makes a copy.
    copies: ranks that hold the same element.
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        optimizer: OptimizerOptions,
        decay: float,
        averaged: Mapping[str, Tensor] | None = None,
        copies: int = 1,
    ) -> None:
        self._shards = dict(shards)
        self._copies = copies
        self._max_grad_norm = optimizer.max_grad_norm
        trainable = {name: shard.local for name, shard in shards.items() if shard.trainable}
        self._leaves = {name: nn.Parameter(local) for name, local in trainable.items()}
        self._optimizer = optim.build_optimizer(optimizer, list(self._leaves.values()))
        self._moments = optim.moments(optimizer, self._optimizer)
        self.averaged: dict[str, Tensor] = {}
        self.ema: Ema | None = None
        if decay:
            self.averaged = {name: averaged[name] if averaged else t.clone() for name, t in trainable.items()}
            self.ema = Ema(decay, [self.averaged[name] for name in trainable], list(trainable.values()))

    @property
    def names(self) -> list[str]:
        """Names of all parameters, trained or frozen."""
        return list(self._shards)

    @property
    def trainable(self) -> list[str]:
        """Names of the trained parameters."""
        return list(self._leaves)

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], learning_rate: float) -> Tensor:
        """Clip to the global norm and update; the norm before clipping, a scalar. Collective.

        gradients: this rank's elements of every trained parameter, summed over ranks; scaled in place. A norm that is
        not finite leaves parameters, moments and step count as they were, on all ranks alike.
        """
        leaves = list(self._leaves.values())
        for name, leaf in self._leaves.items():
            leaf.grad = gradients[name]
        norm = self._global_norm(leaves)
        if self._max_grad_norm:
            nn.utils.clip_grads_with_norm_(leaves, self._max_grad_norm, norm)
        self._moments.forget()
        optim.apply_update(self._optimizer, learning_rate, torch.isfinite(norm))
        for leaf in leaves:
            leaf.grad = None
        return norm

    def _global_norm(self, leaves: list[nn.Parameter]) -> Tensor:
        # float64 keeps the sum of squares from overflowing.
        squares = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None and leaf.numel()]
        if gradients:
            squares += nn.utils.get_total_norm(gradients).double().square()
        # Over all ranks, so that it is the same to the last bit everywhere: copies that were clipped by groups of their
        # own would drift apart, and nothing would bring them together again.
        dist.all_reduce(squares)
        return (squares / self._copies).sqrt().to(leaves[0].dtype)

    def parts(self) -> Iterator[TensorPart]:
        """Parameters, moments and averaged weights, in an order equal on all ranks."""
        for name, shard in self._shards.items():
            if not shard.saved:
                continue
            tensors = {"parameter": shard.local}
            if name in self._leaves:
                tensors |= self._moments.of(self._leaves[name])
            if name in self.averaged:
                tensors["ema"] = self.averaged[name]
            for group, local in tensors.items():
                yield TensorPart(group, name, shard.shape, shard.start, local, shard.owned)

    def unsaved(self) -> Iterator[TensorPart]:
        """The parameters that `parts` leaves out."""
        for name, shard in self._shards.items():
            if not shard.saved:
                yield TensorPart("parameter", name, shard.shape, shard.start, shard.local, shard.owned)

    def counters(self) -> dict[str, float]:
        """optimizer_step: updates made (skipped steps do not count); ema_decay: the decay rate k in force."""
        return {"optimizer_step": self._moments.step} | ({"ema_decay": self.ema.k} if self.ema else {})

    def load_counters(self, counters: Mapping[str, float]) -> None:
        """Put `counters()` of a checkpoint in force; KeyError where one is missing."""
        self._moments.loaded(counters["optimizer_step"])
        if self.ema:
            self.ema.k = counters["ema_decay"]

    @torch.no_grad()
    def gather(self, name: str, which: str) -> Tensor | None:
        """A whole parameter (which: online | ema) on the CPU of rank 0, None elsewhere. Collective.

        A parameter without an average is the same in both.
        """
        shard = self._shards[name]
        local = self.averaged.get(name, shard.local) if which == "ema" else shard.local
        whole = torch.zeros(torch.Size(shard.shape).numel(), dtype=local.dtype, device=local.device)
        if shard.owned:
            whole[shard.start : shard.start + local.numel()] = local
        # Every element is zero on all ranks but one; as integers the sum keeps every bit, of -0.0 and NaN too.
        bits = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
        dist.reduce(bits, dst=0)
        return whole.view(shard.shape).to("cpu", copy=True) if dist.get_rank() == 0 else None
