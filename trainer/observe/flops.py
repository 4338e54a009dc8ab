"""What a step costs in network rows and floating-point operations, by role, without running a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.backbone import Backbone, Conditioning
from trainer.objectives.losses import rows_of_roles
from trainer.objectives.objective import Nets, Objective, Rows
from trainer.objectives.passes import Call, Task, run_unpacked


@dataclass(frozen=True)
class RoleRows:
    """Rows that the network evaluates without and with gradient; every graded row passes forward and backward once."""

    no_grad: int = 0
    graded: int = 0


@dataclass(frozen=True)
class PassFlops:
    """Model FLOPs of a velocity call: recomputed activations do not count."""

    backbone: Backbone

    def __call__(self, x_t: Tensor, cond: Conditioning, graded: bool) -> int:
        """x_t: [B, C, H, W]; cond: its rows of conditions; graded: a backward pass follows."""
        size = len(x_t), self.backbone.tokens(x_t.shape), cond.embeds.shape[1]
        return self.backbone.flops(*size) + (self.backbone.backward_flops(*size) if graded else 0)


def rows_by_role(objective: Objective, rows: Rows) -> dict[str, RoleRows]:
    """Rows of the step that `rows` identifies, exact for any objective, for this rank's part of the batch.

    The objective itself is run on latents of one element with a network that costs nothing. Rows that its times leave
    out are left out here; a dummy row belongs to no role. No-grad rows go to the role of their sample, graded rows to
    the role that their error is reported under: `twinflow_full` has sample role `all` and a graded role per term.
    """
    no_grad, samples = Counter[str](), len(rows.ids)

    def count(tasks: Sequence[Task], nets: Nets, conditions: Any, chunk_rows: int | None = None) -> list[Any]:
        return run_unpacked([_counted(task, seen) for task in tasks], nets, conditions, chunk_rows)

    def seen(call: Call) -> None:
        # Conditions of the step are followed by their null conditions, row for row.
        roles = rows.roles.local[call.cond % samples].tolist()
        no_grad.update(rows.roles.names[role] for role in roles)

    draws = objective.draw(rows, (1,), "cpu", torch.float32)
    cond = _NoConditions(samples)
    targets = objective.targets(
        _FreeNets(), torch.zeros(samples, 1), cond, cond, rows.roles, draws, chunk_rows=None, run=count
    )
    graded = rows_of_roles(targets)
    names = dict.fromkeys([*rows.roles.names, *graded])
    return {name: RoleRows(no_grad[name], graded.get(name, 0)) for name in names}


def step_flops(
    objective: Objective,
    backbone: Backbone,
    rows: Rows,
    tokens: int,
    text_tokens: int,
    activation_checkpointing: bool,
) -> dict[str, int]:
    """FLOPs of a step by role: no-grad rows forward, graded rows forward and backward, with recomputed blocks.

    tokens, text_tokens: image tokens and padded text tokens of a row. The sum is the step of this rank's rows.
    """
    size = 1, tokens, text_tokens
    forward = backbone.flops(*size)
    graded = forward + backbone.backward_flops(*size)
    if activation_checkpointing:
        graded += backbone.recompute_flops(*size)
    counted = rows_by_role(objective, rows)
    return {name: of_role.no_grad * forward + of_role.graded * graded for name, of_role in counted.items()}
