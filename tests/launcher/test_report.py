"""What a person reads at the end of a run, and the exit code."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.job import Job
from launcher.local import Outcome, status_stamp
from launcher.report import report

COMMAND = "twinflow train x.yaml"


def job(folder: Path) -> Job:
    return Job("trainer.train", (), nproc=2, threads=1, log_dir=folder / "logs" / "x", root=folder)


def stderr(folder: Path, rank: int, text: str) -> None:
    path = folder / "logs" / "x" / "none_abc" / "attempt_0" / str(rank) / "stderr.log"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def status(folder: Path, state: str, checkpoint: str | None = "ck/7", uri: str = "sqlite:///a b.db") -> None:
    content = {"state": state, "step": 7, "message": f"{state} at 7", "checkpoint": checkpoint, "pictures": ["p.png"]}
    path = folder / "status.json"
    path.write_text(json.dumps({**content, "mlflow": {"uri": uri, "run_id": "r1"}}))
    os.utime(path, ns=(1, 1))


def test_a_finished_run_lists_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(tmp_path, "finished")
    assert report(Outcome(0, 0, None), job(tmp_path), tmp_path, COMMAND) == 0
    said = capsys.readouterr().out
    for words in (str(tmp_path), "ck/7", "p.png", "mlflow ui --backend-store-uri 'sqlite:///a b.db'", "run r1"):
        assert words in said
    status(tmp_path, "finished", uri="http://tracker:5000")
    report(Outcome(0, 0, None), job(tmp_path), tmp_path, COMMAND)
    assert "MLflow      http://tracker:5000" in capsys.readouterr().out


def test_a_run_that_finishes_although_asked_to_stop_is_finished(tmp_path: Path) -> None:
    status(tmp_path, "finished")
    assert report(Outcome(1, signal.SIGINT, None), job(tmp_path), tmp_path, COMMAND, stamp=0) == 0


def test_the_end_of_an_earlier_start_is_not_taken_for_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status(tmp_path, "finished")
    stamp = status_stamp(tmp_path)
    assert report(Outcome(1, signal.SIGINT, None), job(tmp_path), tmp_path, COMMAND, stamp) == 130
    assert "stopped without saving" in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (0, 143)])
def test_a_stopped_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    status(tmp_path, "stopped")
    assert report(Outcome(1 if number else 0, number, None), job(tmp_path), tmp_path, COMMAND) == code
    assert f"go on with: {COMMAND}" in capsys.readouterr().out


def test_a_stop_before_the_first_checkpoint_promises_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(Outcome(1, signal.SIGTERM, None), job(tmp_path), tmp_path, COMMAND) == 143
    assert "no checkpoint yet" in capsys.readouterr().err


def test_brackets_in_a_message_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stderr(tmp_path, 0, "")
    stderr(tmp_path, 1, "  9%|█ | 3/9\n[rank1]: OSError: [Errno 2] [/data/x] :warning:\n")
    status(tmp_path, "running")
    assert report(Outcome(1, 0, (1, -9)), job(tmp_path), tmp_path, COMMAND) == 1
    said = capsys.readouterr().err
    assert "[rank1]: OSError: [Errno 2] [/data/x] :warning:" in said and "9%" not in said
    assert "rank 1 was killed by SIGKILL" in said and "saved so far: ck/7" in said


def test_a_rank_that_only_missed_the_other_does_not_hide_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stderr(tmp_path, 0, "noise\nrank 0 failed at step 3: rank 1 has no batch; its own message says why\n")
    stderr(tmp_path, 1, "\nrank 1 failed at step 3: shard digits-3.tar is missing\nput it back\n")
    report(Outcome(1, 0, (0, 1)), job(tmp_path), tmp_path, COMMAND)
    said = capsys.readouterr().err
    assert "rank 0 ended with exit code 1" in said and "noise" not in said
    assert "shard digits-3.tar is missing\nput it back" in said


def test_the_same_words_of_all_ranks_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        stderr(tmp_path, rank, f"rank {rank} failed: the folder holds another run\n")
    report(Outcome(1, 0, (1, 1)), job(tmp_path), tmp_path, COMMAND)
    assert capsys.readouterr().err.count("holds another run") == 1
    log = tmp_path / "logs" / "x" / "none_abc" / "attempt_0" / "0" / "stderr.log"
    log.write_text("rank 0 failed: the folder holds another run\nMLflow did not take everything\n")
    for first in (0, 1):
        report(Outcome(1, 0, (first, 1)), job(tmp_path), tmp_path, COMMAND)
        assert capsys.readouterr().err.count("holds another run") == 1


def test_a_rank_that_dies_without_a_word_does_not_hide_what_others_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stderr(tmp_path, 0, "")
    stderr(tmp_path, 1, "rank 1 failed at step 3: shard digits-3.tar is missing\n")
    report(Outcome(1, 0, (0, 1)), job(tmp_path), tmp_path, COMMAND)
    assert "digits-3.tar is missing" in capsys.readouterr().err


def test_tracebacks_that_differ_are_both_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, cause in ((0, "RuntimeError: peer gone"), (1, "KeyError: 'txt'")):
        stderr(tmp_path, rank, f"rank {rank} failed at step 3: Traceback (most recent call last):\n  here\n{cause}\n")
    report(Outcome(1, 0, (0, 1)), job(tmp_path), tmp_path, COMMAND)
    said = capsys.readouterr().err
    assert "RuntimeError: peer gone" in said and "KeyError: 'txt'" in said
