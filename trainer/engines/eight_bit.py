"""AdamW with 8-bit moments on GPUs (bitsandbytes); checkpoints hold them as float32, like every optimizer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from configs.schema import Optimizer

BLOCK = 256
"""Elements that share a scale; bitsandbytes' own constant."""
_STATES = {"exp_avg": "1", "exp_avg_sq": "2"}
"""Moment -> suffix of bitsandbytes' names state, qmap, absmax."""


def build(options: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit with its state made at once; tensors under 4096 elements keep float32 moments there.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed, with the remedy.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "optimizer.name=adamw8bit needs bitsandbytes, which is not installed: install this project with its extra "
            "[gpu], or set optimizer.name=adamw"
        ) from error
    # A rank may hold nothing of a parameter, and kernels over nothing are refused by CUDA.
    held = [parameter for parameter in parameters if parameter.numel()]
    rate, eps, decay = options.learning_rate, options.eps, options.weight_decay
    optimizer: Any = AdamW8bit(held, lr=rate, betas=tuple(options.betas), eps=eps, weight_decay=decay)
    optimizer.check_overrides()
    optimizer.initialized = True
    for index, parameter in enumerate(held):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    made: torch.optim.Optimizer = optimizer
    return made


class EightBitMoments:
    """Moments of AdamW8bit as float32 copies in host memory, quantised anew when a load has written them.

    Quantising what was dequantised gives the same bytes: the largest element of a block is its scale.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._lent: dict[Tensor, dict[str, Tensor]] = {}
        self._steps = 0

    def of(self, leaf: Tensor) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq, float32 on the CPU in the shape of the leaf; kept until `loaded` or `forget`."""
        self._lent[leaf] = {name: self._float(leaf, suffix) for name, suffix in _STATES.items()}
        return self._lent[leaf]

    @property
    def step(self) -> float:
        """Updates made."""
        states = list(self._optimizer.state.values())
        return float(states[0]["step"]) if states else float(self._steps)

    def loaded(self, step: float) -> None:
        """A checkpoint of `step` updates has been written into what `of` gave out."""
        self._steps = int(step)
        for leaf, written in self._lent.items():
            for name, suffix in _STATES.items():
                self._store(leaf, suffix, written[name])
        for state in self._optimizer.state.values():
            state["step"] = int(step)
        self.forget()

    def forget(self) -> None:
        """Before an update: what `of` gave out is no longer read."""
        self._lent.clear()

    def _float(self, leaf: Tensor, suffix: str) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        if not leaf.numel():
            return torch.zeros_like(leaf, device="cpu", requires_grad=False)
        state = self._optimizer.state[leaf]
        stored = state[f"state{suffix}"]
        if stored.dtype == torch.uint8:
            scale, code = state[f"absmax{suffix}"], state[f"qmap{suffix}"]
            stored = dequantize_blockwise(stored, absmax=scale, code=code, blocksize=BLOCK)
        return stored.to("cpu", torch.float32, copy=True)

    def _store(self, leaf: Tensor, suffix: str, moment: Tensor) -> None:
        from bitsandbytes.functional import quantize_blockwise

        if not leaf.numel():
            return
        state = self._optimizer.state[leaf]
        stored, moment = state[f"state{suffix}"], moment.to(leaf.device)
        if stored.dtype == torch.uint8:
            quantised, found = quantize_blockwise(moment, code=state[f"qmap{suffix}"], blocksize=BLOCK)
            state[f"absmax{suffix}"].copy_(found.absmax)
            stored.copy_(quantised)
        else:
            stored.copy_(moment)
