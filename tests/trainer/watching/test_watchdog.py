"""A run that hangs ends, and says where every rank was; with real ranks that really hang."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from configs.schema import Config, Runtime, Train
from data.batch import Batch
from tests.ranks import RankFailedError, run_ranks
from trainer import loop
from trainer.engines.distributed import Agreement
from trainer.stages import Stages
from trainer.updates import Updates
from trainer.watching import hang
from trainer.watching.watchdog import EXIT_CODE, Patience

RUNTIME = Runtime(hang_timeout_s=1.0, hang_first_timeout_s=2.0)


class Nets:
    """Counts like CountedNets."""

    def __init__(self) -> None:
        self.calls, self.called_step, self.step_calls = 0, -1, (0, 0)

    def begin_step(self, step: int) -> None:
        self.called_step, self.step_calls = step, (0, 0)

    def call(self) -> None:
        self.calls, self.step_calls = self.calls + 1, (self.step_calls[0] + 1, self.step_calls[1])


def a_run(folder: Path, runtime: Runtime = RUNTIME) -> Any:
    """What the watchdog asks of a run, on this rank; its words go to <folder>/rank_<n>."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    (folder / f"began_{rank}").touch()
    log = os.open(folder / f"rank_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    sys.stderr = os.fdopen(os.dup(log), "w")
    status: list[Any] = []

    def write_status(*words: Any, **more: Any) -> None:
        status.append(words)
        (folder / "status").write_text(repr(words))

    return SimpleNamespace(
        world=SimpleNamespace(rank=rank, world_size=ranks),
        config=Config(runtime=runtime, train=Train(steps=9, global_batch_size=2, micro_batch_size=1)),
        step=4,
        stages=Stages(),
        nets=Nets(),
        folder=SimpleNamespace(path=folder, write_status=write_status),
        tracker=SimpleNamespace(finish=lambda *_, **__: True),
    )


def visit_all(run: Any) -> None:
    for stage in ("data", "agree", "encode", "targets"):
        with run.stages(stage):
            pass


def sleeping_rank(folder: Path) -> None:
    run = a_run(folder)
    visit_all(run)
    with hang.watch(run, dict), run.stages("targets"):
        run.nets.begin_step(run.step)
        run.nets.call()
        dist.barrier() if run.world.rank == 0 else sleep_long()
        dist.barrier()


def sleep_long() -> None:
    time.sleep(60)


def stopped_rank(folder: Path) -> None:
    run = a_run(folder)
    visit_all(run)
    with hang.watch(run, dict), run.stages("encode"):
        time.sleep(0.5)
        if run.world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


def hanging_loader(folder: Path) -> None:
    """The loop itself; rank 1's loader gives two batches and then nothing."""

    def load() -> Iterator[Any]:
        for step in (4, 5):
            yield SimpleNamespace(step=step, keys=(), replaced=())
        sleep_long() if run.world.rank == 1 else None
        yield SimpleNamespace(step=6, keys=(), replaced=())

    def train_step(run: Any, batch: Batch, tally: Any) -> None:
        run.nets.begin_step(run.step)

    run = a_run(folder)
    run.loader, run.objective, run.profiler = load(), None, None
    run.engine = SimpleNamespace(device="cpu")
    run.order = SimpleNamespace(stream=lambda step: SimpleNamespace(name="only"))
    run.stop = SimpleNamespace(requested=0)
    run.bad_samples = SimpleNamespace(add=lambda *_: None)
    run.agreement, run.updates = Agreement(60.0), Updates()
    run.config.checkpoint.every = 0
    loop.train_step = train_step  # this process ends with the test
    loop.log = lambda *_: None  # type: ignore[assignment]
    with hang.watch(run, dict):
        loop.fit(run)


def different_calls(folder: Path, budget: float) -> None:
    """Rank 1 makes a third no-grad call, which waits for a rank that never makes it."""
    run = a_run(folder, Runtime(hang_timeout_s=budget, hang_first_timeout_s=budget))
    run.nets.begin_step(run.step)
    with hang.watch(run, dict):
        with run.stages("targets"):
            for _ in range(2 + run.world.rank):
                run.nets.call()
            if run.world.rank == 1:
                sleep_long()
        with run.stages("graded pass"):
            dist.barrier()


def ended(function: Any, folder: Path, *more: Any) -> tuple[str, str, float]:
    """What ranks 0 and 1 wrote, and the seconds from their start to the last word in the run's status."""
    with pytest.raises(RankFailedError, match=f"exit code {EXIT_CODE}"):
        run_ranks(function, 2, folder, *more, timeout=150)
    seconds = (folder / "status").stat().st_mtime - (folder / "began_0").stat().st_mtime
    return (folder / "rank_0").read_text(), (folder / "rank_1").read_text(), seconds


@pytest.mark.slow
def test_a_rank_that_sleeps_ends_the_run_with_the_stacks_of_both(tmp_path: Path) -> None:
    first, second, seconds = ended(sleeping_rank, tmp_path)
    assert seconds < 20
    assert "stacks of rank 0, in stage 'targets' of step 4" in first and "in barrier" in first
    assert "stacks of rank 1" in second and "in sleep_long" in second
    for said in (first, second):
        assert "ranks 0-1: in stage 'targets' of step 4, 1 no-grad and 0 graded" in said
        assert "failed at step 4: the run hangs: rank" in said and "silent" not in said
    assert "the run hangs" in (tmp_path / "status").read_text()


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_the_others(tmp_path: Path) -> None:
    first, _, _ = ended(stopped_rank, tmp_path)
    assert "stacks of rank 0" in first
    assert "rank 1 is silent (last seen in stage 'encode' of step 4" in first


@pytest.mark.slow
def test_a_loader_that_hangs_is_found_in_the_data_stage(tmp_path: Path) -> None:
    first, second, _ = ended(hanging_loader, tmp_path)
    assert "rank 0: in stage 'agree' of step 6" in first
    assert "rank 1: in stage 'data' of step 6" in first
    assert "in sleep_long" in second


@pytest.mark.slow
def test_unequal_calls_are_named_long_before_the_budget(tmp_path: Path) -> None:
    first, second, seconds = ended(different_calls, tmp_path, 100.0)
    assert seconds < 25
    for said in (first, second):
        assert "different network calls in step 4: rank 1 has begun 3 no-grad calls, rank 0 made 2" in said


def a_slow_step(folder: Path) -> float:
    """Longer than the budget in all, but with progress; then a first visit that is longer than the usual budget."""
    run, began = a_run(folder), time.monotonic()
    visit_all(run)
    with hang.watch(run, dict):
        for _ in range(4):
            with run.stages("targets"):
                time.sleep(0.4)
                run.nets.call()
                time.sleep(0.4)
        with run.stages("graded pass"):
            time.sleep(1.5)
    return time.monotonic() - began


def test_progress_and_first_visits_are_no_hang(tmp_path: Path) -> None:
    assert run_ranks(a_slow_step, 1, tmp_path)[0] > 4
    assert (tmp_path / "rank_0").read_text() == ""


def suspended(folder: Path) -> None:
    """Stopped for longer than the budget and continued, as a scheduler does; a little helper wakes this process."""
    run = a_run(folder)
    visit_all(run)
    with hang.watch(run, dict), run.stages("targets"):
        time.sleep(0.3)
        if (helper := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                time.sleep(2.5)
                os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.2)
        os.waitpid(helper, 0)


def test_a_suspended_job_has_not_hung_when_it_is_continued(tmp_path: Path) -> None:
    run_ranks(suspended, 1, tmp_path)
    assert "the run hangs" not in (tmp_path / "rank_0").read_text()


def test_the_budget_lies_below_the_collective_timeout() -> None:
    assert Patience.of(Runtime(hang_timeout_s=300, collective_timeout_s=100)).usual_s == 80
    patience = Patience.of(Runtime(hang_timeout_s=60, hang_first_timeout_s=30, collective_timeout_s=600))
    assert (patience.usual_s, patience.first_s) == (60, 60)
