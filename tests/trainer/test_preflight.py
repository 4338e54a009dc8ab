"""Before the model is loaded: strict ends the run on all ranks and names the node, warn goes on, off costs nothing."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from configs import load
from configs.schema import Config
from tests.data import sets
from tests.ranks import run_ranks
from trainer import preflight
from trainer.engines.distributed import World, process_group
from trainer.health.findings import RED, Finding
from trainer.observe.tracking import NullTracker
from trainer.preflight import PreflightRefused

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.yaml")


def config(folder: Path, *more: str) -> Config:
    places = [
        f"run.dir={folder}/run",
        f"data.manifest={folder}/train",
        "data.held_out=null",
        f"model.path={folder}/none",
    ]
    return load.load([SMOKE], [*places, f"tracking.uri=sqlite:///{folder}/mlflow.db", *more])


def test_it_runs_in_submitted_jobs_alone_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(preflight.SUBMITTED, raising=False)
    assert preflight.policy(config(tmp_path)) == "off"
    assert preflight.policy(config(tmp_path, "runtime.preflight=strict")) == "strict"
    monkeypatch.setenv(preflight.SUBMITTED, "/logs")
    assert preflight.policy(config(tmp_path)) == "warn"
    assert preflight.policy(config(tmp_path, "runtime.preflight=off")) == "off"


class _Events(NullTracker):
    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, object]]] = []

    def event(self, what: str, **details: object) -> None:
        self.seen.append((what, details))


def _start(settings: Config) -> tuple[str, list[tuple[str, dict[str, object]]]]:
    """Two nodes of one rank; the second has a broken GPU."""
    rank = dist.get_rank()
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    world, tracker = World(rank, 2, 0, torch.device("cpu")), _Events()
    broken = [Finding("GPU health", RED, "uncorrected ECC errors 3", "drain the node")] if rank == 1 else []
    with mock.patch("trainer.health.gpu.processor", lambda device: broken):
        try:
            preflight.preflight(settings, world, tracker)
        except PreflightRefused as error:
            return str(error), tracker.seen
        finally:
            del os.environ["SLURMD_NODENAME"]
    return "", tracker.seen


def test_strict_refuses_on_all_ranks_and_names_the_node(tmp_path: Path) -> None:
    sets.write_set(tmp_path / "train", sets.raw_shards(2, 64, 200))
    (first, events), (second, _) = run_ranks(_start, 2, config(tmp_path, "runtime.preflight=strict"))
    for message in (first, second):
        assert "red GPU health on node1 (rank 1): uncorrected ECC errors 3 -> drain the node" in message
        assert "runtime.preflight=warn" in message and "node0" not in message
    assert events[0][0] == "preflight" and events[0][1]["level"] == RED


def test_warn_writes_it_down_and_goes_on(tmp_path: Path) -> None:
    sets.write_set(tmp_path / "train", sets.raw_shards(2, 64, 200))
    (first, events), (second, _) = run_ranks(_start, 2, config(tmp_path, "runtime.preflight=warn"))
    assert first == second == ""
    assert any("GPU health on node1" in str(line) for line in events[0][1]["findings"])  # type: ignore[attr-defined]


def test_off_looks_at_nothing(tmp_path: Path) -> None:
    with mock.patch.object(preflight, "examine", side_effect=AssertionError("was called")):
        preflight.preflight(
            config(tmp_path, "runtime.preflight=off"), World(0, 1, 0, torch.device("cpu")), NullTracker()
        )


def test_a_refused_run_loads_no_model_and_its_folder_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets.write_set(tmp_path / "train", sets.raw_shards(2, 64, 200))
    from trainer import session  # imports all there is: not for the ranks that import this module
    from trainer.signals import StopRequest

    monkeypatch.setattr(session, "build_run", mock.Mock(side_effect=AssertionError("the model was loaded")))
    broken = [Finding("GPU health", RED, "uncorrected ECC errors 3", "drain the node")]
    monkeypatch.setattr("trainer.health.gpu.processor", lambda device: broken)
    settings = config(tmp_path, "runtime.preflight=strict")
    with process_group(30.0, "cpu") as world:
        code = session.train(settings, world, StopRequest(), fresh=False, allow_change=[])
    assert code == 1 and "uncorrected ECC errors 3" in capsys.readouterr().err
    status = (tmp_path / "run" / "status.json").read_text()
    assert '"failed"' in status and "drain the node" in status
