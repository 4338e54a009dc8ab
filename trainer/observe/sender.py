"""A thread that replays the journal to MLflow and never gets in training's way.

<run>/mlflow.json holds which MLflow run this is and how far the journal was sent. It moves on after each delivery, so a
crash in between sends a few entries again, which changes nothing (mlflow_store.py).
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from trainer.observe import journal
from trainer.observe.journal import Entry
from trainer.observe.mlflow_store import MlflowStore, Refused, RunGone, without_password

log = logging.getLogger(__name__)

FILE = "mlflow.json"
_LOGGED = ("metrics", "params", "changes")
_MOST_BYTES = 1 << 18
_POLL_S, _LONGEST_WAIT_S = 1.0, 30.0
_PAUSE_S = 5.0
"""Between two deliveries: what gathers meanwhile goes in one call. A call costs a step of a small model its margin."""
_WARN_EVERY_S = 60.0


@dataclass
class State:
    """What mlflow.json holds. sent: bytes of the journal delivered; late: [path, folder] of files still to upload."""

    uri: str
    experiment: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_id: str | None = None
    sent: int = 0
    late: list[list[str]] = field(default_factory=list)

    @classmethod
    def load(cls, run_dir: Path, uri: str, experiment: str) -> State:
        """The state of this destination; a fresh one, which replays the whole journal, for another destination."""
        path = run_dir / FILE
        fresh = cls(without_password(uri), experiment)
        if not path.exists():
            return fresh
        try:
            state = cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is unreadable ({error}); remove it to send the whole journal to a new MLflow run"
            ) from None
        if (state.uri, state.experiment) != (fresh.uri, fresh.experiment):
            log.warning(
                "tracking moved from %s to %s: the whole journal goes to a new MLflow run", state.uri, fresh.uri
            )
            return fresh
        return state

    def save(self, run_dir: Path) -> None:
        partial = run_dir / f"{FILE}.{os.getpid()}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1))
        partial.replace(run_dir / FILE)


class Sender(threading.Thread):
    """Delivers until `drain`; a server that fails is tried again for ever, with one warning a minute."""

    def __init__(
        self, run_dir: Path, uri: str, experiment: str, run_name: str, open_store: Callable[..., Any] = MlflowStore
    ) -> None:
        super().__init__(name="mlflow-sender", daemon=True)  # a server that hangs must not hold the process
        self._run_dir, self._uri, self._experiment, self._run_name = run_dir, uri, experiment, run_name
        self._open_store = open_store
        self._store: Any = None
        self.state = State.load(run_dir, uri, experiment)
        self.refused = 0
        self._news, self._draining, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._hurry = threading.Event()
        self._warned = -_WARN_EVERY_S
        self._late_tried = time.monotonic()

    def wake(self) -> None:
        """There is something new in the journal."""
        self._news.set()

    def flush(self, timeout_s: float) -> bool:
        """Send what is there without the usual pause, at most for timeout_s; whether everything arrived."""
        deadline = time.monotonic() + timeout_s
        while not (sent := self._all_sent()) and self.is_alive() and time.monotonic() < deadline:
            self._hurry.set()
            self._news.set()
            time.sleep(0.05)
        return sent

    def drain(self, timeout_s: float) -> bool:
        """Send what is left, at most for timeout_s; whether everything arrived. The thread ends."""
        self._draining.set()
        self._hurry.set()
        self._news.set()
        self.join(timeout_s)
        self._abandoned.set()
        return not self.is_alive() and self._all_sent()

    def run(self) -> None:
        wait = _POLL_S
        while not self._abandoned.is_set():
            self._news.clear()
            last_look = self._draining.is_set()  # read before looking: the final entries are written before it is set
            try:
                moved = self._deliver(last_look)
                wait = _POLL_S
            except Exception as error:  # whatever the client or the server comes up with, training goes on
                self._warn(error)
                self._abandoned.wait(_POLL_S if self._draining.is_set() else wait)
                wait = min(2 * wait, _LONGEST_WAIT_S)
                continue
            if not moved and last_look:
                return
            if moved:
                self._hurry.wait(_PAUSE_S)
                self._hurry.clear()
            else:
                self._news.wait(_POLL_S)

    def _all_sent(self) -> bool:
        return not self.state.late and next(journal.read(self._run_dir, self.state.sent), None) is None

    def _deliver(self, draining: bool) -> bool:
        """Send the next entries; False where nothing was waiting."""
        due = draining or time.monotonic() - self._late_tried >= _WARN_EVERY_S
        retry_late = bool(self.state.late) and due
        if not retry_late and next(journal.read(self._run_dir, self.state.sent), None) is None:
            return False
        try:
            self._connect()  # may set `sent` back, so the entries are read after it
            entries = list(journal.read(self._run_dir, self.state.sent, _MOST_BYTES))
            while entries:
                together = list(takewhile(lambda entry: entry.content.get("kind") in _LOGGED, entries)) or entries[:1]
                self._send(together)
                entries = entries[len(together) :]
            if retry_late:
                self._send_late()
        except RunGone as gone:
            log.warning("%s; the whole journal goes to a new one", gone)
            self.state, self._store = State(without_password(self._uri), self._experiment), None
        return True

    def _connect(self) -> None:
        if self._store is not None:
            return
        self.state.save(self._run_dir)  # the token must be known before a run carries it
        store = self._open_store(self._uri, self._experiment, self._run_name, self.state.token, self.state.run_id)
        if self.state.run_id not in (None, store.run_id):
            log.warning("MLflow run %s is gone; the whole journal goes to %s", self.state.run_id, store.run_id)
            self.state.sent, self.state.late = 0, []
        self._store, self.state.run_id = store, store.run_id
        self.state.save(self._run_dir)

    def _send(self, entries: list[Entry]) -> None:
        first = entries[0].content
        try:
            kind = first.get("kind")
            if kind in _LOGGED:
                self._store.log([entry.content for entry in entries])
            elif kind == "status":
                self._store.status(first["status"], first["time"])
            elif kind == "artifact":
                self._send_artifact(first)
        except Refused as refusal:
            if len(entries) > 1:
                for entry in entries:
                    self._send([entry])
                return
            self._skip(first, refusal)
        self.state.sent = entries[-1].end
        self.state.save(self._run_dir)

    def _send_artifact(self, content: dict[str, Any]) -> None:
        try:
            self._store.artifact(self._run_dir / content["path"], content["folder"])
        except (Refused, RunGone):
            raise
        except Exception as error:  # a broken artifact store must not hold back the metrics behind this file
            self._warn(error)
            self.state.late.append([content["path"], content["folder"]])

    def _send_late(self) -> None:
        self._late_tried = time.monotonic()
        while self.state.late:
            path, folder = self.state.late[0]
            try:
                self._store.artifact(self._run_dir / path, folder)
            except Refused as refusal:
                self._skip({"kind": "artifact", "path": path}, refusal)
            self.state.late.pop(0)
            self.state.save(self._run_dir)

    def _skip(self, content: dict[str, Any], refusal: Refused) -> None:
        self.refused += 1
        shown = {key: content[key] for key in ("kind", "step", "path", "status") if key in content}
        log.warning("MLflow refused %s, it stays in the journal only: %s", shown, _clean(refusal))

    def _warn(self, error: Exception) -> None:
        if time.monotonic() - self._warned >= _WARN_EVERY_S:
            self._warned = time.monotonic()
            where = without_password(self._uri)
            log.warning(
                "MLflow at %s does not answer, training goes on and sending is tried again: %s", where, _clean(error)
            )


def _clean(error: Exception) -> str:
    """First line of an error, without the password of a URL in it."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return re.sub(r"//[^/@\s]+@", "//", f"{type(error).__name__}: {text}")[:300]
