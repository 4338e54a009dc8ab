"""What a step costs in network rows and floating-point operations, by role, without running a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.backbone import Backbone, Conditioning
from trainer.engines.adapted import adapters_of
from trainer.objectives.losses import rows_of_roles
from trainer.objectives.objective import Nets, Objective, Rows
from trainer.objectives.passes import Task


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
        tokens = sum(self.backbone.tokens(image.shape) for image in (x_t, *cond.references))
        size = len(x_t), tokens, cond.embeds.shape[1]
        return self.backbone.flops(*size) + (_backward(self.backbone, *size) if graded else 0)


def _backward(backbone: Backbone, batch: int, tokens: int, text_tokens: int) -> int:
    """Under adapters frozen layers have gradients of their inputs alone: as much as the forward pass. That leaves out
    the second half of attention's backward pass and the adapters themselves, 7 % of Qwen-Image at 512 x 512."""
    size = batch, tokens, text_tokens
    return backbone.flops(*size) if adapters_of(backbone) is not None else backbone.backward_flops(*size)


def rows_by_role(objective: Objective, rows: Rows) -> dict[str, RoleRows]:
    """Rows of the step that `rows` identifies, exact for any objective, for this rank's part of the batch.

    The objective itself makes targets of latents of one element, its passes answered by zeros: rows that its times
    leave out are left out here, and there are no dummy rows. No-grad rows go to the role of their sample, graded rows to
    the role that their error is reported under: `twinflow_full` has sample role `all` and a graded role per term.
    """
    no_grad, samples = Counter[str](), len(rows.ids)

    def run(tasks: Sequence[Task], nets: Nets, conditions: Any, chunk_rows: int | None = None) -> list[Any]:
        return [drive(task) for task in tasks]

    def drive(task: Task) -> Any:
        try:
            calls = next(task)
            while True:
                for call in calls:
                    # The null conditions follow the conditions, row for row.
                    roles = rows.roles.local[call.cond % samples].tolist()
                    no_grad.update(rows.roles.names[role] for role in roles)
                calls = task.send([torch.zeros_like(call.x_t) for call in calls])
        except StopIteration as stop:
            return stop.value

    draws = objective.draw(rows, (1,), "cpu", torch.float32)
    cond, x = _NoConditions(samples), torch.zeros(samples, 1)
    targets = objective.targets(_NoNets(), x, cond, cond, rows.roles, draws, chunk_rows=None, run=run)
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
    graded = forward + _backward(backbone, *size)
    if activation_checkpointing:
        graded += backbone.recompute_flops(*size)
    counted = rows_by_role(objective, rows)
    return {name: of_role.no_grad * forward + of_role.graded * graded for name, of_role in counted.items()}


class _NoNets:
    shares_module = True

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        raise AssertionError("targets() made a pass outside `run`")


@dataclass(frozen=True)
class _NoConditions:
    rows: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: Any) -> _NoConditions:
        return self

    def cat(self, *others: _NoConditions) -> _NoConditions:
        return self
