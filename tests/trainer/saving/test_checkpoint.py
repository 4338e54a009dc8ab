"""Checkpoints: complete or absent, readable at any number of ranks, and a resumed run that loses no bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.trainer.engines import toy
from tests.trainer.saving.parts import alone, latest, numbered, parts_of, small_engine
from trainer.engines.engine import TensorPart
from trainer.engines.fsdp2 import FSDP2
from trainer.saving import certificate, checkpoint, checkpoint_store
from trainer.saving.certificate import CheckpointError
from trainer.saving.checkpoint_parts import Written, describe, merge
from trainer.saving.checkpoint_store import LocalCheckpoints

ROWS = 12


# ---- engines: interchange between numbers of ranks, resume


def _train(engine: FSDP2, steps: range) -> None:
    for step in steps:
        rows = toy.cut(toy.batch(ROWS, step, torch.float32), dist.get_rank(), dist.get_world_size())
        for part in range(2):
            graded = toy.cut(rows, part, 2)
            velocity = engine.nets.velocity(graded["x_t"], graded["t"], graded["r"], graded["cond"])
            engine.backward(toy.loss(velocity, graded, ROWS))
        engine.step(0.02)
        engine.update_ema()


def _state(engine: FSDP2) -> dict[str, Any]:
    parts = {f"{p.group}/{p.name}/{p.start}": p.local.clone() for p in engine.parts()}
    return {"parts": parts, "counters": engine.counters()}


def _whole(engine: FSDP2) -> dict[str, dict[str, torch.Tensor]]:
    whole: list[Any] = [engine.full_state("online"), engine.full_state("ema")]
    return dict(zip(("online", "ema"), whole, strict=True)) if dist.get_rank() == 0 else {}


def _train_and_save(folder: str, options: dict[str, Any], steps: int, until: int) -> Any:
    engine, checkpoints = small_engine(**options), alone(Path(folder))
    _train(engine, range(steps))
    checkpoints.save(engine, steps, seconds=1.5)
    saved = _whole(engine)
    _train(engine, range(steps, until))  # while the save is being written
    checkpoints.finish()
    return saved, _state(engine)


def _resume(folder: str, options: dict[str, Any], until: int) -> Any:
    engine, checkpoints = small_engine(**options), alone(Path(folder))
    done = checkpoints.resume(engine)
    loaded = _whole(engine)
    _train(engine, range(done.step, until))
    return done, loaded, _state(engine)


def _all_parts(folder: str) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, read as one rank reads it."""
    store = LocalCheckpoints(Path(folder))
    path = checkpoint_store.latest(store)
    assert path is not None
    tensors = checkpoint_store.read(store, path).tensors
    names = {(g, n): s for g, named in tensors.items() for n, s in named.items()}
    parts = [TensorPart(g, n, s.shape, 0, torch.full(s.shape, float("nan")).view(-1)) for (g, n), s in names.items()]
    alone(Path(folder)).read(path, parts)
    return {f"{part.group}/{part.name}": part.local for part in parts}


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    options = {"teacher": "ema"}
    uninterrupted = run_ranks(_train_and_save, 2, str(tmp_path), options, 3, 6)
    resumed = run_ranks(_resume, 2, str(tmp_path), options, 6)
    for (_, expected), (done, _, found) in zip(uninterrupted, resumed, strict=True):
        assert (done.step, done.seconds) == (3, 1.5)
        assert found["counters"] == expected["counters"] and found["counters"]["optimizer_step"] == 6
        assert found["parts"].keys() == expected["parts"].keys()
        assert all(torch.equal(found["parts"][key], value) for key, value in expected["parts"].items())


@pytest.mark.parametrize(("writers", "mesh"), [(2, {}), (4, {"replicate": 2})])
def test_what_some_ranks_saved_any_number_of_ranks_loads(writers: int, mesh: dict[str, Any], tmp_path: Path) -> None:
    saved = run_ranks(_train_and_save, writers, str(tmp_path), mesh, 2, 2)[0][0]
    groups = {name.split("/")[0] for name in _all_parts(str(tmp_path))}
    assert groups == {"parameter", "exp_avg", "exp_avg_sq", "ema"}
    moments = {key: value.clone() for key, value in _all_parts(str(tmp_path)).items()}
    for readers in (1, 3):
        done, loaded, state = run_ranks(_resume, readers, str(tmp_path), {}, 2)[0]
        assert done.step == 2
        for which in ("online", "ema"):
            assert loaded[which].keys() == saved[which].keys()
            assert all(torch.equal(loaded[which][name], tensor) for name, tensor in saved[which].items())
        for key, local in state["parts"].items():
            group, name, start = key.rsplit("/", 2)
            whole = moments[f"{group}/{name}"]
            assert torch.equal(local, whole[int(start) : int(start) + local.numel()])


# ---- one folder, no ranks: publication, retention, refusals


