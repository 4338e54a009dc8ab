"""The linear transport x_t = |t| z + (1 - |t|) x and the read-outs of a velocity (method 1). Times are [B]."""

from __future__ import annotations

from torch import Tensor


def rowwise(values: Tensor, like: Tensor) -> Tensor:
    """[B] on the device and in the dtype of `like`, shaped to broadcast over its rows."""
    return values.to(like.device, like.dtype, non_blocking=True).reshape(-1, *(1,) * (like.dim() - 1))


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = |t| z + (1 - |t|) x; a negative time mixes like a positive one."""
    a = rowwise(t.abs(), x)
    return a * z + (1 - a) * x


def clean_estimate(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x_hat = x_t - |t| F (R1)."""
    return x_t - rowwise(t.abs(), x_t) * velocity


def noise_estimate(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """z_hat = x_t + (1 - |t|) F (R1)."""
    return x_t + (1 - rowwise(t.abs(), x_t)) * velocity


def jump(x_t: Tensor, velocity: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s = x_t - (t - s) F, the Euler step that mixing both read-outs amounts to (R2)."""
    return x_t - rowwise(t - s, x_t) * velocity
