"""Optimizers against torch's reference loops; learning rates against values worked out by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema import Optimizer, Schedule
from tests.trainer.engines.sameness import assert_same
from trainer.engines.optim import MOMENTS, apply_update, build_optimizer, learning_rate

FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)
REFERENCE: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {}),
    "radam": (torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
}


def _parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (0,), (5,)]  # a rank may hold nothing of a parameter
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(index): tensor.detach() for index, tensor in enumerate(tensors)}


@pytest.mark.parametrize("name", list(REFERENCE))
def test_eight_updates_equal_torchs_single_tensor_loop(name: str) -> None:
    ours, theirs = _parameters(), copy.deepcopy(_parameters())
    kind, more = REFERENCE[name]
    reference = kind(theirs, lr=0.0, betas=(0.9, 0.99), eps=1e-8, foreach=False, **more)
    optimizer = build_optimizer(Optimizer(name=name, weight_decay=more.get("weight_decay", 0.0)), ours)
    for step in range(8):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.sin(mine.detach() * (step + 1))
            other.grad = torch.sin(other.detach() * (step + 1))
        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        reference.step()
        apply_update(optimizer, 0.01 * (step + 1), FINITE)
    assert_same(_numbered(ours), _numbered(theirs), 1e-12)


@pytest.mark.parametrize("name", list(REFERENCE))
def test_an_update_with_a_non_finite_norm_changes_nothing(name: str) -> None:
    parameters = _parameters()
    optimizer = build_optimizer(Optimizer(name=name), parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    apply_update(optimizer, 0.1, FINITE)
    before = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in parameters])
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    apply_update(optimizer, 0.1, NOT_FINITE)
    for parameter, (value, state) in zip(parameters, before, strict=True):
        assert torch.equal(parameter.detach(), value)
        assert all(torch.equal(optimizer.state[parameter][key], state[key]) for key in ("step", *MOMENTS))
    assert float(optimizer.state[parameters[0]]["step"]) == 1


def test_unknown_names_and_coupled_decay_are_refused() -> None:
    with pytest.raises(ValueError, match="choose adamw, adam, radam or adamw8bit"):
        build_optimizer(Optimizer(name="sgd"), _parameters())
    with pytest.raises(ValueError, match="use adamw"):
        build_optimizer(Optimizer(name="adam", weight_decay=0.1), _parameters())
    with pytest.raises(ValueError, match="choose constant, linear or cosine"):
        learning_rate(0, Schedule(name="poly"), 1.0, 10)


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, [2, 2, 2, 2, 2]),
        ("constant", 4, [0.5, 1, 1.5, 2, 2]),
        ("linear", 0, [2, 1.625, 1.25, 0.875, 0.5]),
        ("linear", 3, [2 / 3, 4 / 3, 2, 1.25, 0.5]),
        ("cosine", 0, [2, 2 - 1.5 * (1 - 0.5**0.5) / 2, 1.25, 2 - 1.5 * (1 + 0.5**0.5) / 2, 0.5]),
        ("cosine", 1, [2, 2 - 1.5 * (1 - 0.5**0.5) / 2, 1.25, 2 - 1.5 * (1 + 0.5**0.5) / 2, 0.5]),
    ],
)
def test_learning_rates_of_a_run_of_five_steps(name: str, warmup: int, expected: list[float]) -> None:
    schedule = Schedule(name=name, warmup_steps=warmup, final_ratio=0.25)
    assert [learning_rate(step, schedule, 2.0, 5) for step in range(5)] == pytest.approx(expected, rel=1e-12)


def test_after_its_last_step_a_run_stays_at_the_final_rate() -> None:
    assert learning_rate(99, Schedule(name="linear", final_ratio=0.25), 2.0, 5) == 0.5
    assert learning_rate(0, Schedule(name="cosine", final_ratio=0.25), 2.0, 1) == 2.0
