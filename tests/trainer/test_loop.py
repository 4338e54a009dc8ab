"""What the loop does when, and how it ends; the numbers of a step are tested elsewhere."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema import Checkpoint, Config, Sample, Tracking, Train
from data.s3 import DataError
from trainer import loop
from trainer.engines.distributed import Agreed, Word
from trainer.loop import StepRefused
from trainer.observe.counting import PassCounts
from trainer.observe.metrics import Clock, Tally
from trainer.updates import Made, Updates


class Recorder:
    """Stands for the parts of a run that act at a step: (what, step) of every call."""

    def __init__(self, loader: Any, said: Agreed | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.config = Config(
            train=Train(steps=4, global_batch_size=2, micro_batch_size=2),
            tracking=Tracking(every=2, held_out_every=2),
            sample=Sample(every=2),
            checkpoint=Checkpoint(every=2),
        )
        self.step, self.seconds, self.loader, self.objective = 0, 0.0, loader, None
        self.engine = SimpleNamespace(device=torch.device("cpu"))
        self.world = SimpleNamespace(rank=1)
        self.stages = lambda name: contextlib.nullcontext()
        self.order = SimpleNamespace(stream=lambda step: SimpleNamespace(name="only"))
        self.stop = SimpleNamespace(requested=0)
        self.nets, self.profiler, self.updates = SimpleNamespace(step_calls=(0, 0)), None, Updates()
        self.bad_samples = SimpleNamespace(add=lambda step, count, replaced: None, in_epoch=0)
        self.agreement = SimpleNamespace(agree=lambda step, word: said or Agreed(word.stop, (), 0))
        self.showcase = SimpleNamespace(held_out=self.note("held-out"), grids=self.note("grids"), counters=dict)
        self.checkpoints = SimpleNamespace(save=self.note("save"), finish=self.note("finish"), outcomes=list)

    def note(self, what: str) -> Any:
        return lambda *_: self.calls.append((what, self.step))


@pytest.fixture
def cheap_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", lambda run, batch, tally: None)
    monkeypatch.setattr(loop, "log", lambda *_: None)


def batches(count: int) -> list[Any]:
    return [SimpleNamespace(step=step, keys=("a", "b"), replaced=()) for step in range(count)]


@pytest.mark.usefixtures("cheap_steps")
def test_the_end_of_the_run_is_shown_once() -> None:
    """After the last step only the save is left: the final pictures and scores belong to the conclusion."""
    run: Any = Recorder(batches(4))
    assert loop.fit(run)
    assert run.calls == [("held-out", 2), ("grids", 2), ("save", 2), ("save", 4), ("finish", 4)]


@pytest.mark.usefixtures("cheap_steps")
def test_a_request_to_stop_saves_and_says_that_steps_are_left() -> None:
    run: Any = Recorder(batches(4))
    agreed = iter([Agreed(0, (), 0), Agreed(15, (), 0)])
    run.agreement = SimpleNamespace(agree=lambda step, word: next(agreed))
    assert not loop.fit(run)
    assert (run.step, run.calls) == (1, [("save", 1), ("finish", 1)])


@pytest.mark.parametrize("trouble", [DataError("shard 3 is gone"), KeyError("jpg")])
@pytest.mark.usefixtures("cheap_steps")
def test_an_error_of_the_loader_is_raised_as_it_was_after_all_ranks_heard_of_it(trouble: Exception) -> None:
    """An unforeseen error keeps its traceback, without which nobody can mend it."""

    def failing() -> Any:
        yield from batches(1)
        raise trouble

    heard: list[bool] = []

    def agree(step: int, word: Word) -> Agreed:
        heard.append(word.data_error)
        return Agreed(0, (1,) if word.data_error else (), 0)

    run: Any = Recorder(failing())
    run.agreement = SimpleNamespace(agree=agree)
    with pytest.raises(type(trouble)) as caught:
        loop.fit(run)
    assert caught.value is trouble
    assert heard == [False, True] and run.calls == []


@pytest.mark.usefixtures("cheap_steps")
def test_a_rank_without_a_batch_ends_the_others() -> None:
    run: Any = Recorder(batches(4), said=Agreed(0, (2, 5), 0))
    with pytest.raises(StepRefused, match="rank 2, 5 has no batch for step 0"):
        loop.fit(run)


def test_a_log_entry_speaks_of_the_steps_since_the_last_one() -> None:
    """Two steps of half a second: 3e12 FLOPs in one second, and half of the rows in each."""
    run: Any = Recorder(batches(4))
    run.step, run.objective = 2, SimpleNamespace(effective_guidance=2.0)
    run.nets = SimpleNamespace(drain=lambda: PassCounts(6, 4, 40, 16, 0, flops=3 * 10**12))
    run.encoding = SimpleNamespace(truncated=0)
    run.stages = SimpleNamespace(drain=lambda: {"targets": 0.4})
    entries: dict[int, dict[str, float]] = {}
    run.tracker = SimpleNamespace(metrics=entries.__setitem__)
    now = iter([0.0, 1.0])
    clock, tally = Clock(now=lambda: next(now)), Tally("cpu")
    for _ in range(2):
        clock.step(2)
        tally.add_terms({"loss": torch.tensor(3.0)})
        tally.add_scalars({"grad_norm": torch.tensor(1.0)})
        tally.end_step()
    loop.log(run, tally, clock, SimpleNamespace(set_postfix_str=lambda *_, **__: None), 2)
    entry = entries[2]
    assert entry["tflops_per_second"] == pytest.approx(3.0)
    assert (entry["loss"], entry["step_seconds"], entry["images_per_second"]) == (3.0, 0.5, 4.0)
    assert (entry["passes/no_grad"], entry["passes/rows_graded"], entry["seconds/targets"]) == (3.0, 8.0, 0.2)
    assert (run.seconds, entry["skipped_steps"]) == (1.0, 0.0)


def test_nothing_is_saved_after_an_update_that_was_left_out() -> None:
    """The logged step that would notice may come later than the save."""
    run: Any = Recorder(batches(4))
    run.updates.add(Made(3, ("a", "b"), torch.tensor(1.0), torch.tensor(float("nan"))))
    with pytest.raises(StepRefused, match=r"step 3: .*rank 0: a, b.*train\.non_finite=skip"):
        loop.save(run)
    assert run.calls == []


def test_the_policy_to_skip_goes_on_and_says_so() -> None:
    run: Any = Recorder(batches(4))
    run.config.train.non_finite, events = "skip", []
    run.tracker = SimpleNamespace(event=lambda what, **said: events.append((what, said["message"])))
    run.updates.add(Made(3, ("a", "b"), torch.tensor(float("inf")), torch.tensor(float("nan"))))
    loop.save(run)
    assert run.calls == [("save", 0)] and run.updates.skipped == 1
    assert events[0][0] == "update left out" and "step 3: a loss was not finite" in events[0][1]
