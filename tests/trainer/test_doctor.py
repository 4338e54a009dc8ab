"""`twinflow doctor` as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str) -> tuple[int, str, dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "250"}
    command = [sys.executable, "-m", "launcher.cli", "doctor", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout, done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_healthy_machine_ends_with_zero_and_one_line_of_json() -> None:
    code, shown, report = doctor("--quick", "--nproc", "2")
    assert code == 0 and report["ok"] and (report["ranks"], report["nodes"]) == (2, 1)
    assert "2 ranks on 1 nodes" in shown and "GB/s" in shown
    assert {"GPU", "attention", "all-reduce", "links", "clocks"} <= {row["check"] for row in report["findings"]}


@pytest.mark.slow
def test_what_would_spoil_a_run_is_red_with_a_remedy_and_the_exit_status_says_so(tmp_path: Path) -> None:
    settings = ("run.name=x", f"run.dir={tmp_path}/run", f"data.manifest={tmp_path}/none", "data.held_out=null")
    code, _, report = doctor("configs/smoke.yaml", *settings, "runtime.nproc=1", "--quick")
    (red,) = [row for row in report["findings"] if row["level"] == "red"]
    assert code == 1 and not report["ok"] and red["check"] == f"data {tmp_path}/none"
    assert "none/manifest.json" in red["value"] and red["remedy"]
    assert list(tmp_path.iterdir()) == []


def test_a_refused_configuration_ends_with_two() -> None:
    command = [sys.executable, "-m", "launcher.cli", "doctor", "configs/smoke.yaml", "train.stps=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "did you mean train.steps" in done.stderr
