"""What `twinflow submit` writes and refuses; a stand-in answers for SLURM."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from configs import load
from configs.clusters import Cluster
from configs.folders import ForeignFolder, refuse_foreign
from launcher import scheduler, submit
from launcher.chain import Chain
from launcher.local import LaunchError
from launcher.slurm import Submission
from launcher.submit import Request
from tests.launcher.test_cli import SMOKE, invoke

ROOT = Path(__file__).parents[2]


def request_for(run: Path, cluster: Cluster | None = None) -> Request:
    files, overrides = [SMOKE], [f"run.dir={run}", "tracking.uri=https://me:hunter2@host/x"]
    return Request(load.load(files, overrides), files, overrides, ("train.steps",), run, cluster or Cluster())


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Calls of SLURM's programs; a job is in no queue until the test says so."""
    calls: list[tuple[str, ...]] = []

    def run(*command: str) -> str:
        calls.append(command)
        if command[0] == "sbatch":
            return "41;cluster\n"
        raise scheduler.SchedulerError("scontrol: Invalid job id specified")

    monkeypatch.setattr(scheduler, "run", run)
    return calls


def test_a_submission_holds_all_that_the_job_needs(tmp_path: Path, queue: list[tuple[str, ...]]) -> None:
    request = request_for(tmp_path / "run")
    job = submit.write(submit.plan(request, ROOT), request.files, ROOT)
    assert submit.submit(job) == "41" and queue == [("sbatch", "--parsable", str(job.folder / "job.sbatch"))]
    assert Submission.read(job.folder) == job
    assert (job.code / "trainer" / "train.py").read_text() == (ROOT / "trainer" / "train.py").read_text()
    assert stat.S_IMODE(job.folder.stat().st_mode) == 0o700  # the user's files and overrides may hold secrets
    files, overrides = [job.arguments[1]], list(job.arguments[4:])
    assert job.arguments[2:4] == ("--allow-change", "train.steps") and files[0].startswith(str(job.folder))
    config = load.load(files, overrides)
    assert config.tracking.uri == "https://me:hunter2@host/x" and config.run.dir == str(tmp_path / "run")
    chain = Chain.read(tmp_path / "run")
    assert chain is not None and (chain.job, chain.submission, chain.state) == ("41", "001", "queued")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["message"] == "submitted as job 41"
    refuse_foreign(tmp_path / "run")  # it is a run's folder from now on
    assert submit.plan(request, ROOT).folder.name == "002"


def test_a_second_job_beside_a_living_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slurm").mkdir()
    Chain(tmp_path / "slurm", "001", "41").write()
    monkeypatch.setattr(scheduler, "run", lambda *command: "JobId=41 JobState=PENDING Reason=Resources Restarts=0")
    with pytest.raises(LaunchError, match=r"job 41 of this run is pending already; `twinflow stop"):
        submit.refuse_impossible(request_for(tmp_path))


def test_a_grace_shorter_than_a_save_is_refused_and_a_tight_one_warned_of(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "status.json").write_text('{"save_seconds": 100.0, "state": "stopped"}')
    with pytest.raises(LaunchError, match=r"a save of this run takes 100 s, SLURM warns 90 s .* grace_s=260"):
        submit.refuse_impossible(request_for(tmp_path, Cluster(grace_s=90)))
    assert "grace_s=260" in submit.refuse_impossible(request_for(tmp_path, Cluster(grace_s=120)))
    assert submit.refuse_impossible(request_for(tmp_path, Cluster(grace_s=150))) == ""


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ForeignFolder):
        submit.refuse_impossible(request_for(tmp_path))


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    said = invoke("submit", SMOKE, f"run.dir={tmp_path / 'run'}", "--set", "nodes=128", "--dry-run")
    assert said.exit_code == 0 and "#SBATCH --nodes=128" in said.output
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_cluster_file_is_one_message(tmp_path: Path) -> None:
    said = invoke("submit", SMOKE, f"run.dir={tmp_path / 'run'}", "--set", "nodse=2")
    assert said.exit_code == 2 and "did you mean nodes?" in said.output
