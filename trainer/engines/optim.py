"""Optimizers over this rank's shards, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from configs.schema import Optimizer, Schedule
from trainer.engines import eight_bit

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(options: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The optimizer over plain (local) leaf tensors; its state exists from the start, so that a checkpoint can fill it.

    AdamW and Adam are fused: one kernel for all shards, and they can skip an update on the device. RAdam is foreach.
    adamw8bit is bitsandbytes' (see trainer/engines/eight_bit.py).

    Raises:
        ValueError: unknown optimizer name, or weight decay for adam.
        ModuleNotFoundError: adamw8bit without bitsandbytes.
    """
    rate, (beta1, beta2), eps, decay = options.learning_rate, options.betas, options.eps, options.weight_decay
    betas = (beta1, beta2)
    optimizer: torch.optim.Optimizer
    if options.name == "adamw":
        optimizer = torch.optim.AdamW(parameters, rate, betas, eps, weight_decay=decay, fused=True)
    elif options.name == "adam":
        if decay:
            raise ValueError("optimizer.weight_decay is decoupled, which adam has not: use adamw, or weight_decay 0")
        optimizer = torch.optim.Adam(parameters, rate, betas, eps, fused=True)
    elif options.name == "radam":
        optimizer = torch.optim.RAdam(
            parameters, rate, betas, eps, weight_decay=decay, decoupled_weight_decay=True, foreach=True
        )
    elif options.name == "adamw8bit":
        return eight_bit.build(options, parameters)
    else:
        raise ValueError(f"optimizer.name is {options.name!r}; choose adamw, adam, radam or adamw8bit")
    for parameter in parameters:
        # Fused kernels count steps on the device, the others on the host (torch.optim's own initial state).
        step = torch.zeros((), dtype=torch.float32, device="cpu" if options.name == "radam" else parameter.device)
        moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
        optimizer.state[parameter] = {"step": step, **moments}
    return optimizer


def refuse(options: Optimizer, device: torch.device) -> None:
    """ValueError where an optimizer does not run on the device of the shards."""
    if options.name == "adamw8bit" and device.type != "cuda":
        raise ValueError(
            f"optimizer.name=adamw8bit updates shards on a GPU, but they lie on the {device.type}: set "
            "optimizer.name=adamw, and engine.cpu_offload=false if that is what keeps them there"
        )


class Moments:
    """The moments of an optimizer as checkpoints hold them: float tensors that a load may write."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def of(self, leaf: Tensor) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq, in the shape of the leaf."""
        return {name: self._optimizer.state[leaf][name] for name in MOMENTS}

    @property
    def step(self) -> float:
        """Updates made."""
        return float(self._optimizer.state[self._optimizer.param_groups[0]["params"][0]]["step"])

    def loaded(self, step: float) -> None:
        """A checkpoint of `step` updates has been written into what `of` gave out."""
        for state in self._optimizer.state.values():
            state["step"].fill_(step)

    def forget(self) -> None:
        """Before an update: what `of` gave out is no longer read."""


def moments(options: Optimizer, optimizer: torch.optim.Optimizer) -> Moments | eight_bit.EightBitMoments:
    """The view of the optimizer's moments that fits it."""
    return eight_bit.EightBitMoments(optimizer) if options.name == "adamw8bit" else Moments(optimizer)


def apply_update(optimizer: torch.optim.Optimizer, learning_rate: float, finite: Tensor) -> None:
    """One optimizer step from the `.grad`s, left out where `finite` (scalar bool on the device) is false.

    The fused optimizers read `finite` on the device (the switch that gradient scalers use); RAdam waits for it.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if optimizer.param_groups[0].get("fused"):
        leaf = optimizer.param_groups[0]["params"][0]
        optimizer.__dict__["found_inf"] = (~finite).to(leaf.device, torch.float32)
        optimizer.step()
        del optimizer.__dict__["found_inf"]
    elif bool(finite):
        optimizer.step()


def learning_rate(step: int, schedule: Schedule, peak: float, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    With a warm-up of W steps, step s < W uses peak (s + 1) / W. From the first step at the peak to the last step of the
    run, linear and cosine fall to peak * final_ratio; a run that goes on longer stays there.

    Raises:
        ValueError: unknown schedule name.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "constant":
        return peak
    first = max(warmup - 1, 0)
    done = min((step - first) / max(total_steps - 1 - first, 1), 1.0)
    if schedule.name == "linear":
        remaining = 1 - done
    elif schedule.name == "cosine":
        remaining = (1 + math.cos(math.pi * done)) / 2
    else:
        raise ValueError(f"schedule.name is {schedule.name!r}; choose constant, linear or cosine")
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * remaining)
