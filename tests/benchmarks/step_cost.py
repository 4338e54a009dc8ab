"""What a training step costs, in multiples of a plain flow-matching step with the same network and batch.

    python -m tests.benchmarks.step_cost [--quick]

Two measures. Row passes: every row that enters the network, dummy rows too; a graded row (forward and backward) is 1, a
row without gradient 1/3. CPU time: draw, targets, loss and backward, on the main thread with one torch thread; the
measured steps are interleaved with flow-matching steps, and the ratio is of medians, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import trange

from tests.benchmarks.recipes import DEFAULT, PUBLISHED
from tests.benchmarks.toy_network import ResidualMLP
from tests.benchmarks.toy_training import BATCH, make_targets, row_passes
from tests.trainer.objectives.toy import ToyNets
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.twinflow import TwinFlow

NETWORKS = {"0.85M": (192, 3), "4.3M": (384, 4)}
GUIDANCE = {"unguided": 0.0, "guided": 0.5}
# Row passes, and CPU time by network, with equal roles. Published code: 1.92, 2.43, 2.17; guided 2.58, 3.28, 2.95.
BARS = {
    "unguided": {"rows": 1.75, "0.85M": 2.15, "4.3M": 1.95},
    "guided": {"rows": 2.10, "0.85M": 2.60, "4.3M": 2.35},
}


@dataclass(frozen=True)
class Cost:
    """Multiples of a flow-matching step; cpu_interval: 95 % of the bootstrap."""

    rows: float
    cpu: float
    cpu_interval: tuple[float, float]


def objectives() -> dict[str, TwinFlow]:
    """Equal roles and the default recipe, without and with guidance, order 2."""
    made = {}
    for guidance, ratio in GUIDANCE.items():
        made[f"equal roles, {guidance}"] = replace(PUBLISHED.objective, enhanced_ratio=ratio)
        made[f"default, {guidance}"] = replace(DEFAULT.objective, enhanced_ratio=ratio)
    return made


def step_seconds(objective: Any, nets: ToyNets, x: torch.Tensor, labels: torch.Tensor, step: int) -> float:
    """CPU seconds of the main thread for one step without the optimizer; leaves no gradients behind."""
    start = time.thread_time()
    targets = make_targets(objective, nets, x, labels, seed=0, step=step, guided=objective.needs_null)
    objective.loss(nets, targets).total.backward()
    seconds = time.thread_time() - start
    nets.online.zero_grad(set_to_none=False)
    return seconds


def measure(network: nn.Module, steps: int, warmup: int, label: str) -> dict[str, Cost]:
    """Cost of every objective on one network."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 64, generator=random)
    labels = torch.randint(10, (BATCH,), generator=random)
    candidates: dict[str, Any] = {"flow matching": FlowMatching(), **objectives()}
    nets = {name: ToyNets(network) for name in candidates}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for step in trange(steps + warmup, desc=label, leave=False):
        for name, objective in candidates.items():
            seconds[name].append(step_seconds(objective, nets[name], x, labels, step))
    plain = np.array(seconds["flow matching"][warmup:])
    costs = {}
    for name in objectives():
        cpu = np.array(seconds[name][warmup:])
        rows = row_passes(nets[name].calls) / ((steps + warmup) * BATCH)
        costs[name] = Cost(rows, float(np.median(cpu) / np.median(plain)), bootstrap(cpu, plain))
    return costs


def bootstrap(cpu: np.ndarray, plain: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the ratio of medians; pairs of interleaved steps are drawn together."""
    chosen = np.random.default_rng(0).integers(len(cpu), size=(draws, len(cpu)))
    ratios = np.median(cpu[chosen], axis=1) / np.median(plain[chosen], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps; the bars stay")
    steps, warmup = (60, 10) if parser.parse_args().quick else (600, 20)
    torch.set_num_threads(1)
    figures: dict[str, dict[str, Any]] = {}
    missed = []
    print(f"{'network':8s}{'step':28s}{'rows':>7s}{'bar':>7s}{'CPU':>7s}{'95 %':>14s}{'bar':>7s}")
    for size, (width, blocks) in NETWORKS.items():
        torch.manual_seed(0)
        network = ResidualMLP(width=width, blocks=blocks)
        nn.init.normal_(network.out.weight, std=0.02)  # a zero output would make every target and sample special
        for name, cost in measure(network, steps, warmup, size).items():
            bars = BARS[name.split(", ")[1]]
            binding = name.startswith("equal roles")
            if binding and (cost.rows > bars["rows"] or cost.cpu > bars[size]):
                missed.append(f"{name} on {size}")
            interval = "{:.2f}-{:.2f}".format(*cost.cpu_interval)
            shown = (f"{bars['rows']:7.2f}", f"{bars[size]:7.2f}") if binding else (f"{'-':>7s}",) * 2
            print(f"{size:8s}{name:28s}{cost.rows:7.3f}{shown[0]}{cost.cpu:7.3f}{interval:>14s}{shown[1]}")
            figures.setdefault(size, {})[name] = vars(cost)
    print(f"missed: {', '.join(missed) or 'none'}")
    print(
        json.dumps({"benchmark": "step_cost", "steps": steps, "figures": figures, "missed": missed, "ok": not missed})
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
