"""What a run tells the world: journal first, MLflow behind it.

`python -m trainer.observe.tracking RUN_DIR` sends what a finished run could not send.
Only rank 0 has a Tracker, the others a NullTracker of the same shape.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from trainer.observe import journal
from trainer.observe.journal import Journal
from trainer.observe.sender import FILE as STATE_FILE
from trainer.observe.sender import Sender

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "KILLED", "FAILED"]


class Tracking(Protocol):
    """Calls return at once and never raise for a reason outside this process."""

    def info(self) -> dict[str, str | None]:
        """uri, without a password, and run_id of the MLflow run; None where not known (yet)."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Nested or flat settings; secrets are already redacted by configs.load. A value that differs from an earlier
        start of this run becomes a tag `changed.<name>`: MLflow parameters cannot change."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers at a step. A name's steps go up; what an earlier start of the run already recorded is journalled as a
        repeat and not sent again."""

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A finished file, preferably inside the run's folder; it must not change afterwards."""

    def event(self, what: str, **details: Any) -> None:
        """Something worth remembering; journal only."""

    def finish(self, status: Status, timeout_s: float = 30.0) -> bool:
        """Record the truthful end and send what is left for at most timeout_s; whether all arrived."""


class NullTracker:
    """The tracker of ranks that do not track."""

    def info(self) -> dict[str, str | None]:
        return {"uri": None, "run_id": None}

    def params(self, values: Mapping[str, Any]) -> None: ...
    def metrics(self, step: int, values: Mapping[str, float]) -> None: ...
    def artifact(self, path: str | Path, folder: str | None = None) -> None: ...
    def event(self, what: str, **details: Any) -> None: ...
    def flush(self, timeout_s: float = 30.0) -> bool:
        return True

    def finish(self, status: Status, timeout_s: float = 30.0) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Tracker:
    """See Tracking. As a context manager it ends the run FINISHED, FAILED on an error, KILLED on Ctrl-C or SystemExit,
    unless `finish` was called before."""

    def __init__(self, run_dir: str | Path, uri: str, experiment: str, run_name: str) -> None:
        self._run_dir = Path(run_dir)
        self._journal = Journal(self._run_dir)
        self._last_step, self._params = _remembered(self._run_dir)
        self._sender = Sender(self._run_dir, uri, experiment, run_name)
        self._finished = False
        self._journal.append("status", status="RUNNING")

    def info(self) -> dict[str, str | None]:
        return {"uri": self._sender.state.uri, "run_id": self._sender.state.run_id}

    def params(self, values: Mapping[str, Any]) -> None:
        flat = flatten(values)
        new = {name: value for name, value in flat.items() if name not in self._params}
        changed = {name: value for name, value in flat.items() if self._params.get(name, value) != value}
        self._params |= flat
        for kind, part in (("params", new), ("changes", changed)):
            if part:
                self._journal.append(kind, values=part)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        new = {name: float(value) for name, value in values.items() if step > self._last_step.get(name, -1)}
        repeated = {name: float(value) for name, value in values.items() if name not in new}
        self._last_step |= dict.fromkeys(new, step)
        for kind, part in (("metrics", new), ("repeat", repeated)):
            if part:
                self._journal.append(kind, step=step, values=part)
        self._send()

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        path = Path(path).absolute()
        home = self._run_dir.absolute()
        inside = path.relative_to(home) if path.is_relative_to(home) else path  # a run's folder may be moved
        self._journal.append("artifact", path=str(inside), folder=folder)
        self._send()

    def event(self, what: str, **details: Any) -> None:
        self._journal.append("event", what=what, **details)

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until MLflow has what was recorded so far; whether it has."""
        return self._sender.flush(timeout_s)

    def finish(self, status: Status, timeout_s: float = 30.0) -> bool:
        if self._finished:
            return True
        self._finished = True
        self._journal.append("status", status=status)
        self._journal.close()
        self._send()
        if self._sender.drain(timeout_s):
            return True
        log.warning(
            "MLflow did not take everything within %.0f s. Nothing is lost, it is in the run's journal; "
            "`python -m trainer.observe.tracking %s` sends the rest",
            timeout_s,
            self._run_dir,
        )
        return False

    def _send(self) -> None:
        # Not before the first metrics: loader processes may be forked at the start, and a fork while a thread imports
        # mlflow would leave them with import locks that nobody opens.
        if self._sender.ident is None:
            self._sender.start()
        self._sender.wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("FINISHED")
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")


def open_tracker(run_dir: str | Path, uri: str, experiment: str, run_name: str, rank: int) -> Tracker | NullTracker:
    """The tracker of this rank. Opening it again in the same folder continues the same MLflow run."""
    return Tracker(run_dir, uri, experiment, run_name) if rank == 0 else NullTracker()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.name` -> text; lists are JSON, None is null."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _remembered(run_dir: Path) -> tuple[dict[str, int], dict[str, str]]:
    """From earlier starts of the run: the last step of every metric and the parameters in force."""
    steps: dict[str, int] = {}
    params: dict[str, str] = {}
    for entry in journal.read(run_dir):
        content = entry.content
        if content.get("kind") == "metrics":
            steps |= dict.fromkeys(content["values"], content["step"])
        elif content.get("kind") in ("params", "changes"):
            params |= content["values"]
    return steps, params


def sync(run_dir: str | Path, uri: str | None = None, experiment: str | None = None, timeout_s: float = 600.0) -> bool:
    """Send what a finished run's journal still holds back; whether all arrived. Not while the run is training.

    uri, experiment: where to; default is where the run was tracked before (a password is not stored: give the uri).
    """
    run_dir = Path(run_dir)
    for needed in (run_dir / journal.FILE, *([] if uri and experiment else [run_dir / STATE_FILE])):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} does not exist: is {run_dir} the folder of a run that was tracked?")
    if not (uri and experiment):
        known = json.loads((run_dir / STATE_FILE).read_text())
        uri, experiment = uri or known["uri"], experiment or known["experiment"]
    sender = Sender(run_dir, str(uri), str(experiment), run_dir.name)
    sender.start()
    return sender.drain(timeout_s)


def main() -> int:
    parser = argparse.ArgumentParser(description="Send the rest of a run's journal to MLflow.")
    parser.add_argument("run_dir")
    parser.add_argument("--uri", help="MLflow server or sqlite file; default: as before")
    parser.add_argument("--experiment")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        complete = sync(options.run_dir, options.uri, options.experiment, options.timeout)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print("everything is sent" if complete else "not everything was sent; try again when the server answers")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
