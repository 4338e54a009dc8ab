"""Killed, cut and failing saves: the earlier checkpoint or the new one is in force, and errors name their cause."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailedError, run_ranks
from tests.trainer.saving.parts import alone, latest, numbered, parts_of, small_engine
from trainer.saving import certificate, checkpoint_store, durable
from trainer.saving.certificate import CheckpointError
from trainer.saving.checkpoint_store import LocalCheckpoints


@pytest.mark.parametrize("operation", range(20))
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
    path, target = latest(tmp_path), numbered(0)
    assert path is not None
    found = alone(tmp_path).read(path, parts_of(target))
    assert found.step == 10
    assert torch.equal(target["b"], numbered(10)["b"]) or torch.equal(target["b"], numbered(1)["b"])
    assert status == 9 or torch.equal(target["b"], numbered(10)["b"])
    alone(tmp_path).write(15, parts_of(numbered(15)), {})  # leftovers are in nobody's way
    assert latest(tmp_path) == tmp_path / "step_00000015"
    complete = {name for name, _ in checkpoint_store.complete(LocalCheckpoints(tmp_path))}
    assert {entry.name for entry in tmp_path.iterdir()} == complete, "nothing is left behind that nobody can use"


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

    durable.write_all = dying(durable.write_all)
    durable.os.fsync = dying(os.fsync)
    Path.mkdir, Path.rename, Path.unlink = dying(Path.mkdir), dying(Path.rename), dying(Path.unlink)  # type: ignore[method-assign]
    checkpoint_store.shutil.rmtree = dying(shutil.rmtree)


def test_a_file_cut_at_any_byte_is_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / alone(tmp_path).write(5, parts_of(numbered(5)), {})
    for name in ("rank_00000.safetensors", certificate.NAME):
        whole = (path / name).read_bytes()
        for length in range(0, len(whole), max(len(whole) // 20, 1)):
            (path / name).write_bytes(whole[:length])
            assert latest(tmp_path) is None, f"{name} cut to {length} bytes"
        (path / name).write_bytes(whole)
    assert latest(tmp_path) == path


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"the disk is full: .*rank_00000.* are free.*set checkpoint\.dir"),
        (OSError(122, "Disk quota exceeded"), "the disk is full"),
        (PermissionError(13, "Permission denied"), "cannot write .*Permission denied"),
    ],
)
def test_a_failing_write_names_the_cause_and_publishes_nothing(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = alone(tmp_path)
    earlier = tmp_path / checkpoints.write(5, parts_of(numbered(5)), {})

    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(durable, "write_all", failing)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.write(10, parts_of(numbered(10)), {})
    assert latest(tmp_path) == earlier


def _fail_on_rank_one(folder: str) -> tuple[list[str], list[tuple[int, str]]]:
    engine, checkpoints, messages = small_engine(), alone(Path(folder)), []
    checkpoints.save(engine, 1, seconds=0.0)
    checkpoints.finish()
    original = durable.write_all
    for error in (OSError(28, "No space left on device"), KeyError("anything")):

        def failing(*args: Any, error: Exception = error) -> None:
            raise error

        if dist.get_rank() == 1:
            durable.write_all = failing
        checkpoints.save(engine, 2, seconds=0.0)  # the loop goes on; of a save that failed the next one is no repeat
        try:
            checkpoints.finish()
        except CheckpointError as failure:
            messages.append(str(failure))
        durable.write_all = original
    checkpoints.save(engine, 3, seconds=0.0)
    checkpoints.finish()
    return messages, [(saved.step, saved.error) for saved in checkpoints.outcomes()]


def test_a_failure_on_one_rank_is_the_same_error_on_all_and_the_next_save_works(tmp_path: Path) -> None:
    (first, ended), (second, _) = run_ranks(_fail_on_rank_one, 2, str(tmp_path))
    assert first == second and len(first) == 2
    assert ended == [(1, ""), (2, first[0]), (2, first[1]), (3, "")]
    assert first[0].startswith("rank 1: the disk is full") and first[1] == "rank 1: KeyError('anything')"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def _die_on_rank_one_while_writing(folder: str) -> None:
    engine, checkpoints = small_engine(), alone(Path(folder))
    checkpoints.save(engine, 1, seconds=0.0)
    checkpoints.finish()
    if dist.get_rank() == 1:
        durable.write_all = lambda *_: os._exit(9)
    checkpoints.save(engine, 2, seconds=0.0)
    checkpoints.finish()


def test_a_rank_killed_while_writing_leaves_the_earlier_checkpoint_in_force(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2:\nthe process died with exit code 9"):
        run_ranks(_die_on_rank_one_while_writing, 2, str(tmp_path))
    assert latest(tmp_path) == tmp_path / "step_00000001"
