"""Exactly once across a change of ranks: python -m tests.benchmarks.reshard [--quick]

A real `twinflow train` of the tiny model on two weighted data sets starts on 2 ranks, is asked to stop after a third of
its steps (SIGINT, as Ctrl-C sends it), goes on with 1 rank, is stopped again, and ends on 3 ranks. Every rank writes down
what it trained on (tracking.samples). Counted over all files: pairs (own epoch, key) seen twice, and pairs that whole
epochs must hold, by the keys of the data sets and their weights, but that nobody saw. The last line is JSON; exit status
1 where a pair is duplicated or missing, or a phase did not train on its ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.index import parse_index
from data.manifest import read_manifest
from models import tiny
from models.tiny_pipelines.prompts import CAPTIONS
from tests.data.pictures import body, picture

ROOT = Path(__file__).parents[2]
GLOBAL_BATCH = 12
RANKS = (2, 1, 3)
SETS = {"alpha": (96, 1), "beta": (48, 2)}
"""Samples and weight of each data set: 8 + 8 steps an epoch of the run, in which beta is read twice."""


@dataclass(frozen=True)
class Phase:
    """ranks: of the run; steps: trained, from the first to before the last."""

    ranks: int
    first: int
    last: int


def make_sets(folder: Path, environment: dict[str, str]) -> None:
    """Grey 8x8 pictures with captions, packed as a user packs them into several small shards."""
    for name, (samples, _) in SETS.items():
        source = folder / f"{name}-source"
        source.mkdir()
        for n in range(samples):
            (source / f"{n:03d}.png").write_bytes(body(picture(8, 8, n).convert("L")))
            (source / f"{n:03d}.txt").write_text(CAPTIONS[n % 10])
        options = ("--name", name, "--resolution", "8", "--bucket-step", "8", "--channels", "1", "--workers", "0")
        command = [sys.executable, "-m", "data.pack", str(source), str(folder / name), *options, "--shard-mb", "0.04"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def command(folder: Path, ranks: int, steps: int) -> list[str]:
    sources = ", ".join(f"{{manifest: {folder / name}, weight: {weight}}}" for name, (_, weight) in SETS.items())
    settings = {
        "run.name": "reshard",
        "run.dir": folder / "run",
        "model.path": folder / "model",
        "data.manifest": "null",
        "data.sources": f"[{sources}]",
        "data.held_out": "null",
        "train.steps": steps,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.micro_batch_size": 2,
        "schedule.warmup_steps": 0,
        "checkpoint.every": 0,
        "sample.prompts": "[]",
        "evaluate.name": "null",
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "tracking.every": 1,
        "tracking.samples": "true",
        "runtime.nproc": ranks,
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "launcher.cli", "train", "configs/smoke.yaml", *given]


def trained(folder: Path) -> list[tuple[Path, dict]]:
    """Every line that a rank wrote, with its file."""
    lines = []
    for path in sorted((folder / "run" / "samples").glob("*.jsonl")):
        text = path.read_text()
        lines += [(path, json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]
    return lines


def run_phase(folder: Path, ranks: int, stop_after: int, steps: int, environment: dict[str, str]) -> Phase:
    """Train on `ranks` from where the run stands until `stop_after` steps are seen to be done, then ask it to stop."""
    before = 1 + max((line["step"] for _, line in trained(folder)), default=-1)
    with open(folder / f"phase-{ranks}.log", "wb") as log:
        process = subprocess.Popen(
            command(folder, ranks, steps), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            done = 1 + max((line["step"] for _, line in trained(folder)), default=-1)
            if stop_after < steps and done >= stop_after:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.05)
        code = process.wait(timeout=300)
    after = 1 + max((line["step"] for _, line in trained(folder)), default=-1)
    if code not in (0, 130):
        raise SystemExit(f"training on {ranks} ranks ended with {code}:\n{(folder / f'phase-{ranks}.log').read_text()}")
    return Phase(ranks, before, after)


def expected(folder: Path, epochs: int) -> set[tuple[str, int, str]]:
    """(data set, own epoch, key) of `epochs` whole epochs of the run, from the keys in the indexes and the weights."""
    wanted = set()
    for name, (samples, weight) in SETS.items():
        manifest = read_manifest(str(folder / name))
        bodies = [((folder / name / shard.index_name).read_bytes(), shard) for shard in manifest.shards]
        keys = {key for content, shard in bodies for key in parse_index(content, shard).keys}
        assert len(keys) == samples and len(manifest.shards) > 1
        wanted |= {(name, own, key) for own in range(epochs * weight) for key in keys}
    return wanted


def pairs(folder: Path) -> Counter[tuple[str, int, str]]:
    """How often every (data set, own epoch, key) was trained on, by all ranks of all phases."""
    seen: Counter[tuple[str, int, str]] = Counter()
    for _, line in trained(folder):
        for shard, own, key in zip(line["shards"], line["own_epochs"], line["keys"], strict=True):
            seen[shard.split("-")[0], own, key] += 1
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.reshard", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 epoch instead of 3")
    epochs = 1 if parser.parse_args().quick else 3
    per_epoch = sum(samples * weight for samples, weight in SETS.values()) // GLOBAL_BATCH
    steps = epochs * per_epoch
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    with tempfile.TemporaryDirectory(prefix="reshard-") as scratch:
        folder = Path(scratch)
        tiny.write(folder / "model", "digits", seed=0)
        make_sets(folder, environment)
        print(f"{'ranks':>6} {'first step':>11} {'steps':>6} {'pairs':>7}")
        phases = []
        for number, ranks in enumerate(RANKS):
            phases.append(run_phase(folder, ranks, steps * (number + 1) // len(RANKS), steps, environment))
            phase = phases[-1]
            count = phase.last - phase.first
            print(f"{ranks:>6} {phase.first:>11} {count:>6} {count * GLOBAL_BATCH:>7}", flush=True)
        seen, wanted = pairs(folder), expected(folder, epochs)
    duplicates = sum(count - 1 for count in seen.values())
    missing, strange = len(wanted - seen.keys()), len(seen.keys() - wanted)
    every_phase = all(phase.last > phase.first for phase in phases) and phases[-1].last == steps
    print(f"\npairs (own epoch, key) seen by all ranks: {sum(seen.values())} of {len(wanted)}")
    print(f"duplicates={duplicates} missing={missing}")
    ok = not (duplicates or missing or strange) and every_phase
    report = {"duplicates": duplicates, "missing": missing, "not_of_these_epochs": strange, "pairs": sum(seen.values())}
    ranks_steps = [[phase.ranks, phase.last - phase.first] for phase in phases]
    print(json.dumps({"ok": ok, **report, "ranks_and_steps": ranks_steps}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
