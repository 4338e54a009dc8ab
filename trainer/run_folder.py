"""The run's folder is the run (architecture, contract Run): what it is, how far it came, whether it may go on.

config.yaml (resolved) · run.json (identity, circumstance) · status.json · journal.jsonl · checkpoints/ · pictures/ · logs/
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import load as configuration
from configs.folders import OURS, refuse_foreign, run_folder, unused, write_json
from configs.schema import Config
from trainer.saving.checkpoint_store import CheckpointStore, open_store

CONFIG_FILE = "config.yaml"


class RunRefused(ValueError):
    """The folder holds something that this configuration must not continue or overwrite."""


@dataclass(frozen=True)
class RunFolder:
    """path: the folder; finished: an earlier process reached the last step and wrote its results; changes: (key, earlier
    value, value now) of what is different in a run that goes on, whether --allow-change named it or nobody must ask;
    config: the resolved configuration as config.yaml has it."""

    path: Path
    finished: bool
    changes: tuple[tuple[str, Any, Any], ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

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

    Raises RunRefused with every difference of identity that allow_change does not name, or where the run's checkpoints
    are not where they were; CheckpointError or DataError where checkpoint.dir cannot be read.
    """
    path = unused(run_folder(config)) if fresh else run_folder(config)
    record = path / OURS
    identity = {**configuration.identity(config), "data_order": data_identity}
    circumstance = {**configuration.circumstance(config), "world_size": world_size}
    store, earlier, changes = open_checkpoints(config, path), {}, []
    if record.exists():
        earlier = _record(record)
        new = configuration.new_knobs(earlier["identity"], config)
        earlier["identity"] |= {key: default for key, default in new.items() if key in identity}
        changes = _changes(path, store, earlier, identity, circumstance, allow_change)
    else:
        refuse_foreign(path)
    owner = _refuse_foreign_store(store, earlier.get("id"), path) if config.checkpoint.dir else None
    path.mkdir(parents=True, exist_ok=True)
    (path / "pictures").mkdir(exist_ok=True)
    configuration.save(config, path / CONFIG_FILE)
    own = earlier.get("id") or secrets.token_hex(8)
    write_json(record, {"id": own, "identity": identity, "circumstance": circumstance})
    if config.checkpoint.dir and owner is None:  # after our own record: a start killed between the two knows its id
        store.claim(own)
    return RunFolder(path, _finished(path, config.train.steps), tuple(changes), configuration.to_dict(config))


def _record(path: Path) -> dict[str, Any]:
    """run.json of an earlier start; RunRefused where it is damaged."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if not all(isinstance(record[part], dict) for part in ("identity", "circumstance")):
            raise TypeError("a part of it is no mapping")
    except (ValueError, KeyError, TypeError) as error:
        raise RunRefused(
            f"{path} is damaged ({error!r}), so that nothing says which run this is: restore it, or start with --fresh"
        ) from error
    return record


def _changes(
    path: Path,
    store: CheckpointStore,
    earlier: dict[str, Any],
    identity: dict[str, Any],
    circumstance: dict[str, Any],
    allow_change: Sequence[str],
) -> list[tuple[str, Any, Any]]:
    """What is different from the last start of a run that has trained; RunRefused where it may not be."""
    saved, before = bool(store.listing()), _earlier_store(path, earlier["circumstance"])
    left_behind = not saved and before.url != store.url and bool(before.listing())
    if not (saved or left_behind or _has_metrics(path)):
        return []  # a start that failed at once, on a mistake in its configuration, binds nobody
    _refuse_changes(path, earlier["identity"], identity, allow_change)
    if left_behind:  # going on would silently begin at step 0
        raise RunRefused(
            f"the checkpoints of {path} are in {before.url} and checkpoint.dir is {store.url} now, where there are none: "
            f"copy them there, or set checkpoint.dir={before.url}"
        )
    pairs = (earlier["identity"], identity), (earlier["circumstance"], circumstance)
    return [change for then, now in pairs for change in configuration.difference(then, configuration.json_value(now))]


def open_checkpoints(config: Config, path: Path) -> CheckpointStore:
    """Where the run in folder `path` keeps its checkpoints."""
    options = config.checkpoint
    endpoint_url = options.endpoint_url or config.data.endpoint_url
    return open_store(options.dir or path / "checkpoints", endpoint_url, config.data.read_budget_s)


def _has_metrics(path: Path) -> bool:
    journal = path / "journal.jsonl"
    return journal.exists() and '"kind": "metrics"' in journal.read_text()


def _earlier_store(path: Path, circumstance: dict[str, Any]) -> CheckpointStore:
    """Where the last start of the run kept its checkpoints."""
    endpoint_url = circumstance.get("checkpoint.endpoint_url") or circumstance.get("data.endpoint_url")
    return open_store(circumstance.get("checkpoint.dir") or path / "checkpoints", endpoint_url)


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


def _refuse_foreign_store(store: CheckpointStore, own: str | None, path: Path) -> str | None:
    """The owner of the place; RunRefused where it is another run: they would resume from each other's checkpoints and
    remove them."""
    owner = store.owner()
    if owner is None and store.listing():
        raise RunRefused(
            f"checkpoint.dir={store.url} holds checkpoints of which no run says that they are its own; choose another "
            "checkpoint.dir"
        )
    if owner not in (None, own):
        raise RunRefused(
            f"checkpoint.dir={store.url} holds the checkpoints of another run than {path}; choose another checkpoint.dir "
            "(one for every run)"
        )
    return owner
