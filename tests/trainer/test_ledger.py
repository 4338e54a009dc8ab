"""The run's own files about samples: replacements survive a resume once each, and every trained sample is written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import Batch, Replacement
from data.manifest import read_manifest
from data.order import Order
from tests.data.sets import noise_shards, write_set
from tests.ranks import run_ranks
from trainer.bad_samples import BadSamples
from trainer.ledger import REPLACEMENTS, Ledger, SampleLog


def bad(row: int) -> Replacement:
    return Replacement(row, "noise-0.tar", f"0-{row}", 512 * row, "0-9", f"noise-0.tar, sample 0-{row}: no image")


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / REPLACEMENTS).read_text().splitlines()]


def add_on_rank(folder: str) -> None:
    import torch.distributed as dist

    ledger = Ledger(Path(folder), 0)
    ledger.add(4, [bad(3)] if dist.get_rank() else [bad(1), bad(0)])
    ledger.add(5, [bad(2)] if dist.get_rank() else [])


def test_entries_of_all_ranks_stand_in_one_file_by_step_and_row(tmp_path: Path) -> None:
    run_ranks(add_on_rank, 2, str(tmp_path))
    found = entries(tmp_path)
    assert [(entry["step"], entry["row"]) for entry in found] == [(4, 0), (4, 1), (4, 3), (5, 2)]
    assert found[1] == {"step": 4, **bad(1)._asdict()}


def test_steps_that_a_resumed_run_takes_again_are_listed_once(tmp_path: Path) -> None:
    first = Ledger(tmp_path, 0)
    for step in range(6):
        first.add(step, [bad(step)])
    with open(tmp_path / REPLACEMENTS, "a") as file:
        file.write('{"step": 5, "row')  # a killed process
    resumed = Ledger(tmp_path, 4)  # the checkpoint holds steps 0 to 3
    for step in range(4, 8):
        resumed.add(step, [bad(step)])
    assert [entry["step"] for entry in entries(tmp_path)] == list(range(8))


def test_the_file_is_bounded_also_over_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger(tmp_path, 0, most=5)
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            ledger.add(step, [bad(0), bad(1)])
    assert len(entries(tmp_path)) == 5
    assert caplog.text.count("no longer listed") == 1
    Ledger(tmp_path, 9, most=5).add(9, [bad(0)])
    assert len(entries(tmp_path)) == 5


def test_what_the_ceiling_counts_is_what_the_ledger_lists(tmp_path: Path) -> None:
    order = Order(read_manifest(str(write_set(tmp_path / "set", noise_shards(1, 40)))), seed=0, global_batch_size=4)
    count = BadSamples(order, 0.5, ledger=Ledger(tmp_path, 0))
    count.add(0, 0, ())
    assert not (tmp_path / REPLACEMENTS).exists()
    count.add(1, 2, (bad(0), bad(1)))
    assert count.in_epoch == len(entries(tmp_path)) == 2


def test_the_samples_of_every_trained_step_are_written_by_rank(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, rank=3, step=7)
    log.add(Batch(7, (8, 8), torch.arange(2, 4), None, ("x", "y"), ("a", "b"), ("s.tar", "s.tar"), (0, 1)))
    (path,) = (tmp_path / "samples").iterdir()
    assert path.name == "step_00000007_rank_00003.jsonl"
    assert json.loads(path.read_text()) == {
        "step": 7,
        "rows": [2, 3],
        "own_epochs": [0, 1],
        "shards": ["s.tar", "s.tar"],
        "keys": ["a", "b"],
    }


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = SampleLog(tmp_path, rank=0, step=0)
    record._file.close()
    record._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    for step in (0, 1):
        record.add(Batch(step, (8, 8), torch.arange(1), None, ("",), (f"{step}",), ("a.tar",), (0,)))
    assert caplog.text.count("No space left") == 1
    assert "step 0" in caplog.text
