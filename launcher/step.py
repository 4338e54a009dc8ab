"""The step of a job: srun with one launcher.node per node, followed to its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from launcher import scheduler
from launcher.local import rank_log
from launcher.node import STOP
from launcher.report import readable
from launcher.scheduler import SchedulerError
from launcher.slurm import Submission
from launcher.watch import Watch

POLL_S = 0.5
LINGER_S = 60.0
"""After one node has failed the others have so long to say what they know."""

_EXPLAINED = re.compile(r"rank \d+ failed")

Nodes = Mapping[int, dict[str, Any]]
"""By number what launcher.node wrote at its end; nodes that wrote nothing are absent."""


class Step:
    """One start of the ranks of a job. logs: where each node writes."""

    def __init__(self, submission: Submission, command: Sequence[str], logs: Path, job: str) -> None:
        self.submission, self.command, self.logs, self.job = submission, command, logs, job
        self._watch = Watch(submission.run, submission.cluster.startup_s, submission.cluster.silence_s)
        self._asked: float | None = None
        self._failed: float | None = None

    def follow(self, look: Callable[[], str]) -> int:
        """Start, wait and call `look` in between; the exit status of srun. Where `look` gives a reason the step is
        ended."""
        with open(self.logs / "srun.log", "ab") as log:
            process = subprocess.Popen(
                self.command,
                env={**os.environ, **self._environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ending = 0.0
        while (code := process.poll()) is None:
            if look() and time.monotonic() - ending > LINGER_S:
                ending = time.monotonic()
                self._kill(process)
            time.sleep(POLL_S)
        return code

    def ask_to_stop(self) -> None:
        """Ask the ranks to save and stop; launcher.node on this very machine sees the file."""
        (self.logs / STOP).touch()
        self._asked = self._asked or time.monotonic()

    def trouble(self) -> str:
        """Why the step cannot be left alone any longer, or an empty text."""
        now, cluster = time.monotonic(), self.submission.cluster
        if self._asked is not None and now - self._asked > cluster.stop_s:
            return f"asked to stop, but not saved within {cluster.stop_s:g} s (stop_s)"
        nodes = read_nodes(self.logs, cluster.nodes)
        if self._failed is None and any(node["code"] for node in nodes.values()):
            self._failed = now
        if self._failed is not None and now - self._failed > LINGER_S:
            return self.explain(nodes, 1)
        return "" if self._asked is not None else self._watch.look()

    def explain(self, nodes: Nodes, code: int) -> str:
        """What ended the step: the death that was first, or srun's words; empty where nothing failed."""
        failed = [node for node in nodes.values() if node["code"]]
        if not failed:
            return f"srun ended with status {code}: {self._last_words()}" if code else ""
        first = _first_death(nodes) or min(failed, key=lambda node: node["ended"])
        silent = self.submission.cluster.nodes - len(nodes)
        gone = f"; {silent} nodes wrote nothing" if silent else ""
        if not first["died"]:
            return f"torchrun on {first['node']} ended with status {first['code']}{gone}"
        rank, status = first["died"]
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        number = next(number for number, node in nodes.items() if node is first)
        log = rank_log(self.logs / f"node_{number}", rank, "stderr")
        words = [line for line in readable(log) if _EXPLAINED.match(line)]
        return f"local rank {rank} on {first['node']} {how}{gone}: {words[-1] if words else f'see {log}'}"

    def _environment(self) -> dict[str, str]:
        """Where the ranks meet: at the first node, which is the machine that this process runs on."""
        cluster = self.submission.cluster
        first = scheduler.hostnames(os.environ["SLURM_JOB_NODELIST"])[0]
        head = address_of(cluster.interface) if cluster.interface else _resolved(scheduler.node_address(first))
        return {
            "TWINFLOW_LOGS": str(self.logs),
            "TWINFLOW_HEAD": head,
            "TWINFLOW_PORT": str(cluster.port or _free_port(head)),
        }

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        try:
            steps = scheduler.run("squeue", "--steps", "-h", "--jobs", self.job, "-o", "%i").split()
            for step in steps:
                if step.rpartition(".")[2].isdigit():
                    scheduler.run("scancel", "--signal=KILL", step)
        except SchedulerError as error:
            print(f"warning: {error}", flush=True)
            process.kill()

    def _last_words(self) -> str:
        path = self.logs / "srun.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        said = [line for line in lines if line.strip()]
        return " | ".join(said[-3:]) or "nothing"


def read_nodes(logs: Path, count: int) -> Nodes:
    """What the nodes wrote down at their end, by number."""
    paths = {number: logs / f"node_{number}.json" for number in range(count)}
    return {number: json.loads(path.read_text()) for number, path in paths.items() if path.exists()}


def suspects_of(nodes: Nodes, names: Sequence[str]) -> list[str]:
    """Nodes that failed, as opposed to programs: a rank was killed there by a signal, or nothing was heard of the node
    although others spoke. An error that a rank explains is no fault of its node."""
    found = [names[number] for number in range(len(names)) if nodes and number not in nodes]
    first = _first_death(nodes)
    if first is not None and first["died"][1] < 0:
        found += [names[number] for number, node in nodes.items() if node is first]
    return found


def address_of(interface: str) -> str:
    """The address of a network interface of this machine; SchedulerError where it has none."""
    addresses = psutil.net_if_addrs()
    found = [entry.address for entry in addresses.get(interface, []) if entry.family == socket.AF_INET]
    if not found:
        known = ", ".join(sorted(addresses))
        raise SchedulerError(f"the first node has no interface {interface} (interface) with an address; it has {known}")
    return found[0]


def _first_death(nodes: Nodes) -> dict[str, Any] | None:
    """The node whose rank died first. A rank that a signal killed is the cause of the others' errors, whatever the
    clocks of the machines say."""
    dead = [node for node in nodes.values() if node["died"]]
    return min(dead, key=lambda node: (node["died"][1] >= 0, node["ended"]), default=None)


def _resolved(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise SchedulerError(f"the first node {host} has no address here ({error}); set interface") from error


def _free_port(address: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
