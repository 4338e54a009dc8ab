"""Steps of every objective on small networks in float64, run as one rank or as several, and law 9's measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.trainer.engines.sameness import errors
from tests.trainer.objectives.toy import GoldenNet, ToyNets, VectorConditions
from trainer.objectives.objective import LossTerms, Roles, Rows, Targets
from trainer.objectives.passes import Runner, run_packed
from trainer.objectives.roles import assign

SHAPE = (1, 2, 3)
CONDITION = 3
EQUAL_ROLES = {"e2e": 1, "mul": 1, "any": 1, "adv": 1}
PUBLISHED: dict[str, Any] = {"roles": EQUAL_ROLES, "time_distribution": "beta"}
"""Where the published step differs from the default recipe."""
TEACHERS = ("online", "ema", "ema shared", "frozen", "frozen shared")
"""Teacher modes: a word, and "shared" where the teacher's rows run in the online module (LoRA)."""


def golden_net(seed: int, shape: tuple[int, ...] = SHAPE, hidden: int = 16) -> GoldenNet:
    elements = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    sizes = ((hidden, elements + 5 + CONDITION), (hidden,), (elements, hidden), (elements,))
    return GoldenNet(*(0.5 * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes))


def toy_nets(mode: str) -> ToyNets:
    teacher = None if mode == "online" else golden_net(2)
    return ToyNets(golden_net(1), teacher, shares_module=mode == "online" or mode.endswith("shared"))


@dataclass(frozen=True)
class Samples:
    """Latents and conditions of the global batch."""

    x: Tensor
    cond: VectorConditions
    null: VectorConditions

    def __getitem__(self, rows: slice) -> Samples:
        return Samples(self.x[rows], self.cond[rows], self.null[rows])


def samples(rows: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, *shape), generator=generator, dtype=torch.float64)
    cond, null = torch.randn((2, rows, CONDITION), generator=generator, dtype=torch.float64)
    return Samples(x, VectorConditions(cond), VectorConditions(null))


@dataclass
class Step:
    """What one step gave: the targets of every rank, its calls, the summed loss, terms and gradients."""

    targets: list[Targets] = field(default_factory=list)
    calls: list[list[tuple[int, int, bool]]] = field(default_factory=list)
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    terms: dict[str, Tensor] = field(default_factory=dict)
    tally: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add(self, part: LossTerms) -> None:
        self.loss = self.loss + part.total.detach()
        for name, value in part.terms.items():
            self.terms[name] = self.terms.get(name, torch.zeros_like(value)) + value
        self.add_tally(part.tally)

    def add_tally(self, tally: Mapping[str, Tensor]) -> None:
        for name, value in tally.items():
            self.tally[name] = self.tally.get(name, torch.zeros_like(value)) + value


def role_rows(objective: Any, step: int, global_batch: int, rank: int = 0, world_size: int = 1) -> Roles:
    published = objective.published_partition
    return assign(objective.role_weights, step, global_batch, rank, world_size, published)


def run_step(
    objective: Any,
    nets: ToyNets,
    batch: Samples,
    step: int = 5,
    world_size: int = 1,
    micro_batch_size: int | None = None,
    chunk_rows: int | None = None,
    run: Runner = run_packed,
    seed: int = 3,
) -> Step:
    """The step as every rank would make it, one rank after the other, losses and gradients summed over all."""
    done, per_rank = Step(), len(batch.x) // world_size
    nets.online.zero_grad()
    for rank in range(world_size):
        first = len(nets.calls)
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        roles = role_rows(objective, step, len(batch.x), rank, world_size)
        rows = Rows(seed, step, torch.arange(len(batch.x))[mine], roles)
        draws = objective.draw(rows, tuple(batch.x.shape[1:]), "cpu", torch.float64)
        local = batch[mine]
        targets = objective.targets(nets, local.x, local.cond, local.null, roles, draws, chunk_rows, run=run)
        done.targets.append(targets)
        done.add_tally(targets.tally)
        for begin in range(0, len(targets), micro_batch_size or len(targets)):
            part = objective.loss(nets, targets[begin : begin + (micro_batch_size or len(targets))])
            part.total.backward()
            done.add(part)
        done.calls.append(nets.calls[first:])
    done.gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in nets.online.named_parameters()
    }
    return done


def law9(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest error of a tensor by law 9; where all expected numbers are 0, the largest number."""
    if not any(value.any() for value in expected.values()):
        assert actual.keys() == expected.keys()
        largest = (value.abs().max().nan_to_num(nan=torch.inf) for value in actual.values() if value.numel())
        return max(map(float, largest), default=0.0)
    return max(errors(actual, expected).values())


def target_tensors(targets: Targets) -> dict[str, Tensor]:
    """The floating-point fields by name, those of the conditions too."""
    values: Iterable[tuple[str, Any]] = vars(targets).items()
    found = {name: value for name, value in values if isinstance(value, Tensor) and value.is_floating_point()}
    return found | {"cond": targets.cond.vectors}


def assert_same_step(actual: Step, expected: Step, bound: float = 1e-12) -> None:
    """Loss, terms, diagnostics and gradients by law 9; the targets too where both ran on equally many ranks."""
    assert law9({"loss": actual.loss}, {"loss": expected.loss}) <= bound
    assert law9(actual.terms, expected.terms) <= bound
    assert law9(actual.tally, expected.tally) <= bound
    assert law9(actual.gradients, expected.gradients) <= bound
    if len(actual.targets) == len(expected.targets):
        for mine, other in zip(actual.targets, expected.targets, strict=True):
            assert law9(target_tensors(mine), target_tensors(other)) <= bound


class Recording(ToyNets):
    """Keeps the inputs and outputs of every call."""

    def __init__(self, online: torch.nn.Module, teacher: torch.nn.Module | None = None) -> None:
        super().__init__(online, teacher)
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        out = super().velocity(x_t, t, r, cond, weights)
        self.seen.append((x_t, t, r, out))
        return out


def roles_and_draws(objective: Any, batch: Samples, step: int = 0) -> tuple[Roles, Any]:
    roles = role_rows(objective, step, len(batch.x))
    rows = Rows(7, step, torch.arange(len(batch.x)), roles)
    return roles, objective.draw(rows, tuple(batch.x.shape[1:]), "cpu", torch.float64)


def make(objective: Any, nets: Any, batch: Samples, step: int = 0) -> tuple[Targets, LossTerms, Roles, Any]:
    roles, draws = roles_and_draws(objective, batch, step)
    targets = objective.targets(nets, batch.x, batch.cond, batch.null, roles, draws)
    return targets, objective.loss(nets, targets), roles, draws


def present(values: Tensor | None) -> Tensor:
    """An optional field of the targets that must be there."""
    assert values is not None
    return values


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
