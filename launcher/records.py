"""What the launcher reads and writes in a run's folder beside the ranks."""

from __future__ import annotations

import re
from pathlib import Path

from configs.clusters import Cluster
from configs.folders import write_json
from launcher.local import read_status

_STEP = re.compile(r"step_(\d{8,})")
FIRM = {"finished", "stopped", "failed"}


def checkpoint_step(run: Path) -> int:
    """Step of the newest checkpoint: of those in the run's folder, or the one that its status names; 0 without any."""
    names = [path.name for path in (run / "checkpoints").glob("step_*")]
    names += str(read_status(run).get("checkpoint") or "").rstrip("/").split("/")[-1:]
    return max([int(match[1]) for name in names if (match := _STEP.fullmatch(name))], default=0)


def set_status(run: Path, state: str, message: str) -> None:
    """Make status.json tell how the chain stands, where the ranks could not, or did not know it."""
    status = read_status(run)
    if status.get("state") == "finished":
        return
    step = status.get("step", 0) if status.get("state") in FIRM else checkpoint_step(run)
    write_json(run / "status.json", {**status, "state": state, "step": step, "message": message})


def grace_warning(run: Path, cluster: Cluster) -> str:
    """Why the grace before the time limit is too short for a save as long as the run's longest so far; empty where it
    is not, or where no save was measured yet."""
    seconds = float(read_status(run).get("save_seconds") or 0.0)
    if cluster.grace_s >= 1.5 * seconds:
        return ""
    return (
        f"a save of this run takes {seconds:.0f} s, SLURM warns {cluster.grace_s} s before the limit: set "
        f"grace_s={int(2 * seconds) + 60} in the cluster file, or the last steps of every job are lost"
    )


def grace_too_short(run: Path, cluster: Cluster) -> bool:
    """Whether not even the save alone fits."""
    return cluster.grace_s < float(read_status(run).get("save_seconds") or 0.0)
