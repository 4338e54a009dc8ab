"""`twinflow status` and `twinflow stop` of a run's folder; the real SLURM is in test_slurm_chain.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from launcher import scheduler
from launcher.chain import Attempt, Chain
from tests.launcher.test_cli import invoke


def a_run(folder: Path, state: str = "running") -> Path:
    (folder / "logs" / "x").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    content = {"state": state, "step": 4, "message": "training", "checkpoint": "ck/step_4"}
    (folder / "status.json").write_text(json.dumps(content))
    (folder / "heartbeat.json").write_text('{"step": 7, "stage": "targets"}')
    (folder / "logs" / "x" / "stderr.log").write_text("noise\nbar 1\rbar 2\r\nthe end\n")
    return folder


def test_a_run_is_told_with_its_live_step_and_last_words(tmp_path: Path) -> None:
    said = invoke("status", str(a_run(tmp_path))).output
    assert "running, step 7" in said and "stage 'targets'" in said and "ck/step_4" in said
    assert "the end" in said and "bar 2" in said and "bar 1" not in said
    assert "step 4" in invoke("status", str(a_run(tmp_path / "b", "stopped"))).output


def test_a_job_that_died_without_a_word_is_not_told_as_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (a_run(tmp_path) / "slurm").mkdir()
    attempt = Attempt("001", "41", 0, ["n1"], 1.0, 0, 2.0, 3, "warned before the time limit", "requeued")
    Chain(tmp_path / "slurm", "001", "41", "running", "", [attempt]).write()
    monkeypatch.setattr(scheduler, "run", lambda *command: "JobId=41 JobState=FAILED Reason=NonZeroExitCode Restarts=0")
    said = invoke("status", str(tmp_path)).output
    assert "failed (NonZeroExitCode); it ended without a word: twinflow submit goes on" in said
    assert "job 41.0 on n1: steps 0 to 3; requeued: warned before the time limit" in said


def test_status_without_slurm_says_so_and_tells_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (a_run(tmp_path) / "slurm").mkdir()
    Chain(tmp_path / "slurm", "001", "41", "queued").write()
    monkeypatch.setenv("PATH", str(tmp_path))
    said = invoke("status", str(tmp_path))
    assert said.exit_code == 0 and "unknown: scontrol is not installed here" in said.output and "step 7" in said.output


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    said = invoke("status", str(tmp_path))
    assert said.exit_code == 2 and "is no run of this trainer" in said.output


def test_stop_asks_the_local_torchrun(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as torchrun:
        lock = a_run(tmp_path) / "logs" / "lock"
        lock.write_text(f"{torchrun.pid} on {socket.gethostname()}")
        said = invoke("stop", str(tmp_path))
        assert said.exit_code == 0 and "finish their step" in said.output
        assert torchrun.wait(10) == -signal.SIGTERM


def test_stop_refuses_what_it_cannot_reach(tmp_path: Path) -> None:
    lock = a_run(tmp_path) / "logs" / "lock"
    lock.write_text(f"{os.getpid()} on another-host")
    assert "runs on another-host" in invoke("stop", str(tmp_path)).output
    done = invoke("stop", str(a_run(tmp_path / "done", "finished")))
    assert done.exit_code == 2 and "nothing of" in done.output
