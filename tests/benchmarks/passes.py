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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tests.benchmarks.pass_counts import BLOCKS, RANKS, Counts, Measured, Setting, measure
from tests.benchmarks.pass_rows import Balance, balance
from tests.ranks import run_ranks

TEACHERS = ("online", "ema", "frozen")
BARS = {1: 5, 4: 11}
"""Most gathers of a block in a step of accumulation A: N = 2, guidance, online teacher, keep_gathered false."""
STEPS = 200
BALANCE_BAR = 1.05
"""Most that a rank may exceed the mean of the ranks in a stage, over STEPS steps with windows of whole role periods."""
SAMENESS = 1e-12


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


def print_balances(balances: Sequence[Balance]) -> None:
    print(
        f"\nRows per rank and stage, summed over {STEPS} steps, {RANKS} ranks; max / mean of the least balanced stage."
    )
    print("Windows of whole role periods must keep within 1.05 (bar); the others are for information.\n")
    print(
        f"{'roles':10}{'teacher':8}{'N':>2}{'A':>3}{'micro':>6}{'max/mean':>10}{'':>6}  rows by stage (rank 0 / rank 1)"
    )
    for b in balances:
        s = b.setting
        stages = ", ".join(f"{stage} {'/'.join(map(str, rows))}" for stage, rows in b.rows.items())
        mark = "bar" if b.bound else ""
        roles = "published" if s.published else "default"
        print(
            f"{roles:10}{s.teacher:8}{s.order:2}{s.accumulation:3}{s.micro_batch_size:6}{b.worst:10.3f}{mark:>6}  {stages}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer settings, steps and row counts")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)

    orders, accumulations = ((2,), (1, 4)) if quick else ((0, 1, 2, 3), (1, 2, 4))
    settings = [Setting(*values) for values in itertools.product(TEACHERS, orders, accumulations, (1, 4))]
    sharded = [s for s in settings if not quick or s.micro_batch_size == 1]
    by_rank = run_ranks(measure, RANKS, sharded, sharded[0].period, timeout=300 if quick else 3600)
    block_size = by_rank[0][1]
    verdicts = [judge(ranks, block_size) for ranks in zip(*(found for found, _ in by_rank), strict=True)]
    print_verdicts(verdicts)

    default = [replace(s, published=False) for s in settings if s.teacher == "online" and s.order == 2]
    counted = [s for s in settings if not quick or s.teacher == "online"] + default
    balances = [balance(setting, STEPS) for setting in counted]
    print_balances(balances)

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
        "balance_steps": STEPS,
        "balance_worst_whole_periods": round(max(bound), 4),
        "balance_worst_other_windows": round(max(b.worst for b in balances if not b.bound), 4),
        "ok": ok,
    }
    print(json.dumps(figures))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
