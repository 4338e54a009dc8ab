"""flash_attn_varlen_func by plain matrix products: a custom operator with a backward, as flash-attn's is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def _each(bounds: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """The parts of a sequence of every tensor [T, H, D], heads first, in float64."""
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        yield [tensor[begin:end].double().transpose(0, 1) for tensor in tensors]


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.transpose(0, 1) for part in parts]).to(like.dtype)


@torch.library.custom_op("twinflow_tests::varlen", mutates_args=())
def _operator(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
    parts = [(q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in _each(bounds, query, key, value)]
    return _joined(parts, query)


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("twinflow_tests::varlen_backward", mutates_args=())
def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> list[Tensor]:
    parts: list[list[Tensor]] = []
    for g, q, k, v in _each(bounds, grad, query, key, value):
        scale = q.shape[-1] ** -0.5
        shares = (scale * q @ k.mT).softmax(-1)
        scores = shares * (g @ v.mT - (shares * (g @ v.mT)).sum(-1, keepdim=True)) * scale
        parts.append([scores @ k, scores.mT @ q, shares.mT @ g])
    return [_joined(list(of_one), query) for of_one in zip(*parts, strict=True)]


@_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (query, key, value)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_backward(grad, *ctx.saved_tensors), None)


_operator.register_autograd(_gradients, setup_context=_setup)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """flash_attn_varlen_func by plain matrix products."""
    assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32 and not causal and softmax_scale is None
    assert type(max_seqlen_q) is int and max_seqlen_q == max_seqlen_k
    out: Tensor = _operator(q, k, v, cu_seqlens_q)
    return out
