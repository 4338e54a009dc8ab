"""Every attention kernel against softmax attention in float64: output and gradients, with and without padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models import attention
from tests.models.varlen import reference
from trainer.health.attention import BARS, KERNELS, error

RUNS = {"cpu": {"math", "flash"}, "cuda": {"math", "flash", "efficient", "cudnn"}}
"""Kernels that must run; on a GPU flash knows no mask."""
WITH_MASK = {"cpu": {"math", "flash"}, "cuda": {"math", "efficient"}}
_SHAPE = (2, 4, 200, 128)  # heads as wide as Qwen-Image's
_PADS = 37


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value [B, H, S, D] and a mask that hides tokens in the middle of the second row: [text, padding,
    image], as Qwen-Image's sequences are."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(_SHAPE, generator=generator).to(device, dtype) for _ in range(3))
    mask = torch.ones(_SHAPE[0], 1, 1, _SHAPE[2], dtype=torch.bool, device=device)
    mask[1, ..., 20 : 20 + _PADS] = False
    return query, key, value, mask


def dtype_of(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_pytorch_is_exact_attention(device: torch.device, name: str, masked: bool) -> None:
    dtype = dtype_of(device)
    try:
        with sdpa_kernel(KERNELS[name]):
            off = error(scaled_dot_product_attention, inputs(device, dtype), masked)
    except RuntimeError as refusal:
        if name in (WITH_MASK if masked else RUNS)[device.type]:
            raise
        pytest.skip(f"{name} does not run here: {str(refusal).splitlines()[0]}")
    assert off <= BARS[dtype]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["flash", "flash3"])
def test_flash_attn_of_variable_length_is_exact_attention(device: torch.device, name: str, masked: bool) -> None:
    """On the CPU the packing alone is tried: a reference stands in for the kernel."""
    dtype, kernel = dtype_of(device), reference
    given = inputs(device, dtype)
    if device.type == "cuda":
        if not attention.installed(name):
            pytest.skip(f"{name} is not installed: not run")
        attention.choose(name, device, dtype, _SHAPE[-1])
        kernel = attention.load_kernel(name)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=device) if mask is None else mask[:, 0, 0]
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return attention.attend(q, k, v, attention.pack(real), kernel).transpose(1, 2)

    assert error(attend, given, masked, real_alone=True) <= BARS[dtype]
