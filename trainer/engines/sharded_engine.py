"""What the engines have in common: the update, the average and the checkpoint of shards, whoever gathers them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engines import refusals, sharding
from trainer.engines.engine import TensorPart
from trainer.engines.networks import Networks
from trainer.engines.shards import ShardedState
from trainer.objectives.objective import Nets


class ShardedEngine(ABC):
    """Contract trainer/engines/engine.py over a ShardedState; a subclass says how its library gathers and reduces.

    module: the trained module without the library's wrapper. networks: what makes the passes. averages_in: the module
    whose own shards are the averaged weights, or None where they lie beside the trained ones.
    """

    device: torch.device

    def __init__(self, module: nn.Module, networks: Networks, state: ShardedState, averages_in: Any | None) -> None:
        self.nets: Nets = networks
        self._module, self._networks, self._state, self._averages_in = module, networks, state, averages_in
        self._swapped = False

    @abstractmethod
    def _release(self, module: Any) -> None:
        """Drop what a module that made a pass has gathered."""

    @abstractmethod
    def _graded(self) -> Collection[str]:
        """Names of the parameters that received a gradient since the last step."""

    @abstractmethod
    def _gradients(self) -> Mapping[str, Tensor]:
        """This rank's gradients of its shards, 1-D."""

    @abstractmethod
    def _clear_gradients(self) -> None: ...

    def _publish(self) -> None:  # noqa: B027 - most shards are what passes compute with
        """Make passes compute with the shards, where they are not the memory that is gathered."""

    def _free_gathered(self) -> None:
        """Before shards are written: the next pass must gather anew."""
        while self._networks.passed:
            self._release(self._networks.passed.pop())

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        """Clip to the global norm, update, clear gradients. The global norm before clipping, a scalar on the device.

        A norm that is not finite leaves parameters, moments and step count as they were, on all ranks alike.

        Raises:
            RuntimeError: a trainable parameter received no gradient in this step.
        """
        assert not self._swapped, "an optimizer step within weights('ema')"
        self._free_gathered()
        graded, trained = self._graded(), self._state.trainable
        if missing := [name for name in trained if name not in graded]:
            raise RuntimeError(
                f"{len(missing)} of {len(trained)} trainable parameters got no gradient, first {missing[:3]}: "
                "call backward before step; parameters that never get one belong in the backbone's idle_parameters"
            )
        norm = self._state.update(self._gradients(), learning_rate)
        self._publish()
        self._clear_gradients()
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
        elif self._averages_in is not None:
            with self._networks.evaluate(self._averages_in):
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
        self._publish()
        self._swapped = not self._swapped

    def parts(self) -> Iterator[TensorPart]:
        """Parameters, moments and averaged weights as flat views of this rank's memory, in an order equal on all ranks.

        A load may write them; load_counters puts what was written in force.
        """
        assert not self._swapped, "a checkpoint within weights('ema')"
        self._free_gathered()
        return self._state.parts()

    def unsaved(self) -> Iterator[TensorPart]:
        """Frozen parameters that `parts` leaves out because they are loaded anew at every start: the base of adapters."""
        self._free_gathered()
        return self._state.unsaved()

    def counters(self) -> dict[str, float]:
        """optimizer_step: updates made (skipped steps do not count); ema_decay: the decay rate k in force."""
        return self._state.counters()

    def load_counters(self, counters: dict[str, float]) -> None:
        """Put `counters()` of a checkpoint in force, and what was written to `parts()`; collective.

        Raises:
            KeyError: a counter is missing.
        """
        self._state.load_counters(counters)
        self._publish()

    @torch.no_grad()
    def full_state(self, which: str) -> dict[str, Tensor]:
        """All parameters and persistent buffers by name on the CPU of rank 0, an empty dict elsewhere. Collective.

        Frozen parameters have no average and are the same in both. One whole tensor at a time is on the device.

        Raises:
            ValueError: unknown name, or no averaged weights are kept.
        """
        refusals.refuse_weights(which, self._state.ema is not None)
        # Asking a module for its buffers reshards it: were rank 0 alone to gather anew, the next pass would hang.
        self._free_gathered()
        state: dict[str, Tensor] = {}
        for name in self._state.names:
            whole = self._state.gather(name, which)
            if whole is not None:
                state[name] = whole
        if dist.get_rank() == 0:
            state |= sharding.persistent_buffers(self._module)
        return state
