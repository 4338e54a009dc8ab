"""What SLURM runs once on every node of a held allocation: python -m launcher.examine HEAD PORT NPROC MODULE ARGUMENT...

It becomes torchrun, whose ranks write to this terminal. SLURM_NODEID, SLURM_NNODES: set by srun.
"""

from __future__ import annotations

import os
import sys

from launcher.job import Meeting, torchrun_among
from launcher.node import local_address

_TIMEOUT_S = 120
_PORTS = 20_000, 10_000
"""First port, and how many: the first node's free ports are not known where this is decided."""


def arguments(head: str, nproc: int, module: str) -> list[str]:
    """Of this program. A job's number keeps two jobs of one node apart."""
    first, count = _PORTS
    return [head, str(first + int(os.environ["SLURM_JOB_ID"]) % count), str(nproc), module]


def main() -> None:
    """Replace this process by torchrun."""
    head, port, nproc, module, *rest = sys.argv[1:]
    number, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    local = local_address(head) if number else head
    meeting = Meeting(head, int(port), local, number == 0, nodes, _TIMEOUT_S, f"examine-{os.environ['SLURM_JOB_ID']}")
    os.execv(sys.executable, [sys.executable, "-m", *torchrun_among(meeting, int(nproc), module), *rest])


if __name__ == "__main__":
    main()
