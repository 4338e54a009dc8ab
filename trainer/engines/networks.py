"""The networks that objectives see, over one module or two (contract Nets)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trainer.objectives.objective import TEACHER


class Networks:
    """`velocity` is one call of one module: of the shared one, or of the one that the rows' kind names.

    online: the trained module. teacher: a separate module of equal shape, or None where teacher rows run in the online
    module (which then receives `weights`). passed: modules that made a pass since the engine last emptied it.
    """

    def __init__(self, online: nn.Module, teacher: nn.Module | None) -> None:
        self.shares_module = teacher is None
        self._online, self._teacher = online, teacher
        self.passed: set[nn.Module] = set()

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        """F(x_t, t, r, cond) [B, C, H, W] in the dtype of x_t, under torch's grad mode.

        t, r: [B]; weights: [B] ONLINE or TEACHER on the CPU, of one kind where the modules are separate.
        """
        if self._teacher is None:
            self.passed.add(self._online)
            return self._online(x_t, t, r, cond, weights=weights)
        of_teacher = weights is not None and int(weights[0]) == TEACHER
        assert weights is None or bool((weights == weights[0]).all()), "one call with rows of two separate modules"
        module = self._teacher if of_teacher else self._online
        self.passed.add(module)
        return module(x_t, t, r, cond)

    @contextlib.contextmanager
    def evaluate(self, module: nn.Module) -> Iterator[None]:
        """Within the context online rows run in `module`."""
        kept, self._online = self._online, module
        try:
            yield
        finally:
            self._online = kept
