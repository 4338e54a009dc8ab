"""Attention is compared with float64; a wrong kernel does not pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import attention as kernels
from tests.models.varlen import reference
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


def _last_keys_dropped(q: Tensor, k: Tensor, v: Tensor, *lengths: object, **options: object) -> Tensor:
    """What diffusers' own flash_varlen does to a row with padding in its middle."""
    return reference(q, k, v.roll(1, 0), *lengths, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kernel", "level"), [(reference, GREEN), (_last_keys_dropped, RED)])
def test_flash_attention_is_examined_as_backbones_call_it(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor], level: str
) -> None:
    monkeypatch.setattr(kernels, "installed", lambda name: name == "flash")
    monkeypatch.setattr(kernels, "choose", lambda *asked: kernels.Choice("flash", "for the test"))
    monkeypatch.setattr(kernels, "load_kernel", lambda name: kernel)
    inputs = attention._inputs(CPU, torch.float32)
    assert list(attention._flash("flash", inputs)) == []  # nothing it could run on
    monkeypatch.setattr(attention, "_runs_flash", lambda device: True)
    found = list(attention._flash("flash", inputs))
    assert [finding.level for finding in found] == [level]
    assert found[0].check == "model.attention=flash"


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
