"""The float64 twins of diffusers' float32 islands."""

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from models.precision import RMSNormKeepingFloat64, rotate


def test_norm_is_float64_for_float64_and_diffusers_otherwise() -> None:
    base, ours = RMSNorm(16, eps=1e-6), RMSNormKeepingFloat64(16, eps=1e-6)
    x = torch.randn(4, 16, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(ours(x.to(dtype)), base(x.to(dtype)))
    exact = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(ours.double()(x), exact, rtol=1e-14, atol=0)
    assert (base.double()(x) - exact).abs().max() > 1e-10


def test_rotation_is_float64_and_agrees_with_diffusers() -> None:
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64)
    frequencies = torch.polar(torch.ones(5, 8), torch.rand(5, 8) * 6)
    rotated = rotate(x, frequencies)
    assert rotated.dtype == torch.float64
    theirs = apply_rotary_emb_qwen(x.float(), frequencies, use_real=False)
    torch.testing.assert_close(rotated.float(), theirs, rtol=0, atol=1e-6)
    back = rotate(rotated, frequencies.to(torch.complex128).reciprocal())
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
