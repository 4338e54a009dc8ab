"""The contract of an objective: draw every random number, make targets without gradient, regress on them.

Objectives see tensors and `nets` only: no device, rank, configuration, EMA or autocast. All times t, r are [B].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.objectives.passes import Runner

ONLINE, TEACHER = 0, 1


class Conditions(Protocol):
    """Rows of conditions (models.backbone.Conditioning): indexed by rows, concatenated row-wise."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any) -> Self: ...
    def cat(self, *others: Self) -> Self: ...


class Nets(Protocol):
    """The networks of a step.

    shares_module: teacher rows run in the same module as online rows (online teacher, LoRA), so one call serves both.
    velocity: F(x_t, t, r, cond); weights [B] on the CPU says per row ONLINE or TEACHER; None means all ONLINE. Where
    the modules are separate a call holds rows of one kind only. Gradients follow torch's grad mode.
    """

    shares_module: bool

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Roles:
    """Which term every row of a step serves; a pure function of configuration, step and row position (law 1).

    local: [B] index into `names` of this rank's rows, on the CPU; counts: [ranks, len(names)] rows of each role on
    every rank, so that all ranks agree on the passes of the step.
    """

    names: tuple[str, ...]
    local: Tensor
    counts: Tensor

    def rows(self, *names: str) -> Tensor:
        """This rank's rows with one of these roles, ascending [n] int64."""
        wanted = torch.tensor([name in names for name in self.names])
        return torch.nonzero(wanted[self.local]).flatten()

    def total(self, *names: str) -> int:
        """Rows with one of these roles in the whole step."""
        return int(self.counts[:, [i for i, name in enumerate(self.names) if name in names]].sum())

    def most(self, *names: str) -> int:
        """The largest number of rows with one of these roles on any rank."""
        return int(self.counts[:, [i for i, name in enumerate(self.names) if name in names]].sum(dim=1).max())


@dataclass(frozen=True)
class Rows:
    """Identity of the rows of a step, which keys their random numbers. ids: [B] int64 row in the global batch."""

    seed: int
    step: int
    ids: Tensor
    roles: Roles


@dataclass(frozen=True)
class Targets:
    """Plain regression data of R graded rows; everything the graded pass needs.

    sample: [R] index into the window's samples; x_t, velocity: [R, ...]; t, r: [R]; cond: R rows of conditions.
    Row target: `velocity`, or where `consistent` is true F - clip(q) with the residual
    q = coefficient F - integral - velocity (method B1). gap: clipped F_fake - F_real of the rectification (method B2).
    weight, gap_weight: [R], already divided by the global counts. groups: [R, K] indicator of the K `group_names`
    (roles, time bins) that the row's error is reported under.
    """

    sample: Tensor
    x_t: Tensor
    t: Tensor
    r: Tensor
    cond: Any
    velocity: Tensor
    weight: Tensor
    groups: Tensor
    group_names: tuple[str, ...]
    consistent: Tensor | None = None
    coefficient: Tensor | None = None
    integral: Tensor | None = None
    gap: Tensor | None = None
    gap_weight: Tensor | None = None
    tally: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.x_t.shape[0]

    def __getitem__(self, rows: slice) -> Targets:
        """A contiguous part of the rows; the tally of the no-grad passes stays behind."""
        parts: dict[str, Any] = {"tally": {}}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("group_names", "tally") and value is not None:
                parts[f.name] = value[rows]
        return replace(self, **parts)


@dataclass(frozen=True)
class LossTerms:
    """total: scalar to differentiate, the part of these rows in the step's loss. terms: its detached parts by name.
    tally: name -> [2] (sum, count), added over micro-batches and ranks before the mean is taken."""

    total: Tensor
    terms: Mapping[str, Tensor]
    tally: Mapping[str, Tensor]


class Objective(Protocol):
    """A frozen dataclass whose fields are the hyper-parameters; pure and deterministic given the draws."""

    @property
    def role_weights(self) -> Mapping[str, int]:
        """Integer weight of every role; the sum is the period of the pattern."""

    @property
    def rows_per_sample(self) -> int:
        """Graded rows that a sample yields."""

    @property
    def teacher(self) -> str:
        """online | ema | frozen."""

    @property
    def effective_guidance(self) -> float:
        """Guidance scale that the targets aim at; 1 is none."""

    @property
    def published_partition(self) -> bool:
        """Whether roles stand in blocks by position instead of evenly spread."""

    @property
    def needs_null(self) -> bool:
        """Whether targets() evaluates the null condition."""

    def draw(self, rows: Rows, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Any: ...

    def targets(
        self,
        nets: Nets,
        x: Tensor,
        cond: Any,
        null: Any,
        roles: Roles,
        draws: Any,
        chunk_rows: int | None = None,
        run: Runner = ...,
    ) -> Targets:
        """All no-grad passes go through `run` (default run_packed), so that they can be counted without a network."""

    def loss(self, nets: Nets, targets: Targets) -> LossTerms: ...
