"""Speed, memory and cost of steps on a GPU: python -m tests.benchmarks.gpu [--device cpu --tiny] [--only a,b,c,d]

(a) TFLOP/s of the real Qwen-Image block stack, as many of its 60 layers as can be trained in full on the card, for
graded passes with full recomputation and whole TwinFlow steps of order 2, by attention kernel, eager and compiled; share
of the rate of one large bfloat16 product, measured in the same run. FLOPs are those executed, recomputation included
(trainer/observe/flops.py). (b) adapters of the 20B model, random weights, at 1024 x 1024: largest micro-batch and images
a second in 80 GB and on the whole card. (c) a step in multiples of plain flow matching, packed and not. (d) bytes of
state by arithmetic against those held.

Every row is printed and appended to the file of rows as soon as it is known; the same command leaves out what is known,
so it may be cut off. No row begins that would not end within --budget-s. The table comes last, then a JSON line: `ok`
says that nothing failed and, on a GPU, that what was measured is above its bar; with --tiny on a CPU only that all ran.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import gpu_parts
from tests.benchmarks.gpu_ledger import Ledger, Values, shown
from tests.benchmarks.gpu_model import REAL, TINY, Builder
from trainer.engines.distributed import process_group

PARTS = {
    "a": gpu_parts.speed,
    "b": gpu_parts.adapters,
    "c": gpu_parts.step_costs,
    "d": gpu_parts.state,
}
BARS: dict[str, tuple[tuple[str, ...], str, float]] = {
    "graded pass, 1024": (("a graded pass 1024 ",), "share", 0.50),
    "step of order 2, 1024": (("a step 1024 ",), "share", 0.45),
    "adapters per block, 80 GB": (("b per block, 80 GB: largest",), "micro_batch", 12),
    "adapters in groups or offloaded, 80 GB": (
        ("b groups of 4, 80 GB: largest", "b offload, 80 GB: largest"),
        "micro_batch",
        24,
    ),
}
"""What -> beginnings of its rows, the value, and the least that the best of them must reach."""


def judge(rows: dict[str, Values]) -> dict[str, dict[str, Any]]:
    """The best of every bar's rows; bars none of whose rows was measured are absent."""
    verdicts = {}
    for what, (beginnings, value, bar) in BARS.items():
        found = [row[value] for key, row in rows.items() if key.startswith(beginnings) and value in row]
        if found:
            verdicts[what] = {"best": max(found), "bar": bar, "ok": max(found) >= bar}
    return verdicts


def measure(bench: gpu_parts.Bench, parts: list[str]) -> None:
    """All rows of the parts, one after the other."""
    found = bench.ledger.take(gpu_parts.matmul_rate(bench))
    if found is None or "tflops" not in found:
        return
    for part in parts:
        rows = PARTS[part](bench, found["tflops"]) if part == "a" else PARTS[part](bench)
        for row in rows:
            bench.ledger.take(row)
            if "error" in (bench.ledger.rows.get(row.key) or {}):
                bench.builder.free()


def conclude(ledger: Ledger, on_gpu: bool) -> int:
    """Table and JSON line; the exit status."""
    width = max(map(len, ledger.rows), default=0)
    print("\n" + "\n".join(f"{key:<{width}}  {shown(row)}" for key, row in ledger.rows.items()))
    failed = sorted(key for key, row in ledger.rows.items() if "error" in row)
    verdicts = judge(ledger.rows) if on_gpu else {}
    ok = not failed and not ledger.left_out and bool(ledger.rows) and all(v["ok"] for v in verdicts.values())
    counted = {"rows": len(ledger.rows), "not_run": sum("not_run" in row for row in ledger.rows.values())}
    print(json.dumps({"ok": ok, **counted, "failed": failed, "left_out": ledger.left_out, "bars": verdicts}))
    return 0 if ok else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and small images: whether everything runs")
    parser.add_argument("--only", default="a,b,c,d", help="parts to measure, in this order")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no row begins that would not end within it [s]")
    parser.add_argument("--rows", type=Path, default=Path("outputs/gpu_rows.jsonl"), help="file of rows")
    parser.add_argument("--retry", action="store_true", help="measure rows that failed again")
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU; --device cpu --tiny tries everything at tiny size")
    if options.device == "cpu" and not options.tiny:
        parser.error("on a CPU only with --tiny: the model of 20B takes days there")
    deadline = time.monotonic() + options.budget_s
    with process_group(600.0, options.device) as world:
        on_gpu = world.device.type == "cuda"
        name = torch.cuda.get_device_name(world.device) if on_gpu else "cpu"
        ledger = Ledger(options.rows, [name, torch.__version__, options.tiny], deadline, options.retry)
        builder = Builder(world.device, TINY if options.tiny else REAL)
        bench = gpu_parts.Bench(ledger, builder, repeats=3 if on_gpu else 1, most_rows=48 if on_gpu else 2)
        measure(bench, parts)
        builder.free()
    return conclude(ledger, on_gpu and not options.tiny)


if __name__ == "__main__":
    sys.exit(main())
