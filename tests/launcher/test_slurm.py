"""The sbatch script as a text that a person has read (tests/launcher/recorded), and as bash and shellcheck see it."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from configs.clusters import Cluster, Container, load_cluster
from launcher.slurm import Submission, script

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "recorded"
JOB = Submission(
    name="pets",
    run=Path("/shared/runs/pets"),
    folder=Path("/shared/runs/pets/slurm/001"),
    code=Path("/shared/runs/pets/slurm/code/0123456789ab"),
    directory=Path("/home/me/project"),
    python="/home/me/venv/bin/python",
    arguments=("--config", "/shared/runs/pets/slurm/001/config_0.yaml", "tracking.uri=https://me:hunter2@host"),
    nproc=8,
    threads=12,
    steps=1000,
    cluster=Cluster(),
    revision="0123456789abcdef",
)


def job(nodes: int) -> Submission:
    name = {1: "cpu", 8: "h200_ib", 128: "p5_efa"}[nodes]
    cluster = load_cluster([ROOT / "configs" / "cluster" / f"{name}.yaml"], [f"nodes={nodes}"])
    return replace(JOB, cluster=cluster)


@pytest.mark.parametrize("nodes", [1, 8, 128])
def test_the_script_is_the_recorded_one(nodes: int) -> None:
    """Written again by: python -m tests.launcher.test_slurm, and then read."""
    assert script(job(nodes)) == (RECORDED / f"nodes_{nodes}.sbatch").read_text()


@pytest.mark.parametrize("nodes", [1, 8, 128])
def test_shellcheck_has_nothing_to_say(nodes: int) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (tests/launcher/install_slurm.sh)")
    done = subprocess.run(["shellcheck", str(RECORDED / f"nodes_{nodes}.sbatch")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_script_holds_no_override_and_so_no_secret() -> None:
    assert "hunter2" not in script(JOB)


def test_hostile_values_stay_values(tmp_path: Path) -> None:
    """The last line is run by a real bash with a program in place of the interpreter that shows what it got."""
    shown = tmp_path / "it's $(touch planted); python"
    shown.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$TRAP"\n')
    shown.chmod(0o755)
    trap = "a'b\"c $(touch planted) `touch planted`"
    cluster = Cluster(environment={"TRAP": trap}, srun=["--comment=$(touch planted)"], gpus_per_node=0)
    hostile = replace(JOB, python=str(shown), cluster=cluster, folder=tmp_path / "a b;c")
    done = subprocess.run(["bash", "-c", script(hostile)], cwd=tmp_path, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[:4] == ["-m", "launcher.batch", str(tmp_path / "a b;c"), "--"] and said[-1] == trap
    assert "--comment=$(touch planted)" in said
    assert not (tmp_path / "planted").exists()


def test_a_submission_is_read_as_it_was_written(tmp_path: Path) -> None:
    container = Container(kind="pyxis", image="a.sqsh", mounts=["/data:/data"])
    written = replace(JOB, cluster=Cluster(nodes=3, exclude=["n1"], container=container))
    (tmp_path / "submission.json").write_text(written.to_json())
    assert Submission.read(tmp_path) == written


if __name__ == "__main__":
    for count in (1, 8, 128):
        (RECORDED / f"nodes_{count}.sbatch").write_text(script(job(count)))
