"""What the loop costs beyond the training step itself: python -m tests.benchmarks.overhead [--quick]

Blocks of steps alternate between two sides that train the same engine on the same batches, with the smoke recipe's
model, batch and objective, on 1 process and on 2 ranks. The loop's side is `loop.advance` and `loop.log` at every
step: stages, agreement, counted network calls, tally, journal, MLflow on sqlite behind its sender, heartbeat, watchdog.
The bare side is encode, draw, targets, loss, backward, optimizer and average, with the engine's own networks. Both get
the same decoded batches from a list: reading data is left out on both sides, encoding is part of both.

A block's time is wall clock, the loop's plus the CPU time that the sender still needs after it. The ratio is the median
over pairs of neighbouring blocks; it must be at most 1.05. CPU time of the process is printed beside it: on a machine
that others use it is the steadier of the two. The last line is JSON; exit status 1 where a ratio is above the bar.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from configs import load as configuration
from data.batch import Batch
from data.demo import write_digits
from models import tiny
from tests.ranks import run_ranks
from trainer import loop
from trainer.build import build_objective, build_order, build_run
from trainer.engines.distributed import World, default_device
from trainer.observe.metrics import Clock, Tally
from trainer.observe.tracking import open_tracker
from trainer.run import Run, make_targets
from trainer.session import agree_on_folder, set_numerics
from trainer.signals import StopRequest
from trainer.training_data import read_data
from trainer.watching import hang
from trainer.watching.heartbeat import Heartbeat

BAR = 1.05
ROOT = Path(__file__).parents[2]
BATCHES = 4


@dataclass(frozen=True)
class Block:
    """Seconds per step of one block: by the clock, and CPU time of this process."""

    wall: float
    cpu: float


def open_run(folder: str, name: str) -> Run:
    """A run of the smoke recipe on this rank, as trainer.session opens it."""
    overrides = {
        "run.name": name,
        "run.dir": f"{folder}/{name}",
        "model.path": f"{folder}/model",
        "data.manifest": f"{folder}/digits/train",
        "data.held_out": "null",
        "data.workers": 0,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "tracking.every": 1,
        "train.steps": 1_000_000,
        "evaluate.name": "null",
        "sample.presets": "[]",
    }
    config = configuration.load([ROOT / "configs/smoke.yaml"], [f"{key}={value}" for key, value in overrides.items()])
    set_numerics(config)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    world = World(rank, ranks, rank, default_device())
    manifest = read_data(config)
    order = build_order(config, manifest)
    run_folder = agree_on_folder(config, world, order.identity(), False, [])
    tracker = open_tracker(run_folder.path, config.tracking.uri, config.tracking.experiment, name, rank)
    run = build_run(config, world, run_folder, manifest, order, build_objective(config), StopRequest(), tracker)
    if rank == 0:
        run.stages.entered = Heartbeat(run)
    return run


def bare_step(run: Run, batch: Batch, step: int) -> None:
    """The mathematics of a step and nothing else; run.nets are the engine's own."""
    x, cond, null = run.encoding.encode(batch)
    targets, size = make_targets(run, batch, x, cond, null, step), run.config.train.micro_batch_size
    for begin in range(0, len(targets), size):
        run.engine.backward(run.objective.loss(run.nets, targets[begin : begin + size]).total)
    run.engine.step(1e-4)
    run.engine.update_ema()


class LoopSide:
    """The training loop's own functions, fed from a list."""

    def __init__(self, run: Run, batches: list[Batch]) -> None:
        self._run, self._tally, self._clock = run, Tally(run.engine.device), Clock()
        self._batches = self._forever(batches)
        self._bar = tqdm(disable=True)

    def _forever(self, batches: list[Batch]) -> Iterator[Batch]:
        while True:
            yield replace(batches[self._run.step % len(batches)], step=self._run.step)

    def block(self, steps: int) -> Block:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            assert loop.advance(self._run, self._batches, self._tally, self._clock)
            loop.log(self._run, self._tally, self._clock, self._bar, 1)
        wall, cpu, before = time.perf_counter() - wall, time.process_time() - cpu, sender_seconds()
        assert self._run.tracker.flush(60.0), "MLflow does not take the metrics"
        dist.barrier()  # a bare block shall pay nothing of the loop's
        late = sender_seconds() - before
        return Block((wall + late) / steps, (cpu + late) / steps)


def bare_block(run: Run, batches: list[Batch], first: int, steps: int) -> Block:
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(first, first + steps):
        bare_step(run, batches[step % len(batches)], step)
    return Block((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)


def sender_seconds() -> float:
    """CPU seconds of the thread that sends to MLflow."""
    senders = [thread for thread in threading.enumerate() if thread.name == "mlflow-sender" and thread.ident]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in senders if thread.ident)


def measure(folder: str, name: str, pairs: int, steps: int) -> list[tuple[Block, Block]]:
    """(loop, bare) of neighbouring blocks on this rank, the first of each pair by turns."""
    run = open_run(folder, name)
    batches = [batch for batch, _ in zip(run.loader, range(BATCHES), strict=False)]
    looped, bare = LoopSide(run, batches), replace(run, nets=run.engine.nets)
    measured: list[tuple[Block, Block]] = []
    with hang.watch(run, dict):
        looped.block(3)  # the first sends import mlflow and make its data base
        bare_block(bare, batches, run.step, 3)
        for pair in range(pairs):
            dist.barrier()
            if pair % 2:
                block = bare_block(bare, batches, run.step, steps)
                dist.barrier()
                measured.append((looped.block(steps), block))
            else:
                block = looped.block(steps)
                measured.append((block, bare_block(bare, batches, run.step, steps)))
    run.tracker.finish("FINISHED")
    return measured


def figures(blocks: list[tuple[Block, Block]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for kind in ("wall", "cpu"):
        looped, bare = ([getattr(side, kind) for side in sides] for sides in zip(*blocks, strict=True))
        ratios = sorted(a / b for a, b in zip(looped, bare, strict=True))
        found |= {f"{kind}_loop_ms": 1e3 * median(looped), f"{kind}_bare_ms": 1e3 * median(bare)}
        found |= {f"{kind}_ratio": median(ratios), f"{kind}_low": ratios[0], f"{kind}_high": ratios[-1]}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overhead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks; the bar stays")
    pairs, steps = (4, 12) if parser.parse_args().quick else (12, 20)
    results: dict[str, Any] = {}
    print(f"{'processes':<10}{'':<6}{'loop ms':>10}{'bare ms':>10}{'ratio':>8}{'of pairs':>16}")
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        write_digits(Path(folder) / "digits", shard_size=128, size=8)
        assert tiny.write(Path(folder) / "model", "digits", seed=0)
        for ranks in (1, 2):
            blocks = run_ranks(measure, ranks, folder, f"ranks{ranks}", pairs, steps, timeout=1200)[0]
            found = results[str(ranks)] = figures(blocks)
            for kind in ("wall", "cpu"):
                span = f"{found[f'{kind}_low']:.3f} - {found[f'{kind}_high']:.3f}"
                shown = (found[f"{kind}_loop_ms"], found[f"{kind}_bare_ms"], found[f"{kind}_ratio"])
                print(f"{ranks:<10}{kind:<6}{shown[0]:>10.1f}{shown[1]:>10.1f}{shown[2]:>8.3f}{span:>16}", flush=True)
    ok = all(found["wall_ratio"] <= BAR for found in results.values())
    print(json.dumps({"ok": ok, "bar": BAR, "pairs": pairs, "steps": steps, "processes": results}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
