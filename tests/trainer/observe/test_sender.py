"""The sender against a server that fails in every way; real MLflow is in test_tracking.py."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.observe import sender as module
from trainer.observe.journal import Journal
from trainer.observe.mlflow_store import Refused, RunGone
from trainer.observe.sender import Sender, State


class Server:
    """Stands for MLflow: keeps what was sent; `fails` are raised by the next calls."""

    def __init__(self) -> None:
        self.run_id = "run-1"
        self.points: list[tuple[str, int, float]] = []
        self.statuses: list[str] = []
        self.files: list[str] = []
        self.fails: list[Exception] = []
        self.opened = 0
        self.poison: str | None = None
        self.artifacts_broken = False
        self.gone = False
        self.blocked: threading.Event | None = None

    def __call__(self, uri: str, experiment: str, run_name: str, token: str, run_id: str | None) -> "Server":
        self._trouble()
        self.opened += 1
        return self

    def _trouble(self) -> None:
        if self.blocked is not None:
            self.blocked.wait(30)
        if self.fails:
            raise self.fails.pop(0)

    def log(self, entries: list[dict[str, Any]]) -> None:
        self._trouble()
        if self.gone:
            self.gone = False
            raise RunGone("MLflow run run-1 is gone")
        if any(self.poison in entry["values"] for entry in entries):
            raise Refused(f"{self.poison} is not a name")
        for entry in entries:
            self.points += [(key, entry["step"], value) for key, value in entry["values"].items()]

    def status(self, status: str, time: int) -> None:
        self._trouble()
        self.statuses.append(status)

    def artifact(self, path: Path, folder: str | None) -> None:
        if self.artifacts_broken:
            raise OSError("the bucket does not exist")
        self.files.append(path.name)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.02)


def start(run_dir: Path, server: Server, uri: str = "http://u:secret@server:5000") -> Sender:
    sender = Sender(run_dir, uri, "exp", "run", server)
    sender.start()
    return sender


def points(count: int) -> list[tuple[str, int, float]]:
    return [("loss", step, step / 8) for step in range(count)]


def record(run_dir: Path, steps: range) -> None:
    writer = Journal(run_dir)
    for step in steps:
        writer.append("metrics", step=step, values={"loss": step / 8})


def test_everything_arrives_once_and_in_order(tmp_path: Path) -> None:
    server, writer = Server(), Journal(tmp_path)
    writer.append("status", status="RUNNING")
    record(tmp_path, range(5))
    sender = start(tmp_path, server)
    record(tmp_path, range(5, 9))
    writer.append("status", status="FINISHED")
    assert sender.drain(20.0)
    assert server.points == points(9) and server.statuses == ["RUNNING", "FINISHED"]
    again = start(tmp_path, server)
    assert again.drain(20.0)
    assert server.points == points(9)


def test_errors_of_the_server_are_tried_again_with_one_warning_and_no_password(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    server.fails = [ConnectionError("cannot reach http://u:secret@server:5000/api")] * 3 + [RuntimeError("500")] * 3
    record(tmp_path, range(4))
    assert start(tmp_path, server).drain(20.0)
    assert server.points == points(4)
    assert caplog.text.count("does not answer") == 1 and "secret" not in caplog.text
    assert "secret" not in (tmp_path / "mlflow.json").read_text()


def test_a_server_that_hangs_neither_blocks_the_writer_nor_the_end(tmp_path: Path) -> None:
    server = Server()
    server.blocked = threading.Event()
    sender = start(tmp_path, server)
    began = time.monotonic()
    record(tmp_path, range(100))
    sender.wake()
    assert not sender.drain(0.2)
    assert time.monotonic() - began < 2.0
    server.blocked.set()
    sender.join(20.0)
    server.blocked = None
    assert start(tmp_path, server).drain(20.0)  # a later start sends the rest
    assert sorted(set(server.points)) == sorted(points(100))


def test_a_crash_between_delivery_and_cursor_only_repeats_equal_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    record(tmp_path, range(3))
    with monkeypatch.context() as crash:
        crash.setattr(Sender, "_send", lambda self, entries: self._store.log([entry.content for entry in entries]))
        sender = start(tmp_path, server)
        assert not sender.drain(1.0)
        sender.join(20.0)
    assert json.loads((tmp_path / "mlflow.json").read_text())["sent"] == 0
    assert start(tmp_path, server).drain(20.0)
    assert len(server.points) >= 6 and set(server.points) == set(points(3))


def test_an_entry_the_server_refuses_is_skipped_by_name_and_holds_back_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, writer = Server(), Journal(tmp_path)
    server.poison = "bad*name"
    writer.append("metrics", step=0, values={"loss": 0.0})
    writer.append("metrics", step=7, values={"bad*name": 1.0})
    writer.append("metrics", step=1, values={"loss": 0.125})
    sender = start(tmp_path, server)
    assert sender.drain(20.0) and sender.refused == 1
    assert server.points == points(2)
    assert "'step': 7" in caplog.text and "bad*name is not a name" in caplog.text


def test_a_broken_artifact_store_does_not_hold_back_metrics_and_files_follow_later(tmp_path: Path) -> None:
    server, writer = Server(), Journal(tmp_path)
    server.artifacts_broken = True
    (tmp_path / "grid.png").touch()
    writer.append("artifact", path="grid.png", folder="grids")
    record(tmp_path, range(2))
    sender = start(tmp_path, server)
    assert not sender.drain(1.0)
    sender.join(20.0)
    assert server.points == points(2) and server.files == []
    server.artifacts_broken = False
    assert start(tmp_path, server).drain(20.0)
    assert server.points == points(2) and server.files == ["grid.png"]


def test_a_run_deleted_on_the_server_is_made_anew_from_the_whole_journal(tmp_path: Path) -> None:
    server = Server()
    record(tmp_path, range(2))
    assert start(tmp_path, server).drain(20.0)
    token = State.load(tmp_path, "http://server:5000", "exp").token
    server.points.clear()
    record(tmp_path, range(2, 4))
    server.gone = True
    assert start(tmp_path, server).drain(20.0)
    assert server.points == points(4)
    assert State.load(tmp_path, "http://server:5000", "exp").token != token


def test_entries_written_while_the_sender_looks_are_not_lost_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, writer, real_deliver = Server(), Journal(tmp_path), Sender._deliver
    looked, go_on = threading.Event(), threading.Event()

    def finds_nothing_and_dawdles(self: Sender, draining: bool) -> bool:
        moved = real_deliver(self, draining)
        if not looked.is_set():
            looked.set()
            go_on.wait(20)
        return moved

    monkeypatch.setattr(Sender, "_deliver", finds_nothing_and_dawdles)
    sender = start(tmp_path, server)
    assert looked.wait(20)
    writer.append("status", status="FINISHED")
    threading.Timer(0.2, go_on.set).start()  # drain is called before the sender decides whether to end
    assert sender.drain(20.0)
    assert server.statuses == ["FINISHED"]


def test_another_destination_gets_the_whole_journal(tmp_path: Path) -> None:
    first, second = Server(), Server()
    record(tmp_path, range(3))
    assert start(tmp_path, first).drain(20.0)
    assert start(tmp_path, second, "http://elsewhere:5000").drain(20.0)
    assert second.points == points(3) and second.opened == 1


def test_an_unreadable_state_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.json").write_text("{")
    with pytest.raises(ValueError, match=r"mlflow\.json is unreadable.*remove it"):
        Sender(tmp_path, "http://server", "exp", "run", Server())
