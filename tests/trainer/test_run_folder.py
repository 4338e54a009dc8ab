"""What may continue in a run's folder, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs import load as configuration
from configs.folders import ForeignFolder
from configs.schema import Config
from trainer.observe.journal import Journal
from trainer.run_folder import RunRefused, open_run, write_json

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"
ORDER: dict[str, Any] = {"manifest": "abc", "seed": 42}


def config(path: Path, *overrides: str) -> Config:
    return configuration.load([SMOKE], [f"run.dir={path}", *overrides])


def start(path: Path, *overrides: str, allow: tuple[str, ...] = (), fresh: bool = False, order: Any = ORDER) -> Any:
    return open_run(config(path, *overrides), order, 2, fresh=fresh, allow_change=allow)


def test_the_same_run_goes_on_and_its_configuration_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert start(path).path == start(path).path == path
    assert configuration.load([path / "config.yaml"]) == config(path)


def train_a_little(path: Path) -> None:
    (path / "checkpoints" / "step_00000002").mkdir(parents=True)


def test_a_start_that_failed_before_training_binds_nobody(tmp_path: Path) -> None:
    path = tmp_path / "run"
    start(path, "model.latents=foo")
    start(path)
    journal = Journal(path)
    journal.append("metrics", step=1, values={"loss": 1.0})
    journal.close()
    with pytest.raises(RunRefused):
        start(path, "model.latents=foo")


def test_another_experiment_is_refused_with_every_difference(tmp_path: Path) -> None:
    path = tmp_path / "run"
    start(path)
    train_a_little(path)
    with pytest.raises(RunRefused, match=r"objective\.order: 2 -> 1\n.*optimizer\.learning_rate: 0\.001 -> 0\.0002"):
        start(path, "objective.order=1", "optimizer.learning_rate=2e-4")
    with pytest.raises(RunRefused, match=r"data_order\.manifest: abc -> xyz"):
        start(path, order={**ORDER, "manifest": "xyz"})


def test_a_named_change_and_circumstances_go_on(tmp_path: Path) -> None:
    path = tmp_path / "run"
    start(path)
    train_a_little(path)
    start(path, "train.steps=2000", allow=("train.steps",))
    start(path, "train.steps=2000", "train.micro_batch_size=8", "engine.keep_gathered=false", "runtime.threads=2")
    with pytest.raises(RunRefused, match=r"train\.steps: 2000 -> 1000"):
        start(path)


def test_fresh_starts_beside_and_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = start(path)
    (first.path / "note.txt").write_text("mine")
    assert start(path, "objective.order=1", fresh=True).path == tmp_path / "run-2"
    assert start(path, "objective.order=1", fresh=True).path == tmp_path / "run-3"
    assert (path / "note.txt").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("not a run")
    with pytest.raises(ForeignFolder, match="not a run of this trainer"):
        start(tmp_path)


def test_a_run_is_finished_when_its_last_step_is_done(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = start(path)
    assert not run.finished
    run.write_status("finished", 1000, "done")
    assert start(path).finished
    assert not start(path, "train.steps=1600", allow=("train.steps",)).finished


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_what_changed_is_told_so_that_the_journal_can_say_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert start(path).changes == ()
    train_a_little(path)
    going_on = start(path, "train.steps=2000", "train.micro_batch_size=8", allow=("train.steps",))
    assert going_on.changes == (("train.steps", 1000, 2000), ("train.micro_batch_size", 32, 8))
    assert start(path, "train.steps=2000", "train.micro_batch_size=8").changes == ()


def test_checkpoints_that_stay_behind_are_missed(tmp_path: Path) -> None:
    """Another checkpoint.dir would silently begin at step 0."""
    path, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    start(path)
    train_a_little(path)
    with pytest.raises(RunRefused, match=rf"in {path}/checkpoints and checkpoint.dir is {elsewhere} now"):
        start(path, f"checkpoint.dir={elsewhere}")
    shutil.copytree(path / "checkpoints", elsewhere)
    (elsewhere / "owner").write_text(json.loads((path / "run.json").read_text())["id"])
    start(path, f"checkpoint.dir={elsewhere}")


def test_two_runs_do_not_share_a_checkpoint_dir(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    start(tmp_path / "one", f"checkpoint.dir={shared}")
    start(tmp_path / "one", f"checkpoint.dir={shared}")
    with pytest.raises(RunRefused, match=rf"{shared} holds the checkpoints of another run than {tmp_path}/two"):
        start(tmp_path / "two", f"checkpoint.dir={shared}")
    (tmp_path / "unowned" / "step_00000005").mkdir(parents=True)
    with pytest.raises(RunRefused, match="no run says"):
        start(tmp_path / "three", f"checkpoint.dir={tmp_path / 'unowned'}")


def test_a_run_of_an_earlier_version_takes_new_knobs_at_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run"
    start(path)
    train_a_little(path)
    record = json.loads((path / "run.json").read_text())
    del record["identity"]["objective.time_step"], record["identity"]["data.flip"]
    write_json(path / "run.json", record)
    assert start(path).changes == ()
    write_json(path / "run.json", record)
    with pytest.raises(RunRefused, match=r"objective\.time_step: 0\.01 -> 0\.02"):
        start(path, "objective.time_step=0.02")


def test_a_damaged_record_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "run"
    start(path)
    for damage in ("{", "[]", '{"identity": {}}'):
        (path / "run.json").write_text(damage)
        with pytest.raises(RunRefused, match=r"run\.json is damaged.*--fresh"):
            start(path)
