"""What to run, as pure functions: a job -> torchrun's arguments and environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SIGNALS = "SIGTERM,SIGINT,SIGUSR1"


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of a run meet. head, port: of the first node; local: this node's own address, under which the
    others reach it; is_host: this is the first node; nodes: how many meet; timeout_s: for the last one to come; id: of
    the run, so that a leftover of an earlier start is not taken for a member."""

    head: str
    port: int
    local: str
    is_host: bool
    nodes: int
    timeout_s: int
    id: str


@dataclass(frozen=True)
class Job:
    """Ranks on this machine. module: what every rank runs; threads: CPU threads of a rank; log_dir: a folder per rank
    with stdout.log and stderr.log appears below it; port: of the rendezvous, 0 takes a free one; stop_timeout_s: time
    that ranks have between a request to stop and SIGKILL; meeting: where there are ranks on other machines too."""

    module: str
    arguments: tuple[str, ...]
    nproc: int
    threads: int
    log_dir: Path
    root: Path
    port: int = 0
    stop_timeout_s: float = 600.0
    meeting: Meeting | None = None


def torchrun(job: Job) -> list[str]:
    """Arguments of torchrun. The rendezvous is by address and every node is told whether it is the host, since a
    machine's host name may resolve to nothing or to another address; every rank's output goes to files, the launcher
    shows rank 0's."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *_rendezvous(job.meeting, job.port, job.nproc),
        *("--max-restarts", "0", "--signals-to-handle", SIGNALS),
        *("--log-dir", str(job.log_dir), "--redirects", "3"),
        *("-m", job.module, *job.arguments),
    ]


def _rendezvous(given: Meeting | None, port: int, nproc: int) -> list[str]:
    meeting = given or Meeting("127.0.0.1", port, "127.0.0.1", True, 1, 0, "")
    name, rules = [], f"is_host={str(meeting.is_host).lower()}"
    if given is not None:
        name = ["--rdzv-id", meeting.id]
        rules += f",timeout={meeting.timeout_s},join_timeout={meeting.timeout_s}"
    return [
        *("--nnodes", str(meeting.nodes), "--nproc-per-node", str(nproc)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{meeting.head}:{meeting.port}", "--rdzv-conf", rules),
        *name,
        *("--local-addr", meeting.local),
    ]


def torchrun_here(nproc: int, module: str) -> list[str]:
    """Module and arguments for ranks on this machine whose output goes to this terminal; no torchrun for a single one."""
    if nproc == 1:
        return [module]
    return [
        *("torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(nproc)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-conf", "is_host=true"),
        *("--local-addr", "127.0.0.1", "--max-restarts", "0", "-m", module),
    ]


def torchrun_among(meeting: Meeting, nproc: int, module: str) -> list[str]:
    """The same for the ranks of one of several machines."""
    return ["torch.distributed.run", *_rendezvous(meeting, 0, nproc), "--max-restarts", "0", "-m", module]


def environment(job: Job, base: Mapping[str, str]) -> dict[str, str]:
    """The ranks' environment: our root first on the path (other packages install a top-level `trainer`), quiet
    libraries, no hub, no progress bars but ours. The interpreter's folder, where tools lie that libraries call (ninja),
    is on PATH."""
    tools, known = str(Path(sys.executable).parent), base.get("PATH", os.defpath)
    paths = [str(job.root), *filter(None, [base.get("PYTHONPATH")])]
    return {
        **base,
        "PYTHONPATH": ":".join(dict.fromkeys(paths)),
        "PATH": known if tools in known.split(os.pathsep) else f"{tools}{os.pathsep}{known}",
        "OMP_NUM_THREADS": str(job.threads),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(job.stop_timeout_s)),
        "PYTHONWARNINGS": base.get("PYTHONWARNINGS", "ignore::FutureWarning"),
        "TRANSFORMERS_VERBOSITY": base.get("TRANSFORMERS_VERBOSITY", "error"),
        "HF_HUB_OFFLINE": base.get("HF_HUB_OFFLINE", "1"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def processes(wanted: int | None, gpus: int) -> int:
    """Ranks on this machine: as configured, else one per GPU, else one."""
    return wanted or gpus or 1


def threads(wanted: int | None, cores: int, nproc: int) -> int:
    """CPU threads of a rank: as configured, else an equal share of the cores."""
    return wanted or max(cores // nproc, 1)
