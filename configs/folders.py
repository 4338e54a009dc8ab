"""Where a run lives; known to the launcher before any rank starts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from configs.schema import Config

OURS = "run.json"
CHAIN = Path("slurm/chain.json")
"""In the folder of a run that was submitted to SLURM, from the submission on."""
HEARTBEAT = "heartbeat.json"
"""Rank 0 rewrites it while it makes progress: step and stage."""


class ForeignFolder(ValueError):
    """The folder holds something that is not a run of this trainer."""


def run_folder(config: Config) -> Path:
    """run.dir, or outputs/<run.name>."""
    return Path(config.run.dir) if config.run.dir else Path("outputs") / config.run.name


def unused(path: Path) -> Path:
    """The path itself, or with -2, -3, ... appended, whichever does not exist."""
    number, candidate = 2, path
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def refuse_foreign(path: Path) -> None:
    """ForeignFolder where the folder is neither absent, empty, nor a run's."""
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if entries - {"logs", "slurm"} and OURS not in entries and not (path / CHAIN).exists():
        raise ForeignFolder(
            f"{path} exists and is not a run of this trainer (no {OURS}); choose another run.name or run.dir, or --fresh"
        )


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one act."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)
