"""How often a step calls the networks and gathers their parameters, beside law 1's formula and an unpacked reference.

    python -m tests.benchmarks.passes [--quick]

Part 1, on two FSDP2 ranks over gloo: velocity calls, all-gathers per shard unit and gathered bytes of the production
objective with guidance, for every teacher mode. Part 2, without sharding: rows per rank and stage over 200 steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from configs.schema import Ema, Optimizer
from tests.ranks import run_ranks
from tests.trainer.engines.toy import ToyBackbone
from tests.trainer.objectives.cases import EQUAL_ROLES, Samples, role_rows, samples
from tests.trainer.objectives.toy import VectorConditions
from trainer.engines.fsdp2 import FSDP2, FSDP2Options
from trainer.objectives.objective import TEACHER, Nets, Roles, Rows
from trainer.objectives.passes import Runner, run_packed, run_unpacked
from trainer.objectives.twinflow import TwinFlow

RANKS = 2
BLOCKS = 4
SHAPE = (1, 2, 2)
PERIOD = sum(EQUAL_ROLES.values())
TEACHERS = ("online", "ema", "frozen")
BARS = {1: 5, 4: 11}
"""Most gathers of a block in a step of accumulation A: N = 2, guidance, online teacher, keep_gathered false."""
BALANCE_BAR = 1.05
SAMENESS = 1e-12


@dataclass(frozen=True)
class Setting:
    teacher: str
    order: int
    accumulation: int
    micro_batch_size: int

    @property
    def objective(self) -> TwinFlow:
        return TwinFlow(order=self.order, teacher=self.teacher, enhanced_ratio=0.5)

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


class FreeNet:
    """Costs nothing and returns nothing: for counting rows."""

    def __init__(self, shares_module: bool) -> None:
        self.shares_module = shares_module

    def velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Any, weights: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x_t)


def gathered_sizes(trace: torch.profiler.profile) -> dict[int, int]:
    """All-gathers of parameters per size of what they gathered [elements].

    Read from the raw events: building the profiler's own event tree takes seconds a step.
    """
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = trace.profiler.kineto_results.events()
    gathers = (event for event in events if event.name() == "c10d::_allgather_base_")
    return dict(Counter(int(torch.Size(event.shapes()[0]).numel()) for event in gathers))


# ---------------------------------------------------------------- part 1: two sharded ranks
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


# ---------------------------------------------------------------- part 2: rows per rank and stage
@dataclass
class Balance:
    """Rows of every stage summed over the steps; [stages][ranks]. A stage is the n-th no-grad call of a kind in a step,
    or the graded calls together."""

    setting: Setting
    rows: dict[str, list[int]]

    @property
    def worst(self) -> float:
        """Largest max / mean over ranks of any stage."""
        return max(max(of_rank) * len(of_rank) / sum(of_rank) for of_rank in self.rows.values())

    @property
    def bound(self) -> bool:
        """Whether a rank's window is a whole number of role periods, so that the bar applies."""
        return self.setting.rows % PERIOD == 0


def balance(setting: Setting, steps: int) -> Balance:
    objective = setting.objective
    batch = samples(RANKS * setting.rows, shape=SHAPE)
    summed: dict[str, list[int]] = {}
    for step, rank in itertools.product(range(steps), range(RANKS)):
        nets = CountedNets(FreeNet(setting.teacher == "online"))
        window = slice(rank * setting.rows, (rank + 1) * setting.rows)
        stages = count_rows(objective, nets, batch[window], window, step, rank)
        stages["graded"] = setting.rows
        for stage, rows in stages.items():
            summed.setdefault(stage, [0] * RANKS)[rank] += rows
    return Balance(setting, summed)


def count_rows(
    objective: TwinFlow, nets: CountedNets, local: Samples, window: slice, step: int, rank: int
) -> dict[str, int]:
    roles = role_rows(objective, step, RANKS * len(local.x), rank, RANKS)
    draws = objective.draw(Rows(0, step, torch.arange(window.start, window.stop), roles), SHAPE, "cpu", torch.float64)
    objective.targets(nets, local.x, local.cond, local.null, roles, draws)
    seen: Counter[bool] = Counter()
    stages: dict[str, int] = {}
    for taught, _, rows in nets.calls:
        seen[taught] += 1
        stages[f"{'teacher' if taught else 'online'} {seen[taught]}"] = rows
    return stages


# ---------------------------------------------------------------- report
@dataclass
class Verdict:
    """One row of the first table, and what it must hold."""

    setting: Setting
    calls: tuple[int, int, int]
    passes_as_predicted: bool
    gathers: float
    gathers_kept: float
    gathers_unpacked: float
    megabytes: tuple[float, float, float]
    difference: float

    @property
    def ok(self) -> bool:
        modules = 1 if self.setting.teacher == "online" else 2
        within = self.setting.teacher != "online" or self.setting.order != 2 or self.within_bar
        return self.passes_as_predicted and self.difference <= SAMENESS and self.gathers_kept <= modules and within

    @property
    def within_bar(self) -> bool:
        return self.gathers <= BARS.get(self.setting.accumulation, float("inf")) and self.gathers_kept == 1