def test_save_twice_at_one_step_writes_once_and_a_fresh_process_replaces(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)

    class Fixed:
        step = 1

        def parts(self) -> list[TensorPart]:
            return parts_of(numbered(self.step))

        def counters(self) -> dict[str, float]:
            return {"optimizer_step": 5.0}

        def load_counters(self, counters: dict[str, float]) -> None:
            assert counters["optimizer_step"] == 5.0

    engine: Any = Fixed()
    checkpoints.save(engine, 5, seconds=2.0)
    checkpoints.finish()
    path = latest(tmp_path)
    assert path is not None
    written = (path / certificate.NAME).stat().st_mtime_ns
    checkpoints.save(engine, 5, seconds=2.0)
    checkpoints.finish()
    assert (path / certificate.NAME).stat().st_mtime_ns == written
    engine.step = 8
    fresh = alone(tmp_path)
    fresh.save(engine, 5, seconds=3.0)
    fresh.finish()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000005"]
    target = numbered(0)
    found = checkpoints.read(path, parts_of(target))
    assert torch.equal(target["w"], numbered(8)["w"])
    assert (found.step, found.metadata["engine"], found.counters["training_seconds"]) == (5, "fsdp2", 3.0)


def test_only_the_newest_complete_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path, keep_last=2)
    for step in (5, 10, 100000000, 20):
        checkpoints.write(step, parts_of(numbered(step)), {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000020", "step_100000000"]
    assert latest(tmp_path) == tmp_path / "step_100000000"
    with pytest.raises(ValueError, match="keep_last is 0"):
        alone(tmp_path, keep_last=0)


def test_without_a_checkpoint_a_run_starts_at_zero(tmp_path: Path) -> None:
    engine: Any = object()
    assert alone(tmp_path / "absent").resume(engine) == checkpoint.Progress(0, 0.0)


def _shorten(path: Path) -> None:
    file = path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _remove_file(path: Path) -> None:
    (path / "rank_00000.safetensors").unlink()


def _remove_certificate(path: Path) -> None:
    (path / certificate.NAME).unlink()


def _cut_certificate(path: Path) -> None:
    file = path / certificate.NAME
    file.write_text(file.read_text()[:-30])


def _empty_certificate(path: Path) -> None:
    (path / certificate.NAME).write_text("{}")


@pytest.mark.parametrize("damage", [_shorten, _remove_file, _remove_certificate, _cut_certificate, _empty_certificate])
def test_a_damaged_checkpoint_is_passed_over_and_reading_it_says_what_to_do(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = alone(tmp_path)
    for step in (5, 10):
        newest = tmp_path / checkpoints.write(step, parts_of(numbered(step)), {})
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "step_00000005"
    assert str(newest) in caplog.text
    with pytest.raises(CheckpointError, match=r"step_00000010.*(earlier|restore)"):
        checkpoints.read(newest, parts_of(numbered(0)))


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    for step in (5, 10):
        newest = tmp_path / checkpoints.write(step, parts_of(numbered(step)), {})
    content = json.loads((newest / certificate.NAME).read_text())
    (newest / certificate.NAME).write_text(json.dumps({**content, "format": certificate.FORMAT + 1}))
    with pytest.raises(CheckpointError, match="open the run with the version that wrote it"):
        latest(tmp_path)


def test_a_certificate_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    path = tmp_path / alone(tmp_path).write(5, parts_of(numbered(5)), {})
    text = (path / certificate.NAME).read_text()
    (path / certificate.NAME).write_text(text.replace("rank_00000.safetensors", "../rank_00000.safetensors"))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint_store.read(LocalCheckpoints(tmp_path), path.name)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"w": torch.zeros(2, 3)}, r"0 missing \[\], 1 unexpected \[\('parameter', 'b'\)\]"),
        ({**numbered(0), "c": torch.zeros(1)}, r"1 missing \[\('parameter', 'c'\)\]"),
        ({**numbered(0), "w": torch.zeros(3, 2)}, r"parameter/w is float32 \(2, 3\)"),
        ({**numbered(0), "b": torch.zeros(4, dtype=torch.float64)}, "parameter/b is float32"),
    ],
)
def test_another_model_is_refused_by_name(wanted: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    path = checkpoints.write(5, parts_of(numbered(5)), {})
    with pytest.raises(CheckpointError, match=message):
        checkpoints.read(path, parts_of(wanted))


def test_parts_that_leave_a_gap_or_overlap_are_not_published(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    for first, second in (((0, 2), (3, 6)), ((0, 4), (3, 6))):
        bad = [TensorPart("parameter", "w", (6,), a, whole[a:b]) for a, b in (first, second)]
        merged = certificate.Certificate(1, {}, {}, {}, merge([Written("f", 9, [describe(part)]) for part in bad]))
        with pytest.raises(CheckpointError, match=r"parameter/w .* leave gaps or overlap"):
            certificate.check_coverage(merged)
    with pytest.raises(CheckpointError, match="leave gaps"):
        alone(tmp_path).write(1, [TensorPart("parameter", "w", (6,), 0, whole[:4])], {})
    assert latest(tmp_path) is None
