"""Memory of resuming: python -m tests.benchmarks.load [--quick]

A checkpoint of more than 3 GB is resumed by two fresh CPU ranks whose model was built on meta. Extra memory of a rank is
its peak resident memory (VmHWM) less what it held before the model was built. The bar: the rank's shard of the state, two of
the largest units and 300 MB. The values are checked. The last line is JSON; exit status 1 where a rank is above the bar.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from configs.schema import Checkpoint
from tests.benchmarks.wide_network import WideBackbone, wide_engine
from tests.ranks import run_ranks, stop_ranks
from trainer.engines.engine import TensorPart
from trainer.saving.checkpoint import Checkpoints

GROUPS = ("parameter", "exp_avg", "exp_avg_sq", "ema")
MARGIN = 300e6


def status(name: str) -> float:
    """A field of /proc/self/status [bytes]."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024.0


def value(group: str, name: str) -> float:
    return (GROUPS.index(group) + 1) / 8 + sum(name.encode()) / 2**20


def write(folder: str, blocks: int, width: int) -> int:
    """One process writes the checkpoint: other ranges than those that two ranks read. Its bytes."""
    with torch.device("meta"):
        backbone = WideBackbone(blocks, width)
    shapes = {name: tuple(parameter.shape) for name, parameter in backbone.named_parameters()}
    # One element repeated: the source takes no memory, the staged copy all of it.
    parts = [
        TensorPart(group, name, shape, 0, torch.full((1,), value(group, name)).expand(torch.Size(shape).numel()))
        for name, shape in shapes.items()
        for group in GROUPS
    ]
    counters = {"optimizer_step": 7.0, "ema_decay": 0.6}
    Checkpoints(Path(folder), Checkpoint(), {"engine": "fsdp2"}).write(7, parts, counters)
    return sum(part.local.numel() * 4 for part in parts)


def resume(folder: str, blocks: int, width: int) -> dict[str, Any]:
    checkpoints = Checkpoints(Path(folder), Checkpoint(), {})
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = status("VmRSS")
    engine = wide_engine(blocks, width)
    began = time.monotonic()
    done = checkpoints.resume(engine)
    seconds = time.monotonic() - began
    peak = status("VmHWM")
    wrong = [
        f"{part.group}/{part.name}"
        for part in engine.parts()
        if not bool((part.local == value(part.group, part.name)).all())
    ]
    shard = sum(part.local.numel() * part.local.element_size() for part in engine.parts())
    return {"step": done.step, "extra": peak - before, "shard": shard, "seconds": seconds, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.load", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a third of a gigabyte")
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    options = parser.parse_args()
    blocks, width = (10, 1024) if options.quick else (24, 2048)
    with tempfile.TemporaryDirectory(prefix="load-", dir=options.folder) as name:
        (size,) = run_ranks(write, 1, name, blocks, width, timeout=560.0)
        stop_ranks()  # what was written is not in the memory of those that read
        results = run_ranks(resume, 2, name, blocks, width, timeout=560.0)
        stop_ranks()
    unit = (2 * width * width + 2 * width) * 4
    print(f"checkpoint {size / 1e9:.3f} GB, largest unit {unit / 1e6:.0f} MB")
    print(f"{'rank':>4}{'shard MB':>10}{'extra MB':>10}{'bar MB':>10}{'seconds':>9}{'MB/s':>8}  ok")
    verdicts = []
    for rank, found in enumerate(results):
        bar = found["shard"] + 2 * unit + MARGIN
        verdicts.append(found["extra"] <= bar and not found["wrong"] and found["step"] == 7)
        numbers = (found["shard"] / 1e6, found["extra"] / 1e6, bar / 1e6)
        print(f"{rank:>4}" + "".join(f"{number:>10.0f}" for number in numbers), end="")
        print(f"{found['seconds']:>9.2f}{found['shard'] / 1e6 / found['seconds']:>8.0f}  {verdicts[-1]}")
        for tensor in found["wrong"][:3]:
            print(f"PROBLEM rank {rank}: {tensor} holds other numbers than were saved")
    ok = all(verdicts) and (options.quick or size >= 3e9)
    extra = [round(found["extra"] / 1e6) for found in results]
    shard = [round(found["shard"] / 1e6) for found in results]
    print(json.dumps({"benchmark": "load", "ok": ok, "gb": round(size / 1e9, 3), "extra_mb": extra, "shard_mb": shard}))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
