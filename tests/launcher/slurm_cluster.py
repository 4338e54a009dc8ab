"""A real SLURM on this machine, as an ordinary process tree: munged, slurmctld and one slurmd per node.

Everything lies in one folder and listens on 127.0.0.1; it needs no systemd, no cgroups and no accounting data base.
Two partitions over all nodes: `main`, whose jobs are pre-empted and requeued by those of `urgent`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.launcher.network import Network

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
START_S = 60.0
KILL_WAIT_S = 5
"""Between SIGTERM and SIGKILL to a cancelled job."""
SILENT_NODE_S = 10
"""A slurmd that does not answer for so long makes its node DOWN."""


def missing_programs() -> list[str]:
    """Programs of SLURM that this machine lacks. Debian: apt-get install slurmctld slurmd slurm-client munge."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class SlurmCluster:
    """Nodes node1 .. nodeN. Use as a context manager; `environment` makes clients find it. network: every node is a host
    of its own there; without it all are this machine's loopback."""

    def __init__(self, folder: Path, nodes: int = 3, network: Network | None = None) -> None:
        self.folder, self.nodes, self.network = folder.resolve(), nodes, network
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = _free_ports(1 + nodes)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def run(self, *command: str, check: bool = True) -> str:
        """Standard output of a client (squeue, scontrol, ...)."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def __enter__(self) -> Self:
        self._configure()
        try:
            self._daemon("munged", "-F", "--force", *_flags(self.folder))
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
            self._daemon("slurmctld", "-D", "-c", "-i", "-f", str(self.folder / "slurm.conf"))
            for number in range(1, self.nodes + 1):
                self.start_node(f"node{number}")
            self._until(lambda: len(self.idle()) == self.nodes, "idle nodes")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def start_node(self, name: str) -> None:
        command = ["slurmd", "-D", "-c", "-N", name, "-f", str(self.folder / "slurm.conf")]
        self._daemon(name, *(self.network.on(int(name[4:]), *command) if self.network else command))

    def kill_node(self, name: str) -> None:
        """As a machine that loses its power: slurmd, the step's daemons and all that they started are gone at once."""
        doomed = [self.daemons[name].pid]
        for process in psutil.process_iter(["environ"]):
            environ = process.info["environ"] or {}
            mine = environ.get("SLURM_CONF") == str(self.folder / "slurm.conf")
            if mine and environ.get("SLURMD_NODENAME") == name:
                doomed.append(process.pid)
        for number in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.daemons.pop(name).wait()

    def idle(self) -> set[str]:
        lines = self.run("sinfo", "-h", "-N", "-o", "%N %t", check=False).splitlines()
        return {line.split()[0] for line in lines if line.endswith(" idle")}  # one line per node and partition

    def settle(self) -> None:
        """No jobs, all nodes idle."""
        self.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name, check=False)
        for number in range(1, self.nodes + 1):
            name = f"node{number}"
            if name not in self.daemons:
                self.start_node(name)
        self.run("scontrol", "update", "NodeName=ALL", "State=RESUME", check=False)
        self._until(lambda: len(self.idle()) == self.nodes and not self.run("squeue", "-h").strip(), "an empty cluster")

    def _daemon(self, name: str, *command: str) -> None:
        program = (name, *command) if command[0].startswith("-") else command
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                program, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not reached():
            for name, process in self.daemons.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended: {(self.folder / 'log' / f'{name}.out').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} within {START_S:.0f} s; logs: {self.folder / 'log'}")
            time.sleep(0.1)

    def _end(self) -> None:
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name, check=False)
        for name in sorted(self.daemons, key=lambda name: name == "munged"):  # the others talk through it
            process = self.daemons[name]
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _configure(self) -> None:
        for name in ("state", "log", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged refuses folders that others may write to
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        (self.folder / "slurm.conf").write_text(self._text())

    def _address(self, number: int) -> str:
        return self.network.address(number) if self.network else "127.0.0.1"

    def _text(self) -> str:
        folder, host, user = self.folder, socket.gethostname(), pwd.getpwuid(os.getuid()).pw_name
        nodes = "\n".join(
            f"NodeName=node{number} NodeHostname={host} NodeAddr={self._address(number)} Port={self.ports[number]} "
            f"CPUs=2 RealMemory=1000 State=UNKNOWN"
            for number in range(1, self.nodes + 1)
        )
        # Daemons bind to what this machine's name resolves to, the loopback, or to all addresses.
        binding = "" if self.network else "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
        # cred_expire: a requeued job waits so long before it starts again (120 s by default).
        return f"""ClusterName=test
SlurmctldHost={host}({self.network.own_address if self.network else "127.0.0.1"})
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={self.ports[0]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ReturnToService=2
KillWait={KILL_WAIT_S}
MinJobAge=300
{binding}
SlurmdTimeout={SILENT_NODE_S}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=01:00:00 MaxTime=1-00:00:00 PriorityTier=1 GraceTime=20 OverSubscribe=NO
PartitionName=urgent Nodes=ALL DefaultTime=01:00:00 MaxTime=1-00:00:00 PriorityTier=10 PreemptMode=OFF
"""


def _flags(folder: Path) -> Iterator[str]:
    names = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    yield from (f"--{flag}={folder}/{name}" for flag, name in {**names, "log-file": "log/munged.log"}.items())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
