"""All ranks together: one verdict for all, the bad node named, and an end in time whatever a rank does."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from configs import load
from configs.schema import Config
from tests.data import sets
from tests.ranks import run_ranks
from trainer.engines.distributed import World
from trainer.health import disk, examination
from trainer.health.checks import BRIEF
from trainer.health.examination import Report, examine
from trainer.health.findings import GREEN, RED, YELLOW

SMOKE = str(Path(__file__).parents[3] / "configs" / "smoke.yaml")
SCOPE = dataclasses.replace(BRIEF, write=1 << 20, read=1 << 20, sizes=(1 << 16,), link_timeout_s=10.0)


def config(folder: Path, *more: str) -> Config:
    places = [
        f"run.dir={folder}/run",
        f"data.manifest={folder}/set",
        "data.held_out=null",
        f"model.path={folder}/model",
    ]
    return load.load([SMOKE], [*places, *more])


def _examine(settings: Config | None, skew_s: float = 0.0, late_s: float = 0.0, meet_s: float = 30.0) -> Report | str:
    """On two nodes of one rank; rank 1 has a wrong clock, or comes late."""
    rank = dist.get_rank()
    world = World(rank, dist.get_world_size(), 0, torch.device("cpu"))
    time.sleep(late_s * rank)
    scope = dataclasses.replace(SCOPE, meet_s=meet_s, link_timeout_s=1.0 if late_s else 10.0, budget_s=5.0)
    return examine(world, settings, scope, lambda: time.time() + skew_s * rank, f"node{rank}")


def rows_of(report: Report, check: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(row.level, row.where) for row in report.rows if row.check == check]


def test_two_nodes_of_a_run_get_one_verdict(tmp_path: Path) -> None:
    sets.write_set(tmp_path / "set", sets.raw_shards(2, 2, 1000))
    first, second = run_ranks(_examine, 2, config(tmp_path))
    both = ("node0 (rank 0)", "node1 (rank 1)")
    assert first.level in (GREEN, YELLOW) and second.level == first.level and first.nodes == second.nodes == 2
    assert rows_of(first, "run folder shared") == rows_of(first, f"data {tmp_path}/set") == [(GREEN, both)]
    assert rows_of(first, "same on all nodes") == rows_of(first, "clocks") == [(GREEN, ("all ranks",))]
    checks = {row.check for row in first.rows}
    assert {"disk run", "disk checkpoints", "versions", "attention", "all-reduce", "computing"} <= checks
    assert "disk cache" not in checks and second.rows == []
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # nothing was made, nothing stays


def test_the_node_with_the_wrong_clock_is_named_on_all_ranks() -> None:
    first, second = run_ranks(_examine, 2, None, 500.0)
    assert first.level == second.level == RED
    assert rows_of(first, "clocks") == rows_of(second, "clocks") == [(RED, ("node1 (rank 1)",))]


def test_missing_data_is_red_on_both_nodes(tmp_path: Path) -> None:
    first, second = run_ranks(_examine, 2, config(tmp_path))
    both = ("node0 (rank 0)", "node1 (rank 1)")
    assert rows_of(first, f"data {tmp_path}/set") == rows_of(second, f"data {tmp_path}/set") == [(RED, both)]


def _one_never_comes(over: Path) -> tuple[Report | None, float]:
    began = time.monotonic()
    if dist.get_rank() == 1:
        while not over.exists():
            time.sleep(0.1)
        return None, 0.0
    scope = dataclasses.replace(SCOPE, meet_s=0.5, link_timeout_s=0.2, budget_s=2.0)
    # How long it waits for the other rank's own checks follows from how many there may be.
    with mock.patch("trainer.health.examination._CHECKS", 1):
        report = examine(World(0, 2, 0, torch.device("cpu")), None, scope, host="node0")
    over.touch()
    return report, time.monotonic() - began


def test_a_rank_that_never_comes_is_named_in_time(tmp_path: Path) -> None:
    report, seconds = run_ranks(_one_never_comes, 2, tmp_path / "over")[0]
    assert report is not None and report.level == RED and seconds < 40
    assert rows_of(report, "rank") == [(RED, ("? (rank 1)",))]


def test_what_could_not_be_measured_because_a_rank_came_late_is_red() -> None:
    first, second = run_ranks(_examine, 2, None, 0.0, 2.0, 0.5)
    assert first.level == second.level == RED
    assert rows_of(first, "all-reduce") == [(RED, ("node0 (rank 0)", "node1 (rank 1)"))]
    assert rows_of(first, "rank") == []


def test_a_file_system_that_hangs_holds_nobody_up_before_the_checks_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never, began = threading.Event(), time.monotonic()
    monkeypatch.setattr(examination, "_MARK_S", 0.2)
    monkeypatch.setattr(disk.SharedMark, "make", lambda mark: never.wait(60) and "")
    with examination._mark(config(tmp_path)) as path:
        assert path == ""
    never.set()
    assert time.monotonic() - began < 20
