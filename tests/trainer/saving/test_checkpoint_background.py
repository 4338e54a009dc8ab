"""A save costs the loop a copy: what is written is the state of that moment, and failures are heard where they matter."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.saving.parts import alone, latest, numbered, parts_of
from trainer.engines.engine import TensorPart
from trainer.saving import durable
from trainer.saving.certificate import CheckpointError


class Fixed:
    """An engine of two tensors."""

    def __init__(self) -> None:
        self.values = numbered(5)

    def parts(self) -> list[TensorPart]:
        return parts_of(self.values)

    def counters(self) -> dict[str, float]:
        return {"optimizer_step": 5.0}

    def load_counters(self, counters: dict[str, float]) -> None: ...


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are written once this is set."""
    event, original = threading.Event(), durable.write_file

    def held(*args: Any) -> None:
        assert event.wait(30)
        original(*args)

    monkeypatch.setattr(durable, "write_file", held)
    return event


def test_the_loop_goes_on_while_the_state_of_the_moment_is_written(tmp_path: Path, gate: threading.Event) -> None:
    engine: Any = Fixed()
    checkpoints = alone(tmp_path)
    checkpoints.save(engine, 5, 1.0)
    assert latest(tmp_path) is None and not checkpoints.abandon(0.01) and checkpoints.outcomes() == []
    engine.values["w"].fill_(-1.0)  # the next step
    assert checkpoints.latest_path() is None
    gate.set()
    checkpoints.finish()
    assert checkpoints.latest_path() == str(tmp_path / "step_00000005")
    target = numbered(0)
    alone(tmp_path).read("step_00000005", parts_of(target))
    assert torch.equal(target["w"], numbered(5)["w"])
    (saved,) = checkpoints.outcomes()
    assert (saved.step, saved.error) == (5, "") and saved.bytes > 40 and checkpoints.longest_s == saved.seconds


def test_a_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    engine: Any = Fixed()
    checkpoints = alone(tmp_path)
    checkpoints.save(engine, 5, 1.0)
    threading.Timer(0.2, gate.set).start()
    checkpoints.save(engine, 6, 1.0)
    assert gate.is_set()
    assert latest(tmp_path) is not None, "the first is published before the buffers are filled anew"
    checkpoints.finish()
    assert latest(tmp_path) == tmp_path / "step_00000006"


def test_a_failed_save_is_said_loudly_and_only_a_failed_last_one_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine: Any = Fixed()
    checkpoints = alone(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(durable, "write_all", fail)
        checkpoints.save(engine, 5, 1.0)
        checkpoints.abandon(10)
    assert "STEP 5 WAS NOT SAVED" in caplog.text and "the disk is full" in caplog.text
    checkpoints.save(engine, 6, 1.0)
    checkpoints.finish()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_all", fail)
        checkpoints.save(engine, 7, 1.0)
        with pytest.raises(CheckpointError, match="the disk is full"):
            checkpoints.finish()
    checkpoints.save(engine, 7, 1.0)  # not taken for saved
    checkpoints.finish()
    assert [bool(saved.error) for saved in checkpoints.outcomes()] == [True, False, True, False]
    assert latest(tmp_path) == tmp_path / "step_00000007"


def test_a_failure_to_copy_is_a_failed_save_too(tmp_path: Path) -> None:
    class Broken(Fixed):
        def parts(self) -> list[TensorPart]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    engine: Any = Broken()
    checkpoints = alone(tmp_path)
    checkpoints.save(engine, 5, 1.0)
    with pytest.raises(CheckpointError, match="can't allocate memory"):
        checkpoints.finish()


def test_further_counters_come_back(tmp_path: Path) -> None:
    engine: Any = Fixed()
    first = alone(tmp_path)
    first.save(engine, 5, 1.0, 2, collapse_best=0.5, collapse_checks=3.0)
    first.finish()
    done = alone(tmp_path).resume(engine)
    assert (done.step, done.seconds, done.bad_samples) == (5, 1.0, 2)
    assert (done.counters["collapse_best"], done.counters["collapse_checks"]) == (0.5, 3.0)
    assert done.metadata["engine"] == "fsdp2" and "saved_at" in done.metadata