def judge(ranks: Sequence[Measured], block_size: int) -> Verdict:
    """Maxima over the steps of one setting; the same calls on every rank are part of what was predicted."""
    first, others = ranks[0], ranks[1:]
    setting, accumulation = first.setting, first.setting.accumulation

    def per_block(steps: Sequence[Counts]) -> float:
        return max(counts.gathers.get(block_size, 0) / BLOCKS for counts in steps)

    def megabytes(steps: Sequence[Counts]) -> float:
        return max(counts.elements for counts in steps) * torch.float64.itemsize / 1e6

    predicted = all(
        (counts.online, counts.teacher, counts.graded) == (*counts.expected, accumulation)
        for counts in first.resharding + first.keeping
    ) and all(
        counts.gathers[block_size] == BLOCKS * (sum(counts.expected) + 2 * accumulation) for counts in first.resharding
    )
    equal = all(
        [counts.kinds for counts in other.resharding] == [counts.kinds for counts in first.resharding]
        for other in others
    )
    differences = [
        abs(getattr(made, name) - getattr(reference, name)) / max(abs(getattr(reference, name)), 1e-3)
        for steps in (first.resharding, first.keeping)
        for made, reference in zip(steps, first.unpacked, strict=True)
        for name in ("loss", "grad_norm")
    ]
    return Verdict(
        setting=setting,
        calls=max((counts.online, counts.teacher, counts.graded) for counts in first.resharding),
        passes_as_predicted=predicted and equal,
        gathers=per_block(first.resharding),
        gathers_kept=per_block(first.keeping),
        gathers_unpacked=per_block(first.unpacked),
        megabytes=(megabytes(first.resharding), megabytes(first.keeping), megabytes(first.unpacked)),
        difference=max(differences),
    )


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    print(
        "Passes and all-gathers of a block in one step, 2 FSDP2 ranks (gloo, float64), guidance on; the largest step."
    )
    print("calls: no-grad online or shared + no-grad teacher + graded. MB: gathered per rank. diff: loss and grad norm")
    print("against the unpacked reference.\n")
    head = ("teacher", "N", "A", "micro", "calls", "law 1", "gathers", "kept", "unpacked", "published")
    print("{:8}{:>2}{:>3}{:>6}{:>9}{:>7}{:>9}{:>6}{:>10}{:>11}{:>22}{:>9}".format(*head, "MB: /kept/unpacked", "diff"))
    for v in verdicts:
        s = v.setting
        law = "yes" if v.passes_as_predicted else "NO"
        calls, traffic = "+".join(map(str, v.calls)), "/".join(f"{mb:.3f}" for mb in v.megabytes)
        print(
            f"{s.teacher:8}{s.order:2}{s.accumulation:3}{s.micro_batch_size:6}{calls:>9}{law:>7}{v.gathers:9g}"
            f"{v.gathers_kept:6g}{v.gathers_unpacked:10g}{s.published_gathers:11}{traffic:>22}{v.difference:9.0e}"
        )


def print_balances(balances: Sequence[Balance], steps: int) -> None:
    print(
        f"\nRows per rank and stage, summed over {steps} steps, {RANKS} ranks; max / mean of the least balanced stage."
    )
    print("Windows of whole role periods must keep within 1.05 (bar); the others are for information.\n")
    print(f"{'teacher':8}{'N':>2}{'A':>3}{'micro':>6}{'max/mean':>10}{'':>6}  rows by stage (rank 0 / rank 1)")
    for b in balances:
        s = b.setting
        stages = ", ".join(f"{stage} {'/'.join(map(str, rows))}" for stage, rows in b.rows.items())
        mark = "bar" if b.bound else ""
        print(f"{s.teacher:8}{s.order:2}{s.accumulation:3}{s.micro_batch_size:6}{b.worst:10.3f}{mark:>6}  {stages}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer settings, steps and row counts")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)

    orders, accumulations = ((2,), (1, 4)) if quick else ((0, 1, 2, 3), (1, 2, 4))
    settings = [Setting(*values) for values in itertools.product(TEACHERS, orders, accumulations, (1, 4))]
    sharded = [s for s in settings if not quick or s.micro_batch_size == 1 or s.accumulation == 1]
    by_rank = run_ranks(measure, RANKS, sharded, PERIOD, timeout=300 if quick else 3600)
    verdicts = [
        judge(ranks, block_size)
        for *ranks, block_size in zip(*(found for found, _ in by_rank), itertools.repeat(by_rank[0][1]), strict=False)
    ]
    print_verdicts(verdicts)

    steps = 100 if quick else 200
    balances = [balance(setting, steps) for setting in settings]
    print_balances(balances, steps)

    online = {s.setting: s for s in verdicts if s.setting.teacher == "online" and s.setting.order == 2}
    worst = {a: max(v.gathers for s, v in online.items() if s.accumulation == a) for a in BARS}
    bound = [b.worst for b in balances if b.bound]
    ok = all(v.ok for v in verdicts) and max(bound) <= BALANCE_BAR
    figures = {
        "benchmark": "passes",
        "settings": len(verdicts),
        "passes_as_predicted": all(v.passes_as_predicted for v in verdicts),
        "gathers_order2_online_a1": worst[1],
        "gathers_order2_online_a4": worst[4],
        "gathers_order2_online_kept": max(v.gathers_kept for v in online.values()),
        "published_gathers_a1": Setting("online", 2, 1, 1).published_gathers,
        "published_gathers_a4": Setting("online", 2, 4, 1).published_gathers,
        "largest_difference_from_unpacked": max(v.difference for v in verdicts),
        "balance_steps": steps,
        "balance_worst_whole_periods": round(max(bound), 4),
        "balance_worst_other_windows": round(max(b.worst for b in balances if not b.bound), 4),
        "ok": ok,
    }
    print(json.dumps(figures))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
