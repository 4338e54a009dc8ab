from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Profile
from trainer.observe.profiler import REQUEST, STEPS_ON_REQUEST, Profiler

CPU = torch.device("cpu")


class Tracker:
    def __init__(self) -> None:
        self.artifacts: list[tuple[str, str | None]] = []

    def artifact(self, path: Path, folder: str | None = None) -> None:
        assert path.stat().st_size > 0
        self.artifacts.append((path.name, folder))


def run_steps(profiler: Profiler, first: int, end: int) -> None:
    for step in range(first, end):
        profiler.begin_step(step)
        torch.ones(4, 4) @ torch.ones(4, 4)
        if step == 3:
            torch.linspace(0, 1, 7)
        profiler.look(step + 1)


def test_the_steps_asked_for_and_no_others_are_profiled(tmp_path: Path) -> None:
    tracker: Any = Tracker()
    run_steps(Profiler(Profile(steps=[1, 2]), tmp_path, CPU, tracker), 0, 5)
    where = tmp_path / "profile" / "steps_00000001_00000002"
    trace = json.loads(gzip.decompress((where / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("aten::matmul") == 2 and "aten::linspace" not in names
    assert "aten::mm" in (where / "operators.txt").read_text()
    folder = "profile/steps_00000001_00000002"
    assert tracker.artifacts == [("trace.json.gz", folder), ("operators.txt", folder)]


def test_a_file_in_the_folder_asks_for_the_next_steps_once(tmp_path: Path) -> None:
    tracker: Any = Tracker()
    profiler = Profiler(Profile(), tmp_path, CPU, tracker)
    run_steps(profiler, 0, 2)
    assert not (tmp_path / "profile").exists()
    (tmp_path / REQUEST).touch()
    run_steps(profiler, 2, 5 + STEPS_ON_REQUEST)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps_00000003_00000005"]
    assert not (tmp_path / REQUEST).exists()


def test_a_loop_that_ends_early_writes_what_it_has(tmp_path: Path) -> None:
    tracker: Any = Tracker()
    profiler = Profiler(Profile(steps=[0, 9]), tmp_path, CPU, tracker)
    run_steps(profiler, 0, 2)
    profiler.close(2)
    assert (tmp_path / "profile" / "steps_00000000_00000001" / "operators.txt").exists()


def test_a_memory_record_is_refused_without_a_gpu(tmp_path: Path) -> None:
    tracker: Any = Tracker()
    with pytest.raises(ValueError, match=r"profile\.memory .* is on the CPU: set profile\.memory=false"):
        Profiler(Profile(memory=True), tmp_path, CPU, tracker)
