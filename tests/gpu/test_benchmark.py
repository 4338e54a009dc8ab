"""The benchmark for GPUs survives being cut off, finds what fits, and counts what it says (at tiny size, on the CPU)."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import gpu, gpu_parts
from tests.benchmarks.gpu_ledger import Ledger, NotHere, Row, Values
from tests.benchmarks.gpu_model import TINY, Builder, Subject, held_bytes, largest
from trainer.engines.distributed import process_group


def ledger(path: Path, seconds: float = 600.0, machine: str = "this", retry: bool = False) -> Ledger:
    return Ledger(path, machine, time.monotonic() + seconds, retry)


def row(key: str, values: Values | Exception, seconds: float = 1.0) -> Row:
    def measure() -> Values:
        if isinstance(values, Exception):
            raise values
        return values

    return Row(key, seconds, measure)


def unwanted(key: str) -> Row:
    return row(key, AssertionError("measured a second time"))


def test_rows_are_on_disk_one_by_one_and_never_measured_twice(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    first = ledger(path)
    first.take(row("a", {"x": 1.5}))
    assert json.loads(path.read_text())["x"] == 1.5
    first.take(row("b", ValueError("no")))
    first.take(row("c", NotHere("no kernel")))
    path.write_text(path.read_text() + '{"machine": "this", "key": "d", "x"')  # killed while it wrote
    again = ledger(path)
    assert set(again.rows) == {"a", "b", "c"}
    assert [again.take(unwanted(key)) for key in "abc"] == [again.rows[key] for key in "abc"]
    assert again.rows["b"]["error"] == "ValueError: no" and again.rows["c"]["not_run"] == "no kernel"
    again.take(row("d", {"x": 2}))
    assert set(ledger(path).rows) == {"a", "b", "c", "d"}
    assert set(ledger(path, retry=True).rows) == {"a", "c", "d"}
    assert ledger(path, machine="another").rows == {}


def test_no_row_begins_that_would_end_too_late(tmp_path: Path) -> None:
    rows = ledger(tmp_path / "rows.jsonl", seconds=10.0)
    assert rows.take(row("long", {}, seconds=11.0)) is None
    assert rows.take(row("short", {"x": 1}, seconds=5.0)) is not None
    assert rows.left_out == ["long"]


@pytest.mark.parametrize("limit", range(21))
def test_the_largest_that_fits_is_found_from_any_guess(limit: int) -> None:
    for guess in (-3, 1, limit, limit + 1, 12, 500):
        assert largest(lambda n: n <= limit, guess, 20) == limit
    tried = list[int]()
    largest(lambda n: tried.append(n) or n <= limit, limit, 20)
    assert len(tried) <= 2 and len(set(tried)) == len(tried)


def test_bars_are_judged_by_the_best_of_their_rows() -> None:
    rows: dict[str, Values] = {
        "a graded pass 1024 native eager": {"share": 0.4},
        "a graded pass 1024 cudnn compiled": {"share": 0.51},
        "a graded pass 512 cudnn compiled": {"share": 0.9},
        "a step 1024 native eager": {"share": 0.44},
        "b per block, 80 GB: largest micro-batch": {"micro_batch": 12},
        "b offload, 80 GB: largest micro-batch": {"error": "x"},
    }
    verdicts = gpu.judge(rows)
    assert {what: verdict["ok"] for what, verdict in verdicts.items()} == {
        "graded pass, 1024": True,
        "step of order 2, 1024": False,
        "adapters per block, 80 GB": True,
    }
    assert verdicts["graded pass, 1024"]["best"] == 0.51


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[gpu_parts.Bench]:
    with process_group(60.0, "cpu") as world:
        yield gpu_parts.Bench(ledger(tmp_path / "rows.jsonl"), Builder(world.device, TINY), repeats=1, most_rows=3)


def test_memory_that_runs_out_is_part_of_the_search(bench: gpu_parts.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_pass, tried = Subject.graded_pass, list[int]()

    def limited_pass(self: Subject, rows: int, pixels: int) -> int:
        tried.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("no")
        return whole_pass(self, rows, pixels)

    monkeypatch.setattr(Subject, "graded_pass", limited_pass)
    monkeypatch.setattr(gpu_parts, "MEMORY_OPTIONS", {"groups of 4": {"checkpoint_group": 4}})
    found = {row.key: bench.ledger.take(row) for row in gpu_parts.adapters(bench)}
    searches = {key: row for key, row in bench.ledger.rows.items() if key.endswith("largest micro-batch")}
    assert len(searches) == 2 and {row["micro_batch"] for row in searches.values()} == {2}
    assert 3 in tried
    steps = [row for key, row in found.items() if key.endswith("step") and row]
    assert len(steps) == 2 and all(step["images_per_s"] > 0 and step["micro_batch"] == 2 for step in steps)


def test_flops_are_those_that_torch_counts_and_a_freed_subject_is_gone(bench: gpu_parts.Bench) -> None:
    subject = bench.builder.get(gpu_parts.recipe("full", teacher="online"), layers=2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        said = subject.graded_pass(3, 64)
    assert said == pytest.approx(counter.get_total_flops(), rel=1e-3)
    subject.update()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        said = subject.step(4, 64, 2)
    assert said == pytest.approx(counter.get_total_flops(), rel=1e-3)
    engine = weakref.ref(subject.engine)
    del subject
    bench.builder.free()
    assert engine() is None


@pytest.mark.parametrize(
    ("name", "adapters", "changes"),
    [("full", False, {"teacher": "online"}), ("full", False, {}), ("lora", True, {})],
    ids=["full", "with averages", "adapters"],
)
def test_bytes_by_arithmetic_are_those_held(
    bench: gpu_parts.Bench, name: str, adapters: bool, changes: dict[str, Any]
) -> None:
    subject = bench.builder.get(gpu_parts.recipe(name, **changes), layers=2, adapters=adapters)
    assert sum(n for part, n in subject.bytes.items() if part != "gradients") == held_bytes(subject.engine)


def test_the_command_ends_with_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--device", "cpu", "--tiny", "--only", "d", "--rows", str(tmp_path / "rows.jsonl")]
    assert gpu.main(command) == 0
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verdict["ok"] and verdict["rows"] == 3
    assert gpu.main([*command, "--budget-s", "0"]) == 0  # all is known
    assert gpu.main([*command, "--budget-s", "0", "--only", "c"]) == 1  # left out
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
