"""What to run, as pure functions: a job -> torchrun's arguments and environment."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SIGNALS = "SIGTERM,SIGINT,SIGUSR1"


@dataclass(frozen=True)
class Job:
    """Ranks on this machine. module: what every rank runs; threads: CPU threads of a rank; log_dir: a folder per rank
    with stdout.log and stderr.log appears below it; port: of the rendezvous, 0 takes a free one; stop_timeout_s: time
    that ranks have between a request to stop and SIGKILL."""

    module: str
    arguments: tuple[str, ...]
    nproc: int
    threads: int
    log_dir: Path
    root: Path
    port: int = 0
    stop_timeout_s: float = 600.0


def torchrun(job: Job) -> list[str]:
    """Arguments of torchrun. The rendezvous is on the loopback address by name, since a machine's host name may
    resolve to nothing; every rank's output goes to files, the launcher shows rank 0's."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "1", "--nproc-per-node", str(job.nproc)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{job.port}", "--rdzv-conf", "is_host=true"),
        *("--local-addr", "127.0.0.1", "--max-restarts", "0", "--signals-to-handle", SIGNALS),
        *("--log-dir", str(job.log_dir), "--redirects", "3"),
        *("-m", job.module, *job.arguments),
    ]


def environment(job: Job, base: Mapping[str, str]) -> dict[str, str]:
    """The ranks' environment: our root first on the path (other packages install a top-level `trainer`), quiet
    libraries, no hub, no progress bars but ours."""
    paths = [str(job.root), *filter(None, [base.get("PYTHONPATH")])]
    return {
        **base,
        "PYTHONPATH": ":".join(dict.fromkeys(paths)),
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
