"""Which term each row of a step serves (law 1): from weights, step and row position, never from data or rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.objectives.objective import Roles


def pattern(weights: Mapping[str, int]) -> list[int]:
    """One period of role indices; every role is spread evenly (smooth weighted round robin).

    The period is the sum of the weights. Raises ValueError for negative, fractional or all-zero weights.
    """
    values = list(weights.values())
    if any(not isinstance(value, int) or value < 0 for value in values) or sum(values) == 0:
        raise ValueError(
            f"role weights must be integers >= 0 and not all zero, got {dict(weights)}; "
            "write for instance {e2e: 1, mul: 1, any: 1, adv: 1}"
        )
    credit, period = [0] * len(values), sum(values)
    order = []
    for _ in range(period):
        credit = [c + value for c, value in zip(credit, values, strict=True)]
        chosen = max(range(len(values)), key=lambda i: credit[i])
        credit[chosen] -= period
        order.append(chosen)
    return order


def published_partition(weights: Mapping[str, int], rows: int) -> list[int]:
    """Roles by position as in the published code: consecutive blocks of round_half_even(rows * w / sum w) rows, the
    last role takes what remains (method 2.2). It may leave the last role without rows (6 rows: 2, 2, 2, 0)."""
    names, total = list(weights), sum(weights.values())
    order: list[int] = []
    for i, name in enumerate(names[:-1]):
        order += [i] * round(rows * weights[name] / total)
    return (order + [len(names) - 1] * (rows - len(order)))[:rows]


def assign(
    weights: Mapping[str, int],
    step: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    published: bool = False,
) -> Roles:
    """Roles of the rows [rank * n, (rank + 1) * n) of a step, n = global_batch_size / world_size."""
    if global_batch_size % world_size:
        raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of {world_size} ranks")
    names = tuple(name for name, value in weights.items() if value != 0 or published)
    rows = torch.arange(global_batch_size)
    if published:
        roles = torch.tensor(published_partition(weights, global_batch_size))
    else:
        period = torch.tensor(pattern({name: weights[name] for name in names} or weights))
        roles = period[(rows + step) % len(period)]
    by_rank = roles.reshape(world_size, -1)
    return Roles(names, by_rank[rank], _count(by_rank, len(names)))


def _count(by_rank: Tensor, roles: int) -> Tensor:
    return torch.nn.functional.one_hot(by_rank, roles).sum(dim=1)
