"""What happens to a run under SLURM, one function each. Every chain must end where the quiet run ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from launcher.local import LaunchError
from launcher.status import describe
from tests.launcher.slurm_runs import SlurmRun


@dataclass(frozen=True)
class Scenario:
    """happen: the trouble, from a submitted run to an ended chain; reason: what one of the attempts must give as its
    reason; cluster: settings that a person would have made; trouble: see tests.launcher.troubled_train; starts: of the
    ranks in the whole chain, most."""

    name: str
    happen: Callable[[SlurmRun], None]
    reason: str
    cluster: dict[str, Any] = field(default_factory=dict)
    trouble: str = "none:0"
    starts: int = 3


def nothing(run: SlurmRun) -> None:
    run.submit()
    run.wait()


def time_limit(run: SlurmRun) -> None:
    """The signal that SLURM sends grace_s before the limit, to the batch shell alone."""
    in_training(run)
    run.slurm.run("scancel", "--batch", "--signal=USR1", run.chain().job)
    run.wait()


def preemption(run: SlurmRun) -> None:
    in_training(run)
    nodes = f"--nodes={run.slurm.nodes}"
    run.slurm.run("sbatch", "--partition=urgent", nodes, "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    run.wait()


def scancel(run: SlurmRun) -> None:
    in_training(run)
    run.slurm.run("scancel", run.chain().job)
    again(run, "stopped", "cancelled by scancel")


def node_down(run: SlurmRun) -> None:
    in_training(run)
    lost = run.chain().attempts[-1].nodes[1]
    run.slurm.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=test")
    run.wait()
    assert lost not in run.chain().attempts[-1].nodes or len(run.chain().attempts) > 1


def slurmd_killed(run: SlurmRun) -> None:
    in_training(run)
    lost = run.chain().attempts[-1].nodes[1]
    run.slurm.kill_node(lost)
    chain = run.wait(300)
    assert lost not in chain.attempts[-1].nodes, run.words()


def rank_killed(run: SlurmRun) -> None:
    """The node whose rank was killed is excluded from the next start."""
    run.submit()
    chain = run.wait()
    suspects = chain.attempts[0].suspects
    assert len(suspects) == 1 and suspects[0] not in chain.attempts[-1].nodes, run.words()


def disk_full(run: SlurmRun) -> None:
    """Every save fails until a person has made room."""
    run.submit()
    chain = run.wait()
    assert chain.state == "failed" and "No space left" in chain.reason, chain.reason
    assert "max_failures=2" in chain.reason, chain.reason
    run.log.touch()
    again(run, "failed", "without a new checkpoint")


def requeue_limit(run: SlurmRun) -> None:
    in_training(run)
    run.slurm.run("scancel", "--batch", "--signal=USR1", run.chain().job)
    again(run, "stopped", "limit of requeues")


def stopped(run: SlurmRun) -> None:
    """twinflow stop saves; a second submission meanwhile is refused."""
    in_training(run)
    with pytest.raises(LaunchError, match=r"is running already; `twinflow stop"):
        run.submit()
    assert "saves and ends" in run.stop()
    chain = run.wait()
    saved = chain.attempts[-1].checkpoint_after
    assert 0 < saved < run.steps and run.status()["step"] == saved, run.words()
    again(run, "stopped", "stopped on request")


def stopped_in_the_queue(run: SlurmRun) -> None:
    in_training(run)
    run.slurm.run("scancel", "--batch", "--signal=USR1", run.chain().job)
    run.until(lambda: "PENDING" in run.slurm.run("squeue", "-h", "-j", run.chain().job, "-o", "%T"), "the queue")
    assert "has left the queue" in run.stop()
    again(run, "stopped", "while it waited in the queue")


def launcher_killed(run: SlurmRun) -> None:
    """Nobody is left to say how it ended; a person submits again."""
    in_training(run)
    (batch,) = [process for process in psutil.process_iter(["cmdline"]) if is_batch(process, run)]
    os.kill(batch.pid, signal.SIGKILL)
    with run.here():
        run.until(lambda: "ended without a word" in str(describe(run.folder)), "a truthful status")
    run.submit()
    run.wait()


def is_batch(process: psutil.Process, run: SlurmRun) -> bool:
    command = process.info["cmdline"] or []
    return "launcher.batch" in command and str(run.folder) in " ".join(command[:4])


def in_training(run: SlurmRun) -> None:
    run.submit()
    run.until(lambda: run.steps_done() >= 4, "step 4")


def again(run: SlurmRun, state: str, reason: str) -> None:
    """The chain has ended so; the same command goes on."""
    chain = run.wait()
    assert chain.state == state and run.status()["state"] == state, run.words()
    assert reason in chain.reason, chain.reason
    run.submit()
    run.wait()


SCENARIOS = (
    Scenario("time-limit warning", time_limit, "warned before the time limit", starts=2),
    Scenario("pre-emption", preemption, "pre-empted by SLURM", starts=2),
    Scenario("scancel", scancel, "cancelled by scancel", starts=2),
    Scenario("node down", node_down, "the job ended without a word|pre-empted|node", starts=2),
    Scenario("slurmd killed", slurmd_killed, "nodes wrote nothing|without a word|pre-empted", starts=3),
    Scenario("rank hangs", nothing, "a rank hangs: no progress", {"silence_s": 15}, "hang:5", 2),
    Scenario("rank killed", rank_killed, "was killed by SIGKILL", trouble="kill:5", starts=2),
    Scenario("save fails once", nothing, "No space left", trouble="unsaved:12", starts=2),
    Scenario("disk full", disk_full, "No space left", {"max_failures": 2}, "full:1", 4),
    Scenario("requeue limit", requeue_limit, "limit of requeues", {"max_requeues": 0}, starts=2),
    Scenario("stop", stopped, "stopped on request", starts=2),
    Scenario("stop in the queue", stopped_in_the_queue, "warned before the time limit", starts=2),
    Scenario("launcher killed, resubmitted", launcher_killed, "ended without a word", starts=2),
)
