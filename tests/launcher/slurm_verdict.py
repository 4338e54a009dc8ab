"""Whether a chain of jobs ended where one long job would."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Mapping

from tests.launcher.slurm_runs import ROOT, SlurmRun
from tests.launcher.slurm_scenarios import Scenario


def problems(run: SlurmRun, scenario: Scenario, expected: Mapping[str, bytes]) -> list[str]:
    """What is not as it should be; empty where all is well."""
    chain, status = run.chain(), run.status()
    found = []
    if chain.state != "finished" or status["state"] != "finished" or status["step"] != run.steps:
        found.append(f"ends {chain.state} ({chain.reason}), status {status['state']} at {status['step']}")
        return found
    reasons = [attempt.reason for attempt in chain.attempts]
    if not any(re.search(scenario.reason, reason) for reason in reasons):
        found.append(f"no attempt says {scenario.reason!r}: {reasons}")
    if not 1 < len(chain.attempts) <= scenario.starts:
        found.append(f"{len(chain.attempts)} starts, {scenario.starts} allowed")
    if (ends := mlflow_runs(run)) != ["FINISHED"]:
        found.append(f"MLflow has runs {ends}")
    parameters = run.parameters()
    if parameters.keys() != expected.keys() or any(parameters[name] != expected[name] for name in expected):
        found.append("final parameters are not bit-equal to the uninterrupted run's")
    return found


def mlflow_runs(run: SlurmRun) -> list[str]:
    """State of every MLflow run of this run's experiment, after what the end of the run left unsent has been sent."""
    subprocess.run(
        [sys.executable, "-m", "trainer.observe.tracking", str(run.folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    query = "select status from runs join experiments using (experiment_id) where experiments.name = ?"
    with sqlite3.connect(run.assets / "mlflow.db") as database:
        return [row[0] for row in database.execute(query, (run.experiment,))]
