"""Checkpoints: complete or absent, readable at any number of ranks, and a resumed run that loses no bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from configs.schema import Checkpoint, Ema, Optimizer
from tests.ranks import RankFailedError, run_ranks
from tests.trainer.engines import toy
from trainer import certificate, checkpoint, durable
from trainer.certificate import CheckpointError
from trainer.checkpoint import Checkpoints
from trainer.engines.engine import TensorPart
from trainer.engines.fsdp2 import FSDP2, FSDP2Options

ROWS = 12


def parts_of(values: dict[str, torch.Tensor], group: str = "parameter") -> list[TensorPart]:
    return [TensorPart(group, name, tuple(v.shape), 0, v.view(-1)) for name, v in values.items()]


def numbered(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(6.0).reshape(2, 3) + step, "b": torch.full((4,), float(step))}


def alone(folder: Path, keep_last: int = 2) -> Checkpoints:
    return Checkpoints(folder, Checkpoint(keep_last=keep_last), {"engine": "fsdp2"})


# ---- engines: interchange between numbers of ranks, resume


def _engine(teacher: str = "online", **options: Any) -> FSDP2:
    return FSDP2(
        FSDP2Options(**options), toy.ToyBackbone(seed=3), Optimizer(learning_rate=0.02), Ema(decay=0.9), teacher
    )


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
    engine, checkpoints = _engine(**options), alone(Path(folder))
    _train(engine, range(steps))
    checkpoints.save(engine, steps, seconds=1.5)
    saved = _whole(engine)
    _train(engine, range(steps, until))
    return saved, _state(engine)


def _resume(folder: str, options: dict[str, Any], until: int) -> Any:
    engine, checkpoints = _engine(**options), alone(Path(folder))
    done = checkpoints.resume(engine)
    loaded = _whole(engine)
    _train(engine, range(done.step, until))
    return done, loaded, _state(engine)


def _all_parts(folder: str, ranks: int) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, read as one rank reads it."""
    path = certificate.latest(Path(folder))
    assert path is not None
    names = {(g, n): s for g, named in certificate.read(path).tensors.items() for n, s in named.items()}
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
    groups = {name.split("/")[0] for name in _all_parts(str(tmp_path), 1)}
    assert groups == {"parameter", "exp_avg", "exp_avg_sq", "ema"}
    moments = {key: value.clone() for key, value in _all_parts(str(tmp_path), 1).items()}
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
    path = certificate.latest(tmp_path)
    assert path is not None
    written = (path / certificate.NAME).stat().st_mtime_ns
    checkpoints.save(engine, 5, seconds=2.0)
    assert (path / certificate.NAME).stat().st_mtime_ns == written
    engine.step = 8
    alone(tmp_path).save(engine, 5, seconds=3.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000005"]
    target = numbered(0)
    found = checkpoints.read(path, parts_of(target))
    assert torch.equal(target["w"], numbered(8)["w"])
    assert (found.step, found.metadata, found.counters["training_seconds"]) == (5, {"engine": "fsdp2"}, 3.0)


def test_only_the_newest_complete_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path, keep_last=2)
    for step in (5, 10, 100000000, 20):
        checkpoints.write(step, parts_of(numbered(step)), {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000020", "step_100000000"]
    assert certificate.latest(tmp_path) == tmp_path / "step_100000000"
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
        newest = checkpoints.write(step, parts_of(numbered(step)), {})
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert certificate.latest(tmp_path) == tmp_path / "step_00000005"
    assert str(newest) in caplog.text
    with pytest.raises(CheckpointError, match=r"step_00000010.*(earlier|restore)"):
        checkpoints.read(newest, parts_of(numbered(0)))


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    for step in (5, 10):
        newest = checkpoints.write(step, parts_of(numbered(step)), {})
    content = json.loads((newest / certificate.NAME).read_text())
    (newest / certificate.NAME).write_text(json.dumps({**content, "format": certificate.FORMAT + 1}))
    with pytest.raises(CheckpointError, match="open the run with the version that wrote it"):
        certificate.latest(tmp_path)


def test_a_certificate_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    path = alone(tmp_path).write(5, parts_of(numbered(5)), {})
    text = (path / certificate.NAME).read_text()
    (path / certificate.NAME).write_text(text.replace("rank_00000.safetensors", "../rank_00000.safetensors"))
    with pytest.raises(CheckpointError, match="damaged"):
        certificate.read(path)


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
        described = [[("parameter", "w", checkpoint._describe(part, "f"))] for part in bad]
        merged = certificate.Certificate(1, {}, {}, {}, checkpoint._merge(described))
        with pytest.raises(CheckpointError, match=r"parameter/w .* leave gaps or overlap"):
            certificate.check_coverage(merged)
    with pytest.raises(CheckpointError, match="leave gaps"):
        alone(tmp_path).write(1, [TensorPart("parameter", "w", (6,), 0, whole[:4])], {})
    assert certificate.latest(tmp_path) is None


# ---- killed and failing saves


@pytest.mark.parametrize("operation", range(16))
def test_a_save_killed_at_any_point_leaves_the_earlier_or_the_new_checkpoint(operation: int, tmp_path: Path) -> None:
    """The child dies just before durable operation number `operation` (opens, syncs, renames, removals)."""
    alone(tmp_path).write(5, parts_of(numbered(5)), {})
    alone(tmp_path).write(10, parts_of(numbered(1)), {})
    child = os.fork()
    if child == 0:
        _count_down(operation)
        alone(tmp_path, keep_last=1).write(10, parts_of(numbered(10)), {})  # replaces one of that step too
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    path, target = certificate.latest(tmp_path), numbered(0)
    assert path is not None
    found = alone(tmp_path).read(path, parts_of(target))
    assert found.step == 10
    assert torch.equal(target["b"], numbered(10)["b"]) or torch.equal(target["b"], numbered(1)["b"])
    assert status == 9 or torch.equal(target["b"], numbered(10)["b"])
    alone(tmp_path).write(15, parts_of(numbered(15)), {})  # leftovers are in nobody's way
    assert certificate.latest(tmp_path) == tmp_path / "step_00000015"
    assert not list(tmp_path.glob(".*.partial"))


def _count_down(operation: int) -> None:
    """From here on, the process dies before its filesystem operation number `operation`."""
    left = [operation]

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return function(*args, **kwargs)

        return wrapped

    durable.save_file = dying(durable.save_file)
    durable.os.fsync = dying(os.fsync)
    Path.mkdir, Path.rename, Path.unlink = dying(Path.mkdir), dying(Path.rename), dying(Path.unlink)  # type: ignore[method-assign]
    checkpoint.shutil.rmtree = dying(shutil.rmtree)


def test_a_file_cut_at_any_byte_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    path = alone(tmp_path).write(5, parts_of(numbered(5)), {})
    for name in ("rank_00000.safetensors", certificate.NAME):
        whole = (path / name).read_bytes()
        for length in range(0, len(whole), max(len(whole) // 20, 1)):
            (path / name).write_bytes(whole[:length])
            assert certificate.latest(tmp_path) is None, f"{name} cut to {length} bytes"
        (path / name).write_bytes(whole)
    assert certificate.latest(tmp_path) == path


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"the disk is full: .*rank_00000.* are free.*set run\.dir"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (PermissionError(13, "Permission denied"), "cannot write .*Permission denied"),
    ],
)
def test_a_failing_write_names_the_cause_and_publishes_nothing(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = alone(tmp_path)
    earlier = checkpoints.write(5, parts_of(numbered(5)), {})

    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(durable, "save_file", failing)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.write(10, parts_of(numbered(10)), {})
    assert certificate.latest(tmp_path) == earlier


def _fail_on_rank_one(folder: str) -> list[str]:
    engine, checkpoints, messages = _engine(), alone(Path(folder)), []
    checkpoints.save(engine, 1, seconds=0.0)
    original = durable.save_file
    for error in (OSError(28, "No space left on device"), KeyError("anything")):

        def failing(*args: Any, error: Exception = error) -> None:
            raise error

        if dist.get_rank() == 1:
            durable.save_file = failing
        try:
            checkpoints.save(engine, 2, seconds=0.0)
        except CheckpointError as failure:
            messages.append(str(failure))
        durable.save_file = original
    checkpoints.save(engine, 3, seconds=0.0)
    return messages


def test_a_failure_on_one_rank_is_the_same_error_on_all_and_the_next_save_works(tmp_path: Path) -> None:
    first, second = run_ranks(_fail_on_rank_one, 2, str(tmp_path))
    assert first == second and len(first) == 2
    assert first[0].startswith("rank 1: the disk is full") and first[1] == "rank 1: KeyError('anything')"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def _die_on_rank_one_while_writing(folder: str) -> None:
    engine, checkpoints = _engine(), alone(Path(folder))
    checkpoints.save(engine, 1, seconds=0.0)
    if dist.get_rank() == 1:
        durable.save_file = lambda *_: os._exit(9)
    checkpoints.save(engine, 2, seconds=0.0)


def test_a_rank_killed_while_writing_leaves_the_earlier_checkpoint_in_force(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2:\nthe process died with exit code 9"):
        run_ranks(_die_on_rank_one_while_writing, 2, str(tmp_path))
    assert certificate.latest(tmp_path) == tmp_path / "step_00000001"
