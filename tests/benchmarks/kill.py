"""kill -9 at named points and random times: python -m tests.benchmarks.kill [--quick]

Two CPU ranks train the tiny Qwen-Image on digits, through the trainer's own entry. Chains of a few kills and restarts end
in a run that finishes. After every kill the newest complete checkpoint must be, bit for bit, the uninterrupted run's of
that step; the restart must go on from it; and the final parameters, moments and averages must be bit-equal to those of
the uninterrupted run. The last line is JSON; exit status 1 where a kill broke a promise or a point was not reached.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 8, 2
CHAIN = 3
"""Kills of one trajectory, at random times."""
PATIENCE_S, DEATH_S = 240.0, 30.0
AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

# (name, rank, nth). A chain resumes, so nth counts from the start of its own link. "during resume" needs a checkpoint
# before it; the tracker may fall behind the run and comes last. A shard is written in two pieces and sent in two parts.
LOCAL = [
    [("mid shard write", 0, 1), ("mid shard write", 1, 3), ("during resume", 0, 1)],
    [("before publication", 0, 2), ("during resume", 1, 2), ("mid shard write", 1, 3)],
    [("after publication", 0, 1), ("before the rename", 0, 1), ("in the tracker", 0, 1)],
    [("after staging", 0, 1), ("after staging", 1, 2), ("amid retention", 0, 2)],
    [("mid certificate", 0, 1), ("after the save", 1, 1), ("in the journal", 0, 3)],
    [("in a loader worker", 0, 4), ("in a loader worker", 1, 2), ("during resume", 1, 1)],
    [("before the update", 0, 5), ("before the update", 1, 2), ("before the average", 0, 2)],
    [("in the agreement", 1, 4), ("in the agreement", 0, 3), ("before the average", 1, 2)],
    [("after publication", 0, 2), ("during resume", 0, 2), ("before publication", 0, 1)],
    [("mid certificate", 0, 2), ("after the save", 1, 2), ("in the tracker", 0, 1)],
]
S3 = [
    [("mid upload", 0, 4), ("mid upload", 1, 1), ("during resume", 1, 1)],
    [("before the upload ends", 1, 2), ("before the certificate's put", 0, 1), ("after the certificate's put", 0, 1)],
    [("after the certificate's put", 0, 2), ("during resume", 0, 1), ("amid retention on S3", 0, 1)],
    [("mid upload", 1, 3), ("amid retention on S3", 0, 2), ("before the upload ends", 0, 1)],
]
KILLS, RANDOM_CHAINS = 60, 20
"""Kills of a full run; chains of random times go on until there are so many, at most RANDOM_CHAINS of them."""
QUICK_LOCAL = [[("mid shard write", 1, 3), ("during resume", 0, 1), ("before publication", 0, 1)]]
QUICK_S3 = [[("mid upload", 0, 4), ("before the certificate's put", 0, 1), ("after the certificate's put", 0, 1)]]


@dataclass
class Bench:
    """assets: data and model; reference: checkpoint name -> tensors of the uninterrupted run."""

    folder: Path
    endpoint_url: str
    rng: random.Random
    reference: dict[str, dict[str, bytes]] = field(default_factory=dict)
    run_seconds: float = 0.0
    """Shortest time that a run has taken to its end; random kills come within it."""

    def arguments(self, run: Path, where: str | None, workers: int) -> list[str]:
        settings = {
            "run.name": "kill",
            "run.dir": run,
            "model.path": self.folder / "model",
            "data.manifest": self.folder / "digits/train",
            "data.held_out": "null",
            "data.workers": workers,
            "data.prefetch": 1,  # a loader that died must be missed before the run is over
            "train.steps": STEPS,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 4,
            "schedule.warmup_steps": 2,
            "checkpoint.every": EVERY,
            "tracking.uri": f"sqlite:///{self.folder}/mlflow.db",
            "tracking.every": 1,
            "tracking.held_out_every": 0,
            "sample.prompts": "[]",
            "evaluate.name": "null",
            "checkpoint.endpoint_url": self.endpoint_url,
            **({"checkpoint.dir": where} if where else {}),
        }
        return ["--config", str(ROOT / "configs/smoke.yaml"), *(f"{key}={value}" for key, value in settings.items())]


@dataclass
class Verdict:
    kills: int = 0
    equal_ends: int = 0
    ends: int = 0
    points: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def start(bench: Bench, run: Path, where: str | None, point: Any, keep_every: int = 0) -> tuple[Any, list[Any]]:
    """The store of a rendezvous and two rank processes."""
    import torch.distributed as dist

    from tests.benchmarks import kill_rank

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    run.parent.mkdir(parents=True, exist_ok=True)
    arguments = [*bench.arguments(run, where, point.workers if point else 0), f"checkpoint.keep_every={keep_every}"]
    given = (arguments, str(run) + ".log", point, AWS)
    ranks = [context.Process(target=kill_rank.main, args=(rank, store.port, *given)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return store, ranks


def wait(ranks: list[Any], patience_s: float) -> list[int | None]:
    """Exit codes; after the first death the others have a while to notice, then they are killed as a launcher does."""
    deadline = time.monotonic() + patience_s
    while any(rank.exitcode is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode not in (None, 0) for rank in ranks):
            deadline = min(deadline, time.monotonic() + DEATH_S)
        time.sleep(0.02)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        if rank.exitcode is None:
            rank.kill()
        rank.join()
    return codes


def tensors(where: str | Path, endpoint_url: str, name: str) -> dict[str, bytes]:
    """Everything in a checkpoint as bytes."""
    from trainer.saving.checkpoint_content import chunks
    from trainer.saving.checkpoint_reader import CheckpointReader
    from trainer.saving.checkpoint_store import open_store

    reader = CheckpointReader(open_store(where, endpoint_url), name)
    return {
        f"{group}/{tensor}": b"".join(chunk.numpy().tobytes() for chunk in chunks(reader, group, tensor))
        for group, named in reader.certificate.tensors.items()
        for tensor in named
    }


def newest(where: str | Path, endpoint_url: str) -> str | None:
    from trainer.saving.checkpoint_store import latest, open_store

    return latest(open_store(where, endpoint_url))


def make_reference(bench: Bench) -> None:
    run = bench.folder / "quiet" / "run"
    began = time.monotonic()
    _store, ranks = start(bench, run, None, None, keep_every=EVERY)
    codes = wait(ranks, PATIENCE_S)
    bench.run_seconds = time.monotonic() - began
    assert codes == [0, 0], f"the uninterrupted run ended with {codes}:\n{said(run)}"
    for step in range(EVERY, STEPS + 1, EVERY):
        name = f"step_{step:08d}"
        bench.reference[name] = tensors(run / "checkpoints", "", name)


def said(run: Path) -> str:
    return "".join(Path(f"{run}.log.{rank}").read_text()[-3000:] for rank in range(2))


def chain(bench: Bench, number: int, points: list[Any], on_s3: bool, verdict: Verdict) -> None:
    """Kill, look, restart ... and at last let it finish."""
    run = bench.folder / f"chain{number}" / "run"
    where: str | Path = f"s3://kills/chain{number}" if on_s3 else run / "checkpoints"
    for point in [*points, None]:
        expected = newest(where, bench.endpoint_url)
        label = f"chain {number}, {describe(point)}"
        _store, ranks = start(bench, run, str(where) if on_s3 else None, None if isinstance(point, float) else point)
        began = time.monotonic()
        if isinstance(point, float):
            time.sleep(point * bench.run_seconds)
            victims = bench.rng.sample(ranks, bench.rng.choice((1, 1, 2)))
            for victim in victims:
                victim.kill()
        codes = wait(ranks, PATIENCE_S)
        if codes == [0, 0]:  # the machine may have become faster; a kill after the end is none
            bench.run_seconds = min(bench.run_seconds, time.monotonic() - began)
        problem = judge(bench, run, where, expected, point, codes, verdict)
        if problem:
            verdict.problems.append(f"{label}: {problem}")
    shutil.rmtree(run.parent)


def describe(point: Any) -> str:
    if point is None:
        return "the end"
    return f"at {point:.2f} of a run" if isinstance(point, float) else f"{point.name}, rank {point.rank}, {point.nth}"


def judge(
    bench: Bench,
    run: Path,
    where: str | Path,
    expected: str | None,
    point: Any,
    codes: list[int | None],
    verdict: Verdict,
) -> str:
    """What is wrong after a start, or nothing."""
    resumed = run.parent / "resumed.jsonl"
    steps = [int(line) for line in resumed.read_text().split()] if resumed.exists() else []
    resumed.unlink(missing_ok=True)
    if steps and steps != [int(expected.removeprefix("step_")) if expected else 0]:
        return f"went on from step {steps} where {expected} was the newest complete checkpoint"
    found = newest(where, bench.endpoint_url)
    if found is not None and tensors(where, bench.endpoint_url, found) != bench.reference[found]:
        return f"{found} is not the uninterrupted run's"
    if point is None:
        verdict.ends += 1
        if codes != [0, 0] or found != f"step_{STEPS:08d}":
            return f"did not finish: {codes}, {found}\n{said(run)}"
        verdict.equal_ends += 1
        return ""
    if isinstance(point, float) and codes == [0, 0]:
        return ""  # it had finished before
    by_worker = getattr(point, "name", "") == "in a loader worker"
    if not (by_worker and codes == [1, 1]) and -9 not in codes:
        return f"nobody was killed: {codes}\n{said(run)}"
    verdict.kills += 1
    verdict.points[point.name if not isinstance(point, float) else "random time"] += 1
    return ""


def plan(quick: bool, rng: random.Random) -> list[tuple[list[Any], bool]]:
    from tests.benchmarks.kill_rank import Point

    def points(rows: list[list[tuple[str, int, int]]], s3: bool) -> list[tuple[list[Any], bool]]:
        return [([Point(name, rank, nth, s3, int("worker" in name)) for name, rank, nth in row], s3) for row in rows]

    if quick:
        return points(QUICK_LOCAL, False) + points(QUICK_S3, True)
    at_random: list[tuple[list[Any], bool]] = [
        ([rng.uniform(0.05, 0.7) for _ in range(CHAIN)], number % 3 == 2) for number in range(RANDOM_CHAINS)
    ]
    return points(LOCAL, False) + points(S3, True) + at_random


def make_assets(folder: Path) -> None:
    for verb in (("data.demo", folder / "digits"), ("models.tiny", folder / "model", "--preset", "digits")):
        command = [sys.executable, "-m", *map(str, verb)]
        subprocess.run(
            command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kill", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="6 kills in 2 chains")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", **AWS}
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.benchmarks.kill_rank"])
    from tests.data.conftest import ObjectStore

    for name in ("werkzeug", "trainer.saving.checkpoint_store"):
        logging.getLogger(name).setLevel(logging.ERROR)
    began, verdict, rng = time.monotonic(), Verdict(), random.Random(7)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        server = ObjectStore()
        server.client.create_bucket(Bucket="kills")
        bench = Bench(Path(name), server.endpoint_url, rng)
        make_assets(bench.folder)
        make_reference(bench)
        print(f"an undisturbed run of {STEPS} steps takes {bench.run_seconds:.1f} s\n")
        for number, (points, on_s3) in enumerate(plan(options.quick, rng)):
            if isinstance(points[0], float) and verdict.kills >= KILLS:
                break
            before = time.monotonic()
            chain(bench, number, points, on_s3, verdict)
            at = "s3" if on_s3 else "disk"
            named = "; ".join(describe(point) for point in points)
            print(f"{number:>3} {at:<5}{time.monotonic() - before:>6.1f} s  {named}", flush=True)
        server.stop()
    print("\n" + "\n".join(f"{count:>4}  {point}" for point, count in sorted(verdict.points.items())))
    for problem in verdict.problems:
        print(f"PROBLEM {problem}")
    wanted = 6 if options.quick else KILLS
    ok = not verdict.problems and verdict.kills >= wanted and verdict.equal_ends == verdict.ends
    counts = {"kills": verdict.kills, "ends": verdict.ends, "bit_equal_ends": verdict.equal_ends}
    print(json.dumps({"benchmark": "kill", "ok": ok, **counts, "seconds": round(time.monotonic() - began, 1)}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
