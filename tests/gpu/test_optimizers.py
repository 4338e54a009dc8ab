"""Updates by fused kernels on the device against the textbook in float64, and the switch that leaves one out."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from configs.schema import Optimizer
from trainer.engines import optim
from trainer.sameness import errors

STEPS, RATE, BETAS = 4, 0.01, (0.9, 0.99)


def gradient(leaf: Tensor) -> Tensor:
    return torch.sin(leaf.detach() * 3)


def leaves(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (5000, 7)]
    return [leaf.to(device, dtype).requires_grad_() for leaf in made]


def textbook(decay: float) -> list[Tensor]:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) in float64."""
    found = [leaf.detach() for leaf in leaves(torch.device("cpu"), torch.float64)]
    for leaf in found:
        first, second = torch.zeros_like(leaf), torch.zeros_like(leaf)
        for step in range(1, STEPS + 1):
            g = gradient(leaf)
            first = BETAS[0] * first + (1 - BETAS[0]) * g
            second = BETAS[1] * second + (1 - BETAS[1]) * g**2
            update = (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
            leaf -= RATE * (update + decay * leaf)
    return found


def updated(name: str, device: torch.device, decay: float, skip_at: int | None = None) -> list[Tensor]:
    found = leaves(device)
    options = Optimizer(name=name, learning_rate=RATE, betas=BETAS, weight_decay=decay)
    optimizer = optim.build_optimizer(options, found)
    for step in range(STEPS + (skip_at is not None)):
        for leaf in found:
            leaf.grad = torch.full_like(leaf, float("nan")) if step == skip_at else gradient(leaf)
        optim.apply_update(optimizer, RATE, torch.tensor(step != skip_at, device=device))
    return found


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    def named(tensors: list[Tensor]) -> dict[str, Tensor]:
        return {str(i): tensor.detach().cpu() for i, tensor in enumerate(tensors)}

    return max(errors(named(found), named(expected)).values())


@pytest.mark.parametrize(("name", "decay"), [("adamw", 0.1), ("adam", 0.0)])
def test_fused_updates_are_those_of_the_textbook(device: torch.device, name: str, decay: float) -> None:
    assert off(updated(name, device, decay), textbook(decay)) < 1e-6


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_an_update_that_is_not_finite_leaves_no_trace(device: torch.device, name: str) -> None:
    plain, skipping = updated(name, device, 0.0), updated(name, device, 0.0, skip_at=2)
    assert all(torch.equal(a, b) for a, b in zip(skipping, plain, strict=True))


def test_eight_bit_moments_are_near(device: torch.device) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: not run")
    exact, before = textbook(0.1), leaves(torch.device("cpu"), torch.float64)
    found = updated("adamw8bit", device, 0.1)
    moved = float((exact[0] - before[0]).norm())
    assert float((found[0].detach().cpu() - exact[0]).norm()) < 0.1 * moved
