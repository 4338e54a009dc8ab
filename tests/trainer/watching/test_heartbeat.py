from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.stages import Stages
from trainer.watching import heartbeat


def run_in(folder: Path) -> Any:
    return SimpleNamespace(step=7, folder=SimpleNamespace(path=folder))


def test_every_stage_is_a_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.0)
    stages = Stages()
    stages.entered = heartbeat.Heartbeat(run_in(tmp_path))
    contents = set()
    for name in ("data", "targets", "targets"):
        with stages(name):
            contents.add((tmp_path / "heartbeat.json").read_text())
    assert len(contents) == 3  # the same stage of the same step is new life too
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["stage"]) == (7, "targets")
    assert stages.longest.keys() == {"data", "targets"}


def test_it_does_not_write_all_the_time_nor_fail_where_it_cannot(tmp_path: Path) -> None:
    alive = heartbeat.Heartbeat(run_in(tmp_path))
    alive("data")
    first = (tmp_path / "heartbeat.json").read_text()
    alive("encode")
    assert (tmp_path / "heartbeat.json").read_text() == first
    heartbeat.Heartbeat(run_in(tmp_path / "absent"))("data")
