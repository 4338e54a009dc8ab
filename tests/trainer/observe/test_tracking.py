"""The tracker against real MLflow on a sqlite file, and against an address where nobody answers."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from trainer.observe import sender as sender_module
from trainer.observe.mlflow_store import MlflowStore
from trainer.observe.tracking import NullTracker, Tracker, flatten, main, open_tracker, sync

logging.getLogger("alembic").setLevel(logging.WARNING)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests (its creation takes seconds), in a folder that does not exist yet."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/outputs/mlflow.db"


def open_run(run_dir: Path, uri: str) -> Tracker:
    tracker = open_tracker(run_dir, uri, "exp", "my-run", rank=0)
    assert isinstance(tracker, Tracker)
    return tracker


def history(uri: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    assert run_id is not None
    return sorted((m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, key))


def test_a_run_is_told_in_full(tmp_path: Path, uri: str) -> None:
    tracker = open_run(tmp_path / "run", uri)
    tracker.params({"train": {"steps": 100, "betas": [0.9, 0.99], "dir": None}, "name": "x" * 7000})
    tracker.params({f"many.{i}": i for i in range(250)})
    for step in range(1, 201):
        tracker.metrics(step, {f"term/{k}": step * k / 7 for k in range(8)})
    tracker.metrics(201, {"broken": float("nan")})
    picture = tmp_path / "run" / "pictures" / "grid.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    tracker.artifact(picture, "pictures")
    tracker.event("note", text="journal only")
    assert tracker.finish("FINISHED", timeout_s=60)

    run_id = tracker.info()["run_id"]
    assert run_id is not None and tracker.info()["uri"] == uri
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "my-run")
    assert client.get_experiment(run.info.experiment_id).name == "exp"
    params = run.data.params
    assert params["train.steps"] == "100" and params["train.betas"] == "[0.9, 0.99]" and params["train.dir"] == "null"
    assert params["many.249"] == "249" and len(params["name"]) == 6000
    assert history(uri, run_id, "term/3") == [(step, step * 3 / 7) for step in range(1, 201)]
    assert len(history(uri, run_id, "broken")) == 1
    assert [f.path for f in client.list_artifacts(run_id, "pictures")] == ["pictures/grid.png"]
    stored = Path(run.info.artifact_uri.removeprefix("file://"))
    assert stored.is_relative_to(Path(uri.removeprefix("sqlite:///")).parent)


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_without_gaps_or_doubles(tmp_path: Path, uri: str) -> None:
    first = open_run(tmp_path, uri)
    first.params({"lr": 1e-4, "world_size": 2})
    for step in range(1, 8):
        first.metrics(step, {"loss": step / 8})
    assert first.finish("KILLED", timeout_s=60)
    run_id = first.info()["run_id"]
    assert run_id is not None and MlflowClient(uri).get_run(run_id).info.status == "KILLED"

    second = open_run(tmp_path, uri)
    second.params({"lr": 1e-4, "world_size": 4})
    for step in range(6, 11):  # resumed from the checkpoint of step 5: 6 and 7 are computed again
        second.metrics(step, {"loss": step / 8})
    deadline = time.monotonic() + 30
    while MlflowClient(uri).get_run(run_id).info.status != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert MlflowClient(uri).get_run(run_id).info.status == "RUNNING"
    assert second.finish("FINISHED", timeout_s=60)
    run = MlflowClient(uri).get_run(run_id)
    assert second.info()["run_id"] == run_id and run.info.status == "FINISHED"
    assert history(uri, run_id, "loss") == [(step, step / 8) for step in range(1, 11)]
    assert run.data.params["world_size"] == "2" and run.data.tags["changed.world_size"] == "4"
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert kinds.count("metrics") == 10 and kinds.count("repeat") == 2


def test_what_was_sent_may_be_sent_again(tmp_path: Path, uri: str) -> None:
    tracker = open_run(tmp_path, uri)
    tracker.params({"lr": 1e-4})
    for step in range(20):
        tracker.metrics(step, {"loss": 1 / (step + 1), "nan": float("nan"), "inf": float("inf")})
    (tmp_path / "a.png").write_bytes(b"a")
    tracker.artifact(tmp_path / "a.png")
    assert tracker.finish("FINISHED", timeout_s=60)
    state = json.loads((tmp_path / "mlflow.json").read_text())
    for lost in ({"sent": 0}, {"sent": 0, "run_id": None}):  # the cursor, or even the id, was not written
        (tmp_path / "mlflow.json").write_text(json.dumps(state | lost))
        assert sync(tmp_path, timeout_s=60)
        assert json.loads((tmp_path / "mlflow.json").read_text()) == state
        assert [len(history(uri, state["run_id"], key)) for key in ("loss", "nan", "inf")] == [20, 20, 20]
    assert MlflowClient(uri).get_run(state["run_id"]).info.status == "FINISHED"


def test_a_deleted_run_is_replaced_by_a_new_one_with_the_whole_journal(tmp_path: Path, uri: str) -> None:
    with open_run(tmp_path, uri) as tracker:
        tracker.metrics(1, {"loss": 0.5})
    old = tracker.info()["run_id"]
    assert old is not None
    MlflowClient(uri).delete_run(old)
    with open_run(tmp_path, uri) as tracker:
        tracker.metrics(2, {"loss": 0.25})
    new = tracker.info()["run_id"]
    assert new != old and history(uri, new, "loss") == [(1, 0.5), (2, 0.25)]


def test_a_refused_name_is_reported_and_the_rest_arrives(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run(tmp_path, uri) as tracker:
        tracker.metrics(1, {"loss": 0.5})
        tracker.metrics(2, {"bad*name": 0.5})
        tracker.metrics(3, {"loss": 0.25})
    assert history(uri, tracker.info()["run_id"], "loss") == [(1, 0.5), (3, 0.25)]
    assert "bad*name" in caplog.text and "'step': 2" in caplog.text


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_the_status_is_truthful(tmp_path: Path, uri: str, error: type[BaseException] | None, status: str) -> None:
    try:
        with open_run(tmp_path, uri) as tracker:
            tracker.metrics(1, {"loss": 1.0})
            if error is not None:
                raise error()
    except BaseException as raised:
        assert error is not None and isinstance(raised, error)
    run_id = tracker.info()["run_id"]
    assert run_id is not None and MlflowClient(uri).get_run(run_id).info.status == status


def test_a_dead_server_costs_neither_time_nor_the_run(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://someone:hunter2@127.0.0.1:{free.getsockname()[1]}"
    tracker = open_run(tmp_path, dead)
    tracker.params({"lr": 1e-4})
    slowest = 0.0
    for step in range(100):
        began = time.perf_counter()
        tracker.metrics(step, {"loss": step / 8})
        slowest = max(slowest, time.perf_counter() - began)
    deadline = time.monotonic() + 30
    while "does not answer" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    assert not tracker.finish("FINISHED", timeout_s=0.5)
    assert time.monotonic() - began < 3.0 and slowest < 0.5
    assert "does not answer" in caplog.text and "sends the rest" in caplog.text
    written = (tmp_path / "mlflow.json").read_text() + (tmp_path / "journal.jsonl").read_text()
    assert "hunter2" not in caplog.text + written

    # The server is back, here as another address: what stayed behind is sent by the command that the warning names.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tracking", str(tmp_path), "--uri", uri, "--timeout", "60"])
        assert main() == 0
    assert "everything is sent" in capsys.readouterr().out
    run_id = json.loads((tmp_path / "mlflow.json").read_text())["run_id"]
    assert history(uri, run_id, "loss") == [(step, step / 8) for step in range(100)]


def test_calls_do_not_wait_for_a_slow_store(tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real_log = MlflowStore.log

    def slow_log(self: MlflowStore, entries: list[dict]) -> None:
        time.sleep(0.3)
        real_log(self, entries)

    monkeypatch.setattr(MlflowStore, "log", slow_log)
    monkeypatch.setattr(sender_module, "_POLL_S", 0.01)
    tracker = open_run(tmp_path, uri)
    began = time.perf_counter()
    for step in range(200):
        tracker.metrics(step, {"loss": 1.0})
    assert time.perf_counter() - began < 1.0
    assert tracker.finish("FINISHED", timeout_s=60)
    assert len(history(uri, tracker.info()["run_id"], "loss")) == 200


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    with open_tracker(tmp_path / "run", "sqlite:///x.db", "exp", "run", rank=1) as tracker:
        assert isinstance(tracker, NullTracker)
        tracker.params({"a": 1})
        tracker.metrics(1, {"loss": 1.0})
        tracker.artifact(tmp_path / "missing.png")
        tracker.event("note")
        assert tracker.info() == {"uri": None, "run_id": None}
    assert not (tmp_path / "run").exists()


def test_nested_settings_become_dotted_names() -> None:
    settings = {"a": {"b": {"c": 1.5}, "empty": {}}, "list": [1, "x"], "flag": True, "text": "as it is"}
    assert flatten(settings) == {
        "a.b.c": "1.5",
        "a.empty": "{}",
        "list": '[1, "x"]',
        "flag": "true",
        "text": "as it is",
    }


def test_opening_a_tracker_does_not_import_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from trainer.observe.tracking import Tracker; "
        "t = Tracker(sys.argv[1], 'sqlite:///x.db', 'e', 'r'); t.params({'a': 1}); "
        "assert 'mlflow' not in sys.modules, 'mlflow is imported'"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, cwd=tmp_path)


def test_sync_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tracking", str(tmp_path)])
    assert main() == 2
    assert "the folder of a run that was tracked?" in capsys.readouterr().err
