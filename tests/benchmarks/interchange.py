"""One training, three engines in turn: python -m tests.benchmarks.interchange [--quick]

The tiny Qwen-Image trains on digits through trainer.session.train, which every rank of `twinflow train` runs: 4 steps with
FSDP2 on 2 ranks, 4 with DeepSpeed ZeRO-3 on 1, 4 with FSDP2 on 3, each leg stopped by a request and resumed from its
checkpoint. Beside it FSDP2 on 2 ranks trains the 12 steps without a stop. After every leg all tensors of both checkpoints
are compared by law 9; a row that compares two different steps shows what a difference looks like. The last line is JSON;
exit status 1 where an error is above the bar, a tensor is missing, or a leg did not run as meant.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BAR = 1e-4
"""Largest error of a tensor after 12 float32 steps (law 9)."""
GROUPS = ("parameter", "exp_avg", "exp_avg_sq", "ema")
RANKS_OF_REFERENCE = 2
LEGS = (("fsdp2", 2), ("zero3", 1), ("fsdp2", 3))
GLOBAL_BATCH, MICRO_BATCH = 12, 2
TIMEOUT_S = 540.0


@dataclass(frozen=True)
class Row:
    """One comparison. worst: group -> (error, tensor); tensors: compared; trained: of them with moments; problem: why
    there is no result."""

    title: str
    step: int
    worst: dict[str, tuple[float, str]]
    tensors: int
    trained: int
    problem: str = ""

    @property
    def error(self) -> float:
        return max((error for error, _ in self.worst.values()), default=float("nan"))


def overrides(folder: Path, run: str, engine: str, steps: int, leg: int) -> list[str]:
    settings = {
        "run.name": run,
        "run.dir": folder / run,
        "engine.name": engine,
        "model.path": folder / "model",
        "data.manifest": folder / "digits/train",
        "data.held_out": "null",
        "data.workers": 0,
        "train.steps": steps,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.micro_batch_size": MICRO_BATCH,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
        "checkpoint.every": leg,
        "checkpoint.keep_last": len(LEGS),
        "sample.presets": "[1nfe]",
        "sample.prompts": "[]",
        "evaluate.name": "null",
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "tracking.every": 1,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def rank_trains(files: list[str], settings: list[str], steps: int) -> int:
    """On every rank: train, with a request to stop that is heard after `steps` steps; the exit status."""
    import torch.distributed as dist

    from configs import load
    from trainer import session
    from trainer.engines.distributed import World
    from trainer.signals import StopRequest

    class StopAfter(StopRequest):
        """The loop asks once before each step."""

        asked = 0

        @property  # type: ignore[override]
        def requested(self) -> int:
            self.asked += 1
            return 15 if self.asked > steps else 0

        @requested.setter
        def requested(self, number: int) -> None:
            """Set by nobody but the constructor."""

    logging.disable(logging.INFO)
    config = load.load(files, settings)
    session.set_numerics(config)
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    return session.train(config, world, StopAfter(), fresh=False, allow_change=[])


def train(folder: Path, run: str, engine: str, ranks: int, total: int, leg: int, steps: int) -> None:
    """`steps` further steps of a run of `total`; raises where a rank fails."""
    from tests.ranks import run_ranks

    settings = overrides(folder, run, engine, total, leg)
    codes = run_ranks(rank_trains, ranks, ["configs/smoke.yaml"], settings, steps, timeout=TIMEOUT_S)
    if any(codes):
        raise RuntimeError(f"{run}: {engine} on {ranks} ranks ended with {codes}; its own messages say why")


def read_whole(run: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """All tensors of a checkpoint by group and name, and its certificate."""
    from configs.schema import Checkpoint
    from trainer.engines.engine import TensorPart
    from trainer.saving import checkpoint_store
    from trainer.saving.checkpoint import Checkpoints
    from trainer.saving.checkpoint_store import LocalCheckpoints

    store, name = LocalCheckpoints(run / "checkpoints"), f"step_{step:08d}"
    certificate = checkpoint_store.read(store, name)
    whole: dict[str, dict[str, Tensor]] = {}
    parts = []
    for group, named in certificate.tensors.items():
        for tensor, saved in named.items():
            made = torch.full(saved.shape, float("nan"), dtype=getattr(torch, saved.dtype))
            whole.setdefault(group, {})[tensor] = made
            parts.append(TensorPart(group, tensor, tuple(saved.shape), 0, made.view(-1)))
    Checkpoints(store, Checkpoint(), {}).read(name, parts)
    return whole, certificate


def compare(title: str, folder: Path, mine: tuple[str, int], reference: tuple[str, int]) -> Row:
    """Law 9 for every tensor of two checkpoints (run, step), and equal counters."""
    from trainer.sameness import errors

    (found, own), (expected, theirs) = (read_whole(folder / run, step) for run, step in (mine, reference))
    worst: dict[str, tuple[float, str]] = {}
    problem = "" if found.keys() == expected.keys() == set(GROUPS) else f"groups {sorted(found)}, {sorted(expected)}"
    try:
        for group in GROUPS:
            of_group = errors(found[group], expected[group])
            worst[group] = max((error, name) for name, error in of_group.items())
    except (KeyError, ValueError) as error:
        problem = f"{problem} {error!r}".strip()
    counters = {name: (own.counters[name], theirs.counters[name]) for name in ("optimizer_step", "ema_decay")}
    if mine[1] == reference[1] and any(a != b for a, b in counters.values()):
        problem = f"{problem} counters {counters}".strip()
    return Row(title, mine[1], worst, sum(map(len, found.values())), len(found.get("exp_avg", {})), problem)


def check_leg(folder: Path, engine: str, ranks: int, step: int) -> str:
    """What the certificate of a leg says about who wrote it, if it is not what was meant."""
    metadata = read_whole(folder / "legs", step)[1].metadata
    wrote = (metadata["engine"], metadata["world_size"])
    return "" if wrote == (engine, ranks) else f"step {step} was written by {wrote}, not {(engine, ranks)}"


def print_row(row: Row) -> None:
    shown = "".join(f"{row.worst[group][0]:>12.1e}" if group in row.worst else f"{'-':>12}" for group in GROUPS)
    name = max(row.worst.values())[1] if row.worst else ""
    print(f"{row.title:<44}{row.step:>5}{row.tensors:>8}{shown}  {row.problem or name}", flush=True)


def measure(folder: Path, leg: int) -> tuple[list[Row], Row, list[str]]:
    """Train both runs and compare; the rows, the control, and what did not go as meant."""
    total = leg * len(LEGS)
    print(
        f"{'leg':<44}{'step':>5}{'tensors':>8}{''.join(f'{group:>12}' for group in GROUPS)}  worst tensor", flush=True
    )
    train(folder, "whole", "fsdp2", RANKS_OF_REFERENCE, total, leg, total)
    rows, problems = [], []
    for index, (engine, ranks) in enumerate(LEGS, start=1):
        train(folder, "legs", engine, ranks, total, leg, leg)
        step = leg * index
        title = f"{leg} steps with {engine} on {ranks} rank{'s' if ranks > 1 else ''}"
        rows.append(compare(title, folder, ("legs", step), ("whole", step)))
        problems += filter(None, [rows[-1].problem, check_leg(folder, engine, ranks, step)])
        print_row(rows[-1])
    control = compare(
        f"control: step {total - leg} against step {total}", folder, ("whole", total - leg), ("whole", total)
    )
    print_row(control)
    return rows, control, problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.interchange", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="legs of one step")
    leg = 1 if parser.parse_args().quick else 4
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    from data.demo import write_digits
    from models import tiny
    from tests.ranks import stop_ranks

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="twinflow-interchange-") as name:
        folder = Path(name)
        write_digits(folder / "digits", 128, 8)
        tiny.write(folder / "model", "digits", 0)
        try:
            rows, control, problems = measure(folder, leg)
        finally:
            stop_ranks()
    errors = [row.error for row in rows]
    ok = not problems and all(error <= BAR for error in errors) and control.error > 100 * BAR
    print(f"bar {BAR:g}; the control must be above {100 * BAR:g}. {'; '.join(problems)}")
    result = {
        "benchmark": "interchange",
        "steps": leg * len(LEGS),
        "legs": [f"{engine} on {ranks}" for engine, ranks in LEGS],
        "errors": {row.title: {group: error for group, (error, _) in row.worst.items()} for row in rows},
        "worst": max(errors),
        "bar": BAR,
        "tensors": rows[-1].tensors,
        "trained": rows[-1].trained,
        "control": control.error,
        "problems": problems,
        "seconds": round(time.monotonic() - began, 1),
        "ok": ok,
    }
    print(json.dumps(result))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
