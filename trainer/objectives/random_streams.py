"""Random numbers as a pure function of (seed, step, purpose, row): law 2.

Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") in int64 torch operations, so the
integers are equal on every device. Counter = (block, row, step, purpose), key = seed. A row's numbers do not depend on
the rows drawn beside it, on world size, accumulation or resume.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_GAMMA_PROPOSALS = 24  # each is accepted with probability > 0.95


def philox(counter: Sequence[Tensor], key: tuple[int, int], rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (int64 tensors in [0, 2^32)) of broadcastable counter words and a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # A product wraps beyond 63 bits, but its 64 bits are right, and the mask undoes the sign of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def purpose_id(name: str) -> int:
    """Counter word of a purpose: the CRC-32 of its name."""
    return zlib.crc32(name.encode())


def _words(seed: int, step: int, purpose: int | Tensor, rows: Tensor, blocks: int) -> Tensor:
    """[n, blocks, 4] words in [0, 2^32); purpose: one for all rows or [n]."""
    if isinstance(purpose, Tensor):
        purpose = purpose[:, None]
    block = torch.arange(blocks, device=rows.device, dtype=torch.int64)[None, :]
    first = torch.zeros((rows.shape[0], blocks), dtype=torch.int64, device=rows.device)
    words = philox(
        (first + block, first + rows[:, None], first + step, first + purpose), (seed & _MASK, seed >> 32 & _MASK)
    )
    return torch.stack(words, dim=-1)


def uniforms(seed: int, step: int, purpose: int | Tensor, rows: Tensor, count: int) -> Tensor:
    """[n, count] float64 uniform in (0, 1); rows: [n] int64 global row ids."""
    words = _words(seed, step, purpose, rows, -(-count // 4)).flatten(1)[:, :count]
    return (words.double() + 0.5) * 2.0**-32


def normals(
    seed: int,
    step: int,
    purpose: int | Tensor,
    rows: Tensor,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[n, *shape] standard normal numbers by Box-Muller in float64, rounded to dtype."""
    rows = rows.to(device, non_blocking=True)
    if isinstance(purpose, Tensor):
        purpose = purpose.to(device, non_blocking=True)
    count = math.prod(shape)
    words = _words(seed, step, purpose, rows, -(-count // 4)).double().add_(0.5).mul_(2.0**-32)
    radius = words[..., :2].log().mul_(-2.0).sqrt_()
    angle = words[..., 2:] * (2.0 * math.pi)
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :count].reshape(-1, *shape).to(dtype)


def betas(seed: int, step: int, purpose: str, rows: Tensor, alpha: float, beta: float) -> Tensor:
    """[n] float64 Beta(alpha, beta) numbers; Beta(1, 1) is the first uniform of the stream."""
    if alpha == beta == 1.0:
        return uniforms(seed, step, purpose_id(purpose), rows, 1)[:, 0]
    first = _gammas(seed, step, f"{purpose}.alpha", rows, alpha)
    return first / (first + _gammas(seed, step, f"{purpose}.beta", rows, beta))


def _gammas(seed: int, step: int, purpose: str, rows: Tensor, shape: float) -> Tensor:
    """[n] Gamma(shape, 1) by Marsaglia and Tsang (2000): the first accepted of a fixed number of proposals."""
    boosted = shape + 1.0 if shape < 1.0 else shape
    d = boosted - 1.0 / 3.0
    normal = normals(seed, step, purpose_id(purpose), rows, (_GAMMA_PROPOSALS,), dtype=torch.float64)
    uniform = uniforms(seed, step, purpose_id(purpose + ".accept"), rows, _GAMMA_PROPOSALS + 1)
    v = (1.0 + normal / math.sqrt(9.0 * d)) ** 3
    accepted = (v > 0) & (uniform[:, 1:].log() < 0.5 * normal**2 + d - d * v + d * v.clamp_min(1e-300).log())
    chosen = d * v.gather(1, accepted.to(torch.int8).argmax(dim=1, keepdim=True))[:, 0]
    return chosen * uniform[:, 0] ** (1.0 / shape) if shape < 1.0 else chosen
