"""Velocity calls and parameter gathers of a step on sharded ranks, beside the formula of law 1 (for passes.py)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.schema import Ema, Optimizer
from tests.trainer.engines.toy import ToyBackbone
from tests.trainer.objectives.cases import PUBLISHED, role_rows, samples
from tests.trainer.objectives.toy import VectorConditions
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.objectives.objective import TEACHER, Nets, Roles, Rows
from trainer.objectives.passes import Runner, run_packed, run_unpacked
from trainer.objectives.twinflow import TwinFlow

RANKS = 2
BLOCKS = 4
SHAPE = (1, 2, 2)


@dataclass(frozen=True)
class Setting:
    teacher: str
    order: int
    accumulation: int
    micro_batch_size: int
    published: bool = True
    """The published roles and times; otherwise those of the default recipe."""

    @property
    def objective(self) -> TwinFlow:
        recipe = PUBLISHED if self.published else {}
        return TwinFlow(order=self.order, teacher=self.teacher, enhanced_ratio=0.5, **recipe)

    @property
    def period(self) -> int:
        """Rows after which the roles repeat."""
        return sum(self.objective.role_weights.values())

    @property
    def rows(self) -> int:
        """Samples of one rank in a step."""
        return self.accumulation * self.micro_batch_size

    @property
    def published_gathers(self) -> int:
        """The published code, per micro-batch: 4 + N + 2g + i passes and a backward pass, each gathers once."""
        return (4 + self.order + 2 + 1) * self.accumulation


def formula(setting: Setting, roles: Roles) -> tuple[int, int]:
    """Law 1: no-grad passes of the online (or shared) module, and of a separate teacher, in a step with these roles."""
    data, guided = roles.total("e2e", "mul", "any") > 0, int(roles.total("mul", "any") > 0)
    nodes = setting.order if data else 0
    rectified, adv = 2 * int(roles.total("e2e") > 0), int(roles.total("adv") > 0)
    if setting.teacher == "ema":
        return max(rectified, adv), guided + nodes
    if setting.teacher == "frozen":
        return max(nodes, rectified, adv), guided
    return max(guided + nodes, rectified, adv), 0


class CountedNets:
    """Passes calls on with the conditions as a tensor, and counts them: (by a separate teacher, graded, rows)."""

    def __init__(self, nets: Nets) -> None:
        self._nets, self.shares_module = nets, nets.shares_module
        self.calls: list[tuple[bool, bool, int]] = []

    def velocity(
        self, x_t: Tensor, t: Tensor, r: Tensor, cond: VectorConditions, weights: Tensor | None = None
    ) -> Tensor:
        taught = not self.shares_module and weights is not None and int(weights[0]) == TEACHER
        self.calls.append((taught, torch.is_grad_enabled(), len(t)))
        return self._nets.velocity(x_t, t, r, cond.vectors, weights)


@dataclass
class Counts:
    """Of one step on one rank. gathers: per size of the gathered unit [elements]."""

    online: int
    teacher: int
    graded: int
    expected: tuple[int, int]
    gathers: dict[int, int]
    kinds: list[tuple[bool, bool]]
    loss: float
    grad_norm: float

    @property
    def elements(self) -> int:
        return sum(size * count for size, count in self.gathers.items())


@dataclass
class Measured:
    """Steps of one setting under packed passes that reshard, packed passes that keep parameters, and unpacked ones."""

    setting: Setting
    resharding: list[Counts] = field(default_factory=list)
    keeping: list[Counts] = field(default_factory=list)
    unpacked: list[Counts] = field(default_factory=list)


def measure(settings: Sequence[Setting], steps: int) -> tuple[list[Measured], int]:
    """On every rank: all settings, and the elements of a gathered block."""
    found = {setting: Measured(setting) for setting in settings}
    block_size = 0
    for teacher, keep_gathered in itertools.product(dict.fromkeys(s.teacher for s in settings), (False, True)):
        engine, block_size = build(teacher, keep_gathered)
        for setting in (s for s in settings if s.teacher == teacher):
            for step in range(steps):
                counts = one_step(engine, setting, step, run_packed)
                if keep_gathered:
                    found[setting].keeping.append(counts)
                else:
                    found[setting].resharding.append(counts)
                    found[setting].unpacked.append(one_step(engine, setting, step, run_unpacked))
    return list(found.values()), block_size


def build(teacher: str, keep_gathered: bool) -> tuple[FSDP2, int]:
    """An engine in float64 whose online parameters differ from the teacher's, and the elements of a gathered block."""
    backbone = ToyBackbone(blocks=BLOCKS, dtype=torch.float64)
    block = backbone.blocks[0]
    # Every rank's shard has ceil(rows / ranks) rows, so a gathered unit is a little larger than its parameters.
    size = sum(-(-len(p) // RANKS) * RANKS * p[0].numel() for p in block.parameters())
    options = FSDP2Options(activation_checkpointing=True, keep_gathered=keep_gathered)
    engine = FSDP2(options, backbone, Optimizer(), Ema(decay=0.9), teacher)
    for part in engine.parts():
        if part.group == "parameter":
            part.local.mul_(1.1)
    return engine, size


def one_step(engine: FSDP2, setting: Setting, step: int, run: Runner) -> Counts:
    """A whole step at learning rate 0, so that every step starts from the same parameters."""
    rank = torch.distributed.get_rank()
    objective, nets = setting.objective, CountedNets(engine.nets)
    roles = role_rows(objective, step, RANKS * setting.rows, rank, RANKS)
    mine = slice(rank * setting.rows, (rank + 1) * setting.rows)
    ids, local = torch.arange(RANKS * setting.rows)[mine], samples(RANKS * setting.rows, shape=SHAPE)[mine]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as trace:
        draws = objective.draw(Rows(0, step, ids, roles), SHAPE, "cpu", torch.float64)
        targets = objective.targets(nets, local.x, local.cond, local.null, roles, draws, run=run)
        loss = torch.zeros((), dtype=torch.float64)
        for begin in range(0, setting.rows, setting.micro_batch_size):
            part = objective.loss(nets, targets[begin : begin + setting.micro_batch_size])
            engine.backward(part.total)
            loss += part.total.detach()
        grad_norm = engine.step(0.0)
    torch.distributed.all_reduce(loss)
    kinds = [(taught, graded) for taught, graded, _ in nets.calls]
    return Counts(
        online=kinds.count((False, False)),
        teacher=kinds.count((True, False)),
        graded=kinds.count((False, True)),
        expected=formula(setting, roles),
        gathers=gathered_sizes(trace),
        kinds=kinds,
        loss=float(loss),
        grad_norm=float(grad_norm),
    )


def gathered_sizes(trace: torch.profiler.profile) -> dict[int, int]:
    """All-gathers of parameters per size of what they gathered [elements].

    Read from the raw events: building the profiler's own event tree takes seconds a step.
    """
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = trace.profiler.kineto_results.events()
    gathers = (event for event in events if event.name() == "c10d::_allgather_base_")
    return dict(Counter(int(torch.Size(event.shapes()[0]).numel()) for event in gathers))
