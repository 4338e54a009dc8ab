"""Attention is compared with float64; a wrong kernel does not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.health import attention
from trainer.health.findings import GREEN, RED, YELLOW

CPU = torch.device("cpu")
BAR = attention.BARS[torch.float32]


def test_the_kernels_of_this_machine_are_right() -> None:
    found = list(attention.attention(CPU))
    assert found[0].level == GREEN and "math+mask" in found[0].value


def _forgets_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return attention._plain(q, k, v, None)


def _forgets_a_gradient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return attention._plain(q, k, v, mask) + 0 * (k - k.detach()) + attention._plain(q, k.detach(), v, mask) * 1e-3


@pytest.mark.parametrize("attend", [_forgets_the_mask, _forgets_a_gradient])
def test_a_wrong_kernel_misses_the_bar(attend: attention.Attend) -> None:
    inputs = attention._inputs(CPU, torch.float32)
    assert attention.error(attention._plain, inputs, masked=True) < BAR
    assert attention.error(attend, inputs, masked=True) > 10 * BAR


def test_what_pytorch_chooses_being_wrong_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "scaled_dot_product_attention", _forgets_the_mask)
    assert next(attention.attention(CPU)).level == RED


def test_a_wrong_kernel_that_is_not_chosen_is_yellow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_by_kernel", lambda inputs: (["math"], ["flash"]))
    found = next(attention.attention(CPU))
    assert found.level == YELLOW and "do not choose flash" in found.remedy


def test_a_result_that_is_not_a_number_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda q, k, v, mask: q * k * v * float("nan"))
    assert next(attention.attention(CPU)).level == RED
