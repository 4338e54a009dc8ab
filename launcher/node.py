"""What SLURM runs once on every node: python -m launcher.node SUBMISSION. It starts this node's ranks by torchrun, and
writes down how they ended, since torchrun loses that when it is signalled.

SLURM_NODEID, SLURM_NNODES, SLURM_JOB_ID: set by srun. TWINFLOW_LOGS, TWINFLOW_HEAD, TWINFLOW_PORT: set by launcher.batch.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from configs.folders import write_json
from launcher import local
from launcher.job import Job, Meeting
from launcher.slurm import Submission

STOP = "stop"
"""File in the logs of a start: its appearance asks the ranks to save and stop."""


def main() -> int:
    """Run this node's ranks; 0 when all ended well."""
    submission = Submission.read(Path(sys.argv[1]))
    number = int(os.environ["SLURM_NODEID"])
    logs, began = Path(os.environ["TWINFLOW_LOGS"]), time.time()
    job = node_job(submission, os.environ, local_address(os.environ["TWINFLOW_HEAD"]) if number else "")
    stop_file = logs / STOP if number == 0 else None  # the ranks agree: one node is enough to tell them
    outcome = local.Runner(job, stop_file=stop_file, shared_signals=True).run()
    record = {
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "code": outcome.code,
        "died": outcome.died,
        "began": began,
        "ended": time.time(),
    }
    write_json(logs / f"node_{number}.json", record)
    return int(outcome.code != 0)


def node_job(submission: Submission, environment: Mapping[str, str], address: str) -> Job:
    """The ranks of this node. address: under which the others reach it; empty on the first node, whose address all
    know."""
    head = environment["TWINFLOW_HEAD"]
    number = environment["SLURM_NODEID"]
    logs = Path(environment["TWINFLOW_LOGS"])
    meeting = Meeting(
        head=head,
        port=int(environment["TWINFLOW_PORT"]),
        local=address or head,
        is_host=number == "0",
        nodes=int(environment["SLURM_NNODES"]),
        timeout_s=int(submission.cluster.startup_s),
        id=logs.name,
    )
    return Job(
        module=submission.module,
        arguments=submission.arguments,
        nproc=submission.nproc,
        threads=submission.threads,
        log_dir=logs / f"node_{number}",
        root=submission.code,
        stop_timeout_s=submission.cluster.stop_s,
        meeting=meeting,
    )


def local_address(head: str) -> str:
    """This machine's address on the way to `head`; nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in head else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))
        address: str = probe.getsockname()[0]
        return address


if __name__ == "__main__":
    sys.exit(main())
