"""Whether attention computes what it should here: every kernel of PyTorch and flash-attn against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from models import attention as kernels
from trainer.health.findings import GREEN, RED, YELLOW, Finding

BARS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error of outputs and gradients, relative to the largest value."""
KERNELS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
_SHAPE = (2, 4, 96, 64)
"""Rows, heads, tokens, width of a head."""
_PADS = 20

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attention(device: torch.device) -> Iterator[Finding]:
    """Red where what PyTorch chooses by itself is wrong; kernels that are not there are named and change nothing."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = _inputs(device, dtype)
    chosen = [error(scaled_dot_product_attention, inputs, masked) for masked in (False, True)]
    usable, wrong = _by_kernel(inputs)
    value = f"{str(dtype).removeprefix('torch.')}: error {max(chosen):.1e}; usable: {', '.join(usable) or 'none'}"
    remedy = "install another PyTorch build or driver; until then runs on this machine compute wrong attention"
    if not max(chosen) <= BARS[dtype]:
        yield Finding("attention", RED, value, remedy)
    elif wrong:
        names = ", ".join(wrong)
        yield Finding("attention", YELLOW, f"{value}; wrong: {names}", f"do not choose {names} on this machine")
    else:
        yield Finding("attention", GREEN, value)
    for name in ("flash", "flash3"):
        yield from _flash(name, inputs)


def error(
    attend: Attend, inputs: tuple[Tensor, Tensor, Tensor, Tensor], masked: bool, real_alone: bool = False
) -> float:
    """Largest relative error of the output and the three gradients against softmax attention in float64.

    real_alone: what comes out at masked places is nobody's and does not count.
    """
    query, key, value, mask = inputs
    given = mask if masked else None
    kept = mask.transpose(-1, -2) if masked and real_alone else torch.ones_like(mask[..., :1])
    found = _with_gradients(lambda q, k, v: attend(q, k, v, given) * kept, query, key, value)
    exact = _with_gradients(lambda q, k, v: _plain(q, k, v, given) * kept, query.double(), key.double(), value.double())
    pairs = zip(found, exact, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _by_kernel(inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[list[str], list[str]]:
    """Kernels that run here, with "+mask" where they take one; those that run and are wrong."""
    usable: list[str] = []
    wrong: list[str] = []
    for name, backend in KERNELS.items():
        for masked in (False, True):
            try:
                with sdpa_kernel(backend):
                    off = error(scaled_dot_product_attention, inputs, masked)
            except RuntimeError:  # PyTorch's word for: not for these inputs, or not in this build
                continue
            label = f"{name}+mask" if masked else name
            (usable if off <= BARS[inputs[0].dtype] else wrong).append(label)
    return usable, wrong


def _flash(name: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Iterator[Finding]:
    """flash-attn as backbones call it, with padding; silent where it is not installed or nothing it could run on."""
    query = inputs[0]
    if not _runs_flash(query.device) or not kernels.installed(name):
        return
    label, instead = f"model.attention={name}", "until then set model.attention=native"
    try:
        kernels.choose(name, query.device, query.dtype, query.shape[-1])
    except ValueError as refusal:
        yield Finding(label, YELLOW, f"installed, but: {refusal}", "model.attention=auto does without it")
        return
    kernel = kernels.load_kernel(name)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        real = torch.ones_like(inputs[3])[:, 0, 0] if mask is None else mask[:, 0, 0]
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return kernels.attend(q, k, v, kernels.pack(real), kernel).transpose(1, 2)

    try:
        off = max(error(attend, inputs, masked, real_alone=True) for masked in (False, True))
    except RuntimeError as failure:
        yield Finding(label, RED, f"fails: {str(failure).splitlines()[0]}", f"build it for this PyTorch; {instead}")
        return
    good = off <= BARS[query.dtype]
    yield Finding(label, GREEN if good else RED, f"error {off:.1e}", "" if good else f"build it anew; {instead}")


def _runs_flash(device: torch.device) -> bool:
    return device.type == "cuda"


def _inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, and a mask that hides the last tokens of the second row. Equal on all machines."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(_SHAPE, generator=generator).to(device, dtype) for _ in range(3))
    mask = torch.ones(_SHAPE[0], 1, 1, _SHAPE[2], dtype=torch.bool, device=device)
    mask[1, ..., -_PADS:] = False
    return query, key, value, mask


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value


def _with_gradients(function: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = function(*leaves)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
    return [out.detach(), *gradients]
