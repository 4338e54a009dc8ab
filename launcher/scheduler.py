"""SLURM's own programs, called without a shell."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

PATIENCE_S = 120.0
"""Clients try a controller that does not answer for a while by themselves."""


class SchedulerError(RuntimeError):
    """A program of SLURM is missing, refused or did not answer; the message holds its words."""


@dataclass(frozen=True)
class QueuedJob:
    """What the controller says of a job. state: RUNNING, PENDING, ...; reason: why it waits; restarts: times it was
    requeued; preempted: it has been told to make room."""

    state: str
    reason: str
    restarts: int
    preempted: bool
    nodes: str
    excluded: str


def run(*command: str) -> str:
    """Standard output of a program of SLURM.

    Raises:
        SchedulerError: it is missing, did not answer, or its exit status is not 0.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except FileNotFoundError as error:
        raise SchedulerError(f"{command[0]} is not installed here: submit from a login node of the cluster") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{command[0]} does not answer within {PATIENCE_S:.0f} s: is slurmctld up?") from error
    if done.returncode:
        raise SchedulerError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def submit(script: str) -> str:
    """Submit a script file; the job's id."""
    return run("sbatch", "--parsable", script).strip().split(";")[0]


def job(number: str) -> QueuedJob | None:
    """What the controller knows of a job; None where it has forgotten it.

    Raises:
        SchedulerError: the controller does not answer.
    """
    try:
        text = run("scontrol", "show", "job", "-o", number)
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return parse_job(text)


def parse_job(text: str) -> QueuedJob:
    """One line of `scontrol show job -o`."""
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", text))
    return QueuedJob(
        state=fields.get("JobState", "UNKNOWN"),
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", "0")),
        preempted=fields.get("PreemptTime", "None") not in ("None", "N/A", "Unknown"),
        nodes=fields.get("NodeList", ""),
        excluded=fields.get("ExcNodeList", "(null)").replace("(null)", ""),
    )


def alive(found: QueuedJob | None) -> bool:
    """Whether a job runs, waits or ends."""
    return found is not None and found.state in (
        "PENDING",
        "RUNNING",
        "COMPLETING",
        "CONFIGURING",
        "SUSPENDED",
        "REQUEUED",
    )


def node_address(node: str) -> str:
    """The address under which SLURM reaches a node."""
    match = re.search(r"NodeAddr=(\S+)", run("scontrol", "show", "node", "-o", node))
    return match[1] if match else node


def hostnames(nodes: str) -> list[str]:
    """node[1-3] -> node1, node2, node3."""
    return run("scontrol", "show", "hostnames", nodes).split()


def usable_nodes(partition: str | None) -> set[str]:
    """Nodes of a partition, or of all, that are neither down nor drained."""
    where = ["-p", partition] if partition else []
    lines = run("sinfo", "-h", "-N", "-o", "%N %t", *where).splitlines()
    gone = re.compile(r"down|drain|drng|fail|maint|boot|unk|inval|plnd\*|\*$")
    return {line.split()[0] for line in lines if len(line.split()) == 2 and not gone.search(line.split()[1])}


def requeue(number: str) -> None:
    """Put the running job back into the queue; SLURM ends its processes."""
    run("scontrol", "requeue", number)


def exclude(number: str, nodes: list[str]) -> None:
    """Keep a job that has been requeued away from nodes; a running one cannot be changed."""
    run("scontrol", "update", f"JobId={number}", f"ExcNodeList={','.join(nodes)}")
