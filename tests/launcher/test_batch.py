"""What the batch process writes and asks SLURM for; stand-ins answer for SLURM and for the step."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.clusters import Cluster
from launcher import batch, scheduler
from launcher.batch import Batch
from launcher.chain import Attempt, Chain
from tests.launcher.test_slurm import JOB


class Slurm:
    """A controller that knows one job; `shown` is what it says of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.shown = "JobId=7 JobState=RUNNING Reason=None Restarts=0 PreemptTime=None"

    def __call__(self, *command: str) -> str:
        self.calls.append(command)
        if command[:3] == ("scontrol", "show", "hostnames"):
            return "n1\nn2\n"
        if command[:3] == ("scontrol", "show", "job"):
            return self.shown
        if command[0] == "sinfo":
            return "n1 alloc\nn2 alloc\nn3 idle\n"
        return ""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    fake = Slurm()
    monkeypatch.setattr(scheduler, "run", fake)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    yield fake
    for number, handler in handlers.items():
        signal.signal(number, handler)


def ended(run: Path, happen: Callable[[Batch], None], **cluster: Any) -> tuple[int, Chain]:
    """A start in which `happen` is all that happens; its exit status and the chain."""
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    (run / "logs").mkdir(exist_ok=True)
    place = Cluster(nodes=2, notify_command=tell(run), **cluster)
    made = Batch(replace(JOB, run=run, cluster=place), ["srun"])

    def follow(look: Callable[[], str]) -> int:
        happen(made)
        look()
        return 1

    made.step.follow = follow  # type: ignore[method-assign]
    code = made.run()
    chain = Chain.read(run)
    assert chain is not None
    return code, chain


def tell(run: Path) -> list[str]:
    return [sys.executable, "-c", f"import sys; open({str(run / 'told')!r}, 'a').write(sys.stdin.read())"]


def status(run: Path, state: str, step: int = 5, **more: Any) -> None:
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(
        json.dumps({"state": state, "step": step, "message": f"{state} at {step}", **more})
    )


def test_a_warned_job_is_requeued_without_the_node_that_failed(tmp_path: Path, slurm: Slurm) -> None:
    def lose_a_node(made: Batch) -> None:
        status(tmp_path, "running")
        record = {"node": "n1", "code": 1, "died": [0, 1], "began": 1, "ended": 2}
        (made.logs / "node_0.json").write_text(json.dumps(record))

    _, chain = ended(tmp_path, lose_a_node, exclude=[])
    assert chain.state == "queued" and chain.attempts[0].suspects == ["n2"] and "1 nodes wrote nothing" in chain.reason
    assert ("scontrol", "requeue", "7") in slurm.calls
    assert ("scontrol", "update", "JobId=7", "ExcNodeList=n2") in slurm.calls
    said = json.loads((tmp_path / "status.json").read_text())
    assert said["state"] == "stopped" and said["step"] == 5 and "requeued as job 7" in said["message"]
    assert not (tmp_path / "told").exists()


def test_a_signal_becomes_the_file_that_the_first_node_obeys(tmp_path: Path, slurm: Slurm) -> None:
    def warn(made: Batch) -> None:
        signal.raise_signal(signal.SIGUSR1)
        assert made._look() == "" and (made.logs / "stop").exists()
        status(tmp_path, "stopped")

    _, chain = ended(tmp_path, warn)
    assert chain.state == "queued" and chain.reason == "saved: warned before the time limit"


def test_what_slurm_requeues_itself_is_not_requeued_again(tmp_path: Path, slurm: Slurm) -> None:
    def make_room(made: Batch) -> None:
        slurm.shown = slurm.shown.replace("Restarts=0", "Restarts=1")
        signal.raise_signal(signal.SIGTERM)

    _, chain = ended(tmp_path, make_room)
    assert chain.attempts[0].preempted and chain.attempts[0].reason == batch.PREEMPTED
    assert not [call for call in slurm.calls if call[:2] == ("scontrol", "requeue")]


def test_a_cancelled_job_has_said_so_before_slurm_kills_it(tmp_path: Path, slurm: Slurm) -> None:
    def cancel(made: Batch) -> None:
        slurm.shown = slurm.shown.replace("RUNNING", "COMPLETING")
        signal.raise_signal(signal.SIGTERM)
        made._look()
        chain = Chain.read(tmp_path)
        assert chain is not None and chain.state == "stopped" and "cancelled by scancel" in chain.reason
        status(tmp_path, "stopped")

    _, chain = ended(tmp_path, cancel)
    assert chain.state == "stopped" and chain.attempts[0].checkpoint_after == 5
    assert (tmp_path / "told").read_text().count("state: stopped") == 1


def test_a_requeue_that_slurm_refuses_ends_the_chain_and_tells_a_person(tmp_path: Path, slurm: Slurm) -> None:
    def refuse(*command: str) -> str:
        if command[:2] == ("scontrol", "requeue"):
            raise scheduler.SchedulerError("scontrol requeue 7: Requested operation is disabled")
        return Slurm.__call__(slurm, *command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "run", refuse)
        code, chain = ended(tmp_path, lambda made: status(tmp_path, "stopped"))
    assert code == 1 and chain.state == "failed" and "cannot be requeued: scontrol requeue 7" in chain.reason
    assert "cannot be requeued" in (tmp_path / "told").read_text()


def test_starts_that_nobody_could_end_use_up_the_patience_too(tmp_path: Path, slurm: Slurm) -> None:
    (tmp_path / "slurm").mkdir()
    lost = [Attempt("001", "7", number, ["n1"], 1.0, 0) for number in range(2)]
    Chain(tmp_path / "slurm", "001", "7", "running", "", lost).write()
    code, chain = ended(tmp_path, lambda made: pytest.fail("the ranks were started"), max_failures=2)
    assert code == 1 and chain.state == "failed" and "2 jobs in a row without a new checkpoint" in chain.reason


def test_a_save_that_hardly_fits_the_grace_is_named(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, lambda made: status(tmp_path, "stopped", save_seconds=500.0))
    assert (
        "a save of this run takes 500 s, SLURM warns 600 s before the limit: set grace_s=1060"
        in capsys.readouterr().out
    )
