"""Run every benchmark, or those named: python -m tests.benchmarks.run [--quick] [NAME...]

Each prints its own table; at the end a table of verdicts and one JSON line. Exit status 1 where one is not ok.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

NAMES = (
    "passes",
    "step_cost",
    "overhead",
    "order",
    "shuffle",
    "traffic",
    "stream",
    "faults",
    "hostile",
    "reshard",
    "kill",
    "checkpoint",
    "load",
    "interchange",
    "slurm",
    "quality",
)


def run(name: str, quick: bool) -> tuple[bool, float]:
    """One benchmark in a process of its own; its verdict and its wall time [s]."""
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *(["--quick"] if quick else [])]
    print(f"\n=== {' '.join(command[1:])}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    code = process.wait()
    try:
        verdict = bool(json.loads(last)["ok"])
    except (ValueError, KeyError, TypeError):
        verdict = False
    return verdict and code == 0, time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--quick", action="store_true", help="reduced counts")
    options = parser.parse_args()
    missing = [name for name in options.names if not Path(__file__).with_name(f"{name}.py").exists()]
    if missing:
        parser.error(f"no benchmark {', '.join(missing)}; choose from {', '.join(NAMES)}")
    results = {name: run(name, options.quick) for name in options.names}
    print(f"\n{'benchmark':<12} {'ok':<6} {'seconds':>8}")
    for name, (ok, seconds) in results.items():
        print(f"{name:<12} {ok!s:<6} {seconds:>8.1f}")
    ok = all(passed for passed, _ in results.values())
    print(
        json.dumps(
            {"ok": ok, **{name: {"ok": passed, "seconds": round(s, 1)} for name, (passed, s) in results.items()}}
        )
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
