"""A chain of jobs against one long job: python -m tests.benchmarks.slurm [--quick] [SCENARIO...]

A real SLURM (munged, slurmctld, three slurmd on 127.0.0.1) trains the smoke configuration, shrunk to twelve steps, on two
nodes. Each scenario interferes; then the chain must have ended with parameters bit-equal to those of an uninterrupted
run, in one MLflow run, with a truthful state and the right reason. Two clusters share the scenarios. Without SLURM's
programs nothing is measured and `ok` is false. The last line is JSON; exit status 1 where a scenario is not ok.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.clusters import Cluster
from tests.launcher.slurm_cluster import SlurmCluster, missing_programs
from tests.launcher.slurm_runs import SlurmRun, make_assets
from tests.launcher.slurm_scenarios import SCENARIOS, Scenario, nothing
from tests.launcher.slurm_verdict import problems

CLUSTERS = 2
QUICK = ("time-limit warning",)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.slurm", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=f"of: {', '.join(s.name for s in SCENARIOS)}")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    options = parser.parse_args()
    if missing := missing_programs():
        print(
            f"not run: {', '.join(missing)} missing; tests/launcher/install_slurm.sh installs SLURM on Debian as root"
        )
        print(json.dumps({"ok": False, "missing": missing}))
        return 1
    names = options.names or (QUICK if options.quick else [scenario.name for scenario in SCENARIOS])
    unknown = set(names) - {scenario.name for scenario in SCENARIOS}
    if unknown:
        parser.error(f"no scenario {', '.join(sorted(unknown))}")
    chosen = [number for number, scenario in enumerate(SCENARIOS) if scenario.name in names]
    print(f"{'scenario':<32}{'ok':<7}{'starts':>7}{'seconds':>9}", flush=True)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        rows = measure(Path(folder), chosen)
    ok = all(not row["problems"] for row in rows) and len(rows) == len(chosen)
    kept = {row["name"]: [not row["problems"], row["starts"], row["seconds"]] for row in rows}
    print(json.dumps({"ok": ok, "scenarios": len(rows), "rows": kept}))
    return 0 if ok else 1


def measure(folder: Path, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of all scenarios, printed as they come."""
    assets = make_assets(folder / "assets")
    context = multiprocessing.get_context("spawn")
    tasks, answers, baseline = context.Queue(), context.Queue(), context.Event()
    for number in chosen:
        tasks.put(number)
    workers = min(CLUSTERS, len(chosen))
    processes = [
        context.Process(target=work, args=(folder / f"cluster_{index}", assets, tasks, answers, baseline, index == 0))
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    rows = []
    while len(rows) < len(chosen) and any(process.is_alive() for process in processes):
        try:
            rows.append(answers.get(timeout=1.0))
        except queue.Empty:
            continue
        show(rows[-1])
    for process in processes:
        process.join(60)
    return rows


def work(folder: Path, assets: Path, tasks: Any, answers: Any, baseline: Any, first: bool) -> None:
    """One cluster: takes scenarios until none is left. The first one runs the quiet run before."""
    quiet_folder = assets.parent / "quiet"
    with SlurmCluster(folder / "slurm") as slurm:
        if first:
            nothing(SlurmRun(slurm, assets, quiet_folder))
            baseline.set()
        else:
            baseline.wait()
        expected = SlurmRun(slurm, assets, quiet_folder).parameters()
        while True:
            try:
                number = tasks.get(timeout=1.0)
            except queue.Empty:
                return
            answers.put(row(slurm, assets, folder / f"run_{number}", SCENARIOS[number], expected))


def row(
    slurm: SlurmCluster, assets: Path, folder: Path, scenario: Scenario, expected: Mapping[str, bytes]
) -> dict[str, Any]:
    began = time.monotonic()
    run = SlurmRun(slurm, assets, folder, trouble=scenario.trouble, cluster=Cluster(**scenario.cluster))
    try:
        scenario.happen(run)
        found = problems(run, scenario, expected)
        starts = len(run.chain().attempts)
    except Exception:
        found, starts = [traceback.format_exc()[-6000:]], 0
    seconds = round(time.monotonic() - began, 1)
    slurm.settle()
    return {"name": scenario.name, "problems": found, "starts": starts, "seconds": seconds}


def show(row: Mapping[str, Any]) -> None:
    print(f"{row['name']:<32}{not row['problems']!s:<7}{row['starts']:>7}{row['seconds']:>9.1f}", flush=True)
    for problem in row["problems"]:
        print(f"    {problem}", flush=True)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
