"""The run's folder is the run (architecture, contract Run): what it is, how far it came, whether it may go on.

config.yaml (resolved) · run.json (identity, circumstance) · status.json · journal.jsonl · checkpoints/ · pictures/ · logs/
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import load as configuration
from configs.folders import OURS, refuse_foreign, run_folder, unused
from configs.schema import Config


class RunRefused(ValueError):
    """The folder holds something that this configuration must not continue or overwrite."""


@dataclass(frozen=True)
class RunFolder:
    """path: the folder; finished: an earlier process reached the last step and wrote its results."""

    path: Path
    finished: bool

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    def write_status(self, state: str, step: int, message: str, **more: Any) -> None:
        """state: running | finished | stopped | failed. The launcher and `status` read this file."""
        write_json(self.path / "status.json", {"state": state, "step": step, "message": message, **more})


def open_run(
    config: Config, data_identity: dict[str, Any], world_size: int, fresh: bool, allow_change: Sequence[str]
) -> RunFolder:
    """Create the folder, or check that it holds this very run. On rank 0 only.

    Raises RunRefused with every difference of identity that allow_change does not name.
    """
    path = unused(run_folder(config)) if fresh else run_folder(config)
    record = path / OURS
    identity = {**configuration.identity(config), "data_order": data_identity}
    circumstance = {**configuration.circumstance(config), "world_size": world_size}
    if record.exists():
        earlier = json.loads(record.read_text())
        if _has_progress(path):  # a start that failed at once, on a mistake in its configuration, binds nobody
            _refuse_changes(path, earlier["identity"], identity, allow_change)
    else:
        refuse_foreign(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "pictures").mkdir(exist_ok=True)
    configuration.save(config, path / "config.yaml")
    write_json(record, {"identity": identity, "circumstance": circumstance})
    return RunFolder(path, finished=_finished(path, config.train.steps))


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one act."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def _has_progress(path: Path) -> bool:
    """Whether the run has trained: a checkpoint, or metrics in its journal."""
    journal = path / "journal.jsonl"
    # The checkpoints first: the journal of a long run is large.
    return any((path / "checkpoints").glob("step_*")) or (
        journal.exists() and '"kind": "metrics"' in journal.read_text()
    )


def _finished(path: Path, steps: int) -> bool:
    status = path / "status.json"
    if not status.exists():
        return False
    content = json.loads(status.read_text())
    return content["state"] == "finished" and content["step"] >= steps


def _refuse_changes(path: Path, earlier: Any, identity: Any, allow_change: Sequence[str]) -> None:
    changes = configuration.difference(earlier, identity)
    refused = [change for change in changes if not _allowed(change[0], allow_change)]
    if refused:
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, old, new in refused)
        raise RunRefused(
            f"{path} holds another run; these keys that define it differ:\n{lines}\n"
            "Go on with the earlier values, name each changed key with --allow-change KEY, "
            "or start a new run with --fresh or another run.name"
        )


def _allowed(key: str, allow_change: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allow_change)
