"""Which node is to blame, and what a person reads about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.slurm import Submission
from launcher.step import Step, suspects_of
from tests.launcher.test_slurm import job

NAMES = ["n1", "n2"]


def node(name: str, code: int, died: tuple[int, int] | None, ended: float) -> dict[str, Any]:
    return {"node": name, "code": code, "died": died, "ended": ended}


def test_a_killed_rank_and_a_silent_node_are_suspect_an_explained_error_is_not() -> None:
    killed = {0: node("n1", 1, (0, 1), 5.0), 1: node("n2", 1, (3, -9), 6.0)}  # clocks differ: the signal is the cause
    assert suspects_of(killed, NAMES) == ["n2"]
    assert suspects_of({0: node("n1", 1, (0, 1), 5.0)}, NAMES) == ["n2"]
    assert suspects_of({0: node("n1", 1, (0, 1), 5.0), 1: node("n2", 1, (0, 1), 5.0)}, NAMES) == []
    assert suspects_of({}, NAMES) == []  # nobody spoke: the step was ended from outside


def step(tmp_path: Path) -> Step:
    submission: Submission = job(8)
    submission.cluster.nodes = 2
    return Step(submission, ["true"], tmp_path, "7")


def test_the_first_death_is_told_in_the_words_of_its_rank(tmp_path: Path) -> None:
    log = tmp_path / "node_1" / "id_x" / "attempt_0" / "3" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("noise\nrank 11 failed at step 4: the shard pets-7.tar is missing\n")
    nodes = {0: node("n1", 1, (0, 1), 6.0), 1: node("n2", 1, (3, 1), 5.0)}
    said = step(tmp_path).explain(nodes, 1)
    assert "local rank 3 on n2 ended with exit code 1: rank 11 failed at step 4: the shard pets-7.tar" in said
    killed = {1: node("n2", 1, (3, -9), 5.0)}
    assert "local rank 3 on n2 was killed by SIGKILL; 1 nodes wrote nothing" in step(tmp_path).explain(killed, 1)


def test_a_step_that_never_started_is_told_in_the_words_of_srun(tmp_path: Path) -> None:
    (tmp_path / "srun.log").write_text("pyxis: image not found\n")
    assert "srun ended with status 1: pyxis: image not found" in step(tmp_path).explain({}, 1)
    assert step(tmp_path).explain({}, 0) == ""
