"""What saving costs a run: python -m tests.benchmarks.checkpoint [--quick]

Two CPU ranks hold a gigabyte of state (parameters, moments, averages) in the FSDP2 engine. Synchronous saves (copy, write,
fsync, publish) and asynchronous ones take turns; the stall of an asynchronous save is the time for which `save` holds the
loop. Then a save is killed at 20 byte positions. The last line is JSON; exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Checkpoint
from tests.benchmarks.wide_network import train_step, wide_engine
from tests.ranks import run_ranks, stop_ranks
from tests.trainer.saving.parts import parts_of
from trainer.engines.engine import Engine
from trainer.saving import certificate, checkpoint_store, durable
from trainer.saving.checkpoint import Checkpoints
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoint_store import LocalCheckpoints

STALL, EXCESS, POSITIONS = 0.15, 0.01, 20


def timed(action: Callable[[], Any]) -> float:
    """Seconds, from when all ranks begin to when the last one ends."""
    dist.barrier()
    began = time.monotonic()
    action()
    seconds = torch.tensor(time.monotonic() - began, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def on_rank(folder: str, blocks: int, width: int, rounds: int) -> dict[str, Any]:
    """Synchronous and asynchronous saves in turn; seconds of each, and of steps alone and beside a save."""
    engine = wide_engine(blocks, width)
    checkpoints = Checkpoints(Path(folder), Checkpoint(keep_last=1), {"engine": "fsdp2"})
    state = sum(part.local.numel() * part.local.element_size() for part in engine.parts())
    found: dict[str, Any] = {"state": state, "sync": [], "stall": [], "alone": [], "beside": [], "write": []}
    train_step(engine)
    checkpoints.save(engine, 1, 0.0)  # the first: it allocates the host buffers
    checkpoints.finish()
    step = 1
    for _ in range(rounds):
        step += 1
        found["sync"].append(timed(partial(save_at_once, checkpoints, engine, step)))
        found["alone"] += [timed(lambda: train_step(engine)) for _ in range(3)]
        step += 1
        found["stall"].append(timed(partial(checkpoints.save, engine, step, 0.0)))
        while not ended(checkpoints):
            found["beside"].append(timed(lambda: train_step(engine)))
        found["write"] += [saved.seconds for saved in checkpoints.outcomes()]
        checkpoints.finish()
    return found


def save_at_once(checkpoints: Checkpoints, engine: Engine, step: int) -> None:
    checkpoints.write(step, engine.parts(), engine.counters())


def ended(checkpoints: Checkpoints) -> bool:
    """Whether the save under way is over on all ranks: they must make the same number of steps."""
    over = torch.tensor(int(checkpoints.abandon(0.0)))
    dist.all_reduce(over, op=dist.ReduceOp.MIN)
    return bool(over)


def killed_at(folder: Path, position: float, total: int) -> str:
    """Save in a child that dies at a share of the bytes of all files; what is wrong then, or nothing."""
    child = os.fork()
    if child == 0:
        _die_after(int(position * total))
        Checkpoints(folder, Checkpoint(keep_last=1), {}).write(10, parts_of(content(10)), {})
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    store, target = LocalCheckpoints(folder), content(0)
    newest = checkpoint_store.latest(store)
    if status != -signal.SIGKILL or newest != "step_00000005":
        return f"killed at {position:.0%}: status {status}, newest {newest}"
    CheckpointReader(store, newest).fill(parts_of(target))
    if not torch.equal(target["w"], content(5)["w"]):
        return f"killed at {position:.0%}: the earlier checkpoint is not what it was"
    taken = sorted(store.listing().keys() - {newest})
    return f"killed at {position:.0%}: {taken} count as checkpoints" if taken else ""


def _die_after(left: int) -> None:
    original, budget = durable.write_all, [left]

    def dying(descriptor: int, piece: memoryview) -> None:
        piece = memoryview(piece)
        original(descriptor, piece[: budget[0]])
        if len(piece) >= budget[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        budget[0] -= len(piece)

    durable.write_all = dying


def content(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((1 << 20,), float(step)), "b": torch.full((1000,), float(step))}


def killed_saves(positions: int) -> list[str]:
    torch.set_num_threads(1)  # a forked child waits for ever for the threads of its parent's pool
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        folder = Path(name)
        first = Checkpoints(folder, Checkpoint(keep_last=1), {}).write(5, parts_of(content(5)), {})
        total = sum((folder / first / file).stat().st_size for file in LocalCheckpoints(folder).listing()[first])
        # The last position is amid the certificate, the first amid the header.
        shares = [(number + 0.5) / positions for number in range(positions - 2)]
        shares = [20 / total, *shares, 1 - 100 / total]
        return [problem for share in shares if (problem := killed_at(folder, share, total))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.checkpoint", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of a gigabyte, two rounds; the stall is not judged"
    )
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    options = parser.parse_args()
    problems = killed_saves(POSITIONS)
    blocks, width, rounds = (4, 896, 2) if options.quick else (8, 2048, 4)
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=options.folder) as name:
        results = run_ranks(on_rank, 2, name, blocks, width, rounds, timeout=560.0)
        stop_ranks()
        store = LocalCheckpoints(Path(name))
        newest = checkpoint_store.latest(store)
        written = sum(store.listing()[newest].values()) if newest else 0
        size = store.listing()[newest][certificate.NAME] if newest else 0
    state = sum(result["state"] for result in results)
    seen = results[0]  # the times are those of the slowest rank on both
    stall, sync = statistics.median(seen["stall"]), statistics.median(seen["sync"])
    alone, beside = statistics.median(seen["alone"]), statistics.median(seen["beside"] or [float("nan")])
    excess = written / state - 1
    print(f"{'':<44}{'median':>10}  all")
    for label, times in (
        ("synchronous save with fsync [s]", seen["sync"]),
        ("stall of an asynchronous save [s]", seen["stall"]),
        ("its writing in the background [s]", seen["write"]),
        ("step alone [s]", seen["alone"]),
        ("step beside a save [s]", seen["beside"]),
    ):
        print(
            f"{label:<44}{statistics.median(times or [float('nan')]):>10.3f}  {' '.join(f'{t:.3f}' for t in times[:8])}"
        )
    print(f"state {state / 1e9:.3f} GB, written {written / 1e9:.3f} GB ({excess:+.4%}), certificate {size} bytes")
    print(
        f"stall {stall / sync:.1%} of a synchronous save (bar {STALL:.0%}); steps beside a save x {beside / alone:.2f}"
    )
    print(f"killed at {POSITIONS} byte positions: {POSITIONS - len(problems)} never taken for a checkpoint")
    for problem in problems:
        print(f"PROBLEM {problem}")
    enough = options.quick or (state >= 1e9 and stall <= STALL * sync)
    ok = not problems and 0 <= excess <= EXCESS and enough
    figures = {
        "state_gb": round(state / 1e9, 3),
        "stall_share": round(stall / sync, 4),
        "slowdown_beside": round(beside / alone, 3),
        "bytes_excess": round(excess, 6),
        "killed_positions": POSITIONS,
    }
    print(json.dumps({"benchmark": "checkpoint", "ok": ok, **figures}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
