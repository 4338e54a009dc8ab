"""The training loop: batch -> encode -> targets -> loss -> backward -> step -> ema -> log -> save -> preempt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from data.batch import Batch
from trainer.bad_samples import TooManyBadSamples
from trainer.engines.distributed import Word, schedule_hash
from trainer.engines.optim import learning_rate
from trainer.observe.metrics import Clock, Tally
from trainer.run import Run, make_targets


class StepRefused(RuntimeError):
    """Training cannot go on; the message names the step, the samples and the remedy."""


def fit(run: Run) -> bool:
    """Train from run.step to the last step; False when a signal ended it early. The state is saved either way."""
    config, tally, recent = run.config, Tally(run.engine.device), Recent()
    batches, clock = iter(run.loader), Clock()  # in this order: to start loader processes is no part of a step
    with progress(run) as bar:
        while run.step < config.train.steps:
            with run.stages("data"), clock.waiting():
                batch, trouble = next_batch(batches)
            if stop_agreed(run, batch, trouble) or batch is None:
                break
            train_step(run, batch, tally)
            recent.add(batch)
            run.step += 1
            clock.step(config.train.global_batch_size)
            bar.update()
            if due(run.step, config.tracking.every) or run.step == config.train.steps:
                log(run, tally, clock, recent, bar)
            with clock.aside():
                if due(run.step, config.tracking.held_out_every) and run.step < config.train.steps:
                    run.showcase.held_out(run)
                if due(run.step, config.sample.every) and run.step < config.train.steps:
                    run.showcase.grids(run)
                if due(run.step, config.checkpoint.every) and run.step < config.train.steps:
                    save(run)
        if recent.keys:
            log(run, tally, clock, recent, bar)
    save(run)
    return run.step == config.train.steps


def train_step(run: Run, batch: Batch, tally: Tally) -> None:
    """One optimizer step on this rank's window of the global batch."""
    config = run.config
    with run.stages("encode"):
        x, cond, null = run.encoding.encode(batch)
    with run.stages("targets"):
        targets = make_targets(run, batch, x, cond, null, run.step)
        tally.add(targets.tally)
    size = config.train.micro_batch_size
    with run.stages("graded pass"):
        for begin in range(0, len(targets), size):
            loss = run.objective.loss(run.nets, targets[begin : begin + size])
            run.engine.backward(loss.total)
            tally.add(loss.tally)
            tally.add_terms({"loss": loss.total, **{f"loss/{name}": value for name, value in loss.terms.items()}})
    with run.stages("optimizer step"):
        rate = learning_rate(run.step, config.schedule, config.optimizer.learning_rate, config.train.steps)
        norm = run.engine.step(rate)
        run.engine.update_ema()
    tally.add({"grad_norm": torch.stack([norm, torch.ones_like(norm)])})
    tally.end_step()


def stop_agreed(run: Run, batch: Batch | None, trouble: Exception | None) -> bool:
    """Exchange words with all ranks; True when the run shall stop here. A rank without a batch ends all of them."""
    plan = schedule_hash(run.objective, run.config.train, run.order.stream(run.step).name)
    bad = len(batch.replaced) if batch else 0
    word = Word(stop=run.stop.requested, data_error=trouble is not None, bad_samples=bad, schedule=plan)
    agreed = run.agreement.agree(run.step, word)
    if trouble is not None:
        raise trouble
    if agreed.data_errors:
        ranks = ", ".join(map(str, agreed.data_errors))
        raise StepRefused(f"rank {ranks} has no batch for step {run.step}; its own message says why")
    if agreed.stop:
        return True
    try:
        run.bad_samples.add(run.step, agreed.bad_samples)
    except TooManyBadSamples as error:
        own = "; ".join(sample.reason for sample in batch.replaced[:8]) if batch else ""
        raise StepRefused(f"{error}. Of this rank in step {run.step}: {own or 'none'}") from error
    return False


def next_batch(batches: Iterator[Batch]) -> tuple[Batch | None, Exception | None]:
    """The next batch, or the error that all ranks must hear of before anyone raises it."""
    try:
        return next(batches), None
    except StopIteration:
        return None, RuntimeError("the loader ended before the last step")
    except Exception as error:  # whatever it is, all ranks agree on it first; stop_agreed raises it then
        return None, error


@dataclass
class Recent:
    """The steps since the last look at the device: which samples they held, and whether an update was skipped."""

    keys: dict[int, tuple[str, ...]] = field(default_factory=dict)
    grad_norm: float = 0.0

    def add(self, batch: Batch) -> None:
        self.keys[batch.step] = batch.keys

    def refuse_non_finite(self) -> None:
        """StepRefused where a gradient was not finite; the engine has skipped that update on all ranks."""
        if self.grad_norm == self.grad_norm and abs(self.grad_norm) != float("inf"):
            return
        first, last = min(self.keys), max(self.keys)
        samples = "; ".join(f"step {step}: {', '.join(keys[:16])}" for step, keys in list(self.keys.items())[-4:])
        raise StepRefused(
            f"a gradient was not finite between steps {first} and {last}; its update was skipped on all ranks. "
            f"Samples of this rank, newest last: {samples}. Look at them or lower optimizer.learning_rate; the same "
            "command resumes from the last checkpoint"
        )


def log(run: Run, tally: Tally, clock: Clock, recent: Recent, bar: Any) -> None:
    """The only place of a step that reads numbers back from the device."""
    metrics = tally.reduce() | clock.interval()
    recent.grad_norm = metrics["grad_norm"]
    steps, counts = len(recent.keys), run.nets.drain()
    run.seconds += metrics["step_seconds"] * steps
    run.passes_per_step = {
        "no_grad": counts.no_grad_passes / steps,
        "graded": counts.graded_passes / steps,
        "rows_no_grad": counts.no_grad_rows / steps,
        "rows_graded": counts.graded_rows / steps,
    }
    rate = learning_rate(run.step - 1, run.config.schedule, run.config.optimizer.learning_rate, run.config.train.steps)
    metrics |= {"learning_rate": rate, "effective_guidance": run.objective.effective_guidance}
    metrics |= {"tflops_per_second": counts.flops / (metrics["step_seconds"] * steps) / 1e12}
    metrics |= {"bad_samples": float(run.bad_samples.in_epoch)}
    metrics |= {"captions_truncated": float(run.encoding.text.truncated)}
    metrics |= {f"seconds/{name}": value / steps for name, value in run.stages.drain().items()}
    metrics |= {f"passes/{name}": value for name, value in run.passes_per_step.items()}
    run.tracker.metrics(run.step, metrics)
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['images_per_second']:.0f} images/s", refresh=False)
    recent.refuse_non_finite()
    recent.keys.clear()


def save(run: Run) -> None:
    """Publish a checkpoint of the steps done so far, unless it exists."""
    with run.stages("save"):
        run.checkpoints.save(run.engine, run.step, run.seconds, run.bad_samples.in_epoch)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def progress(run: Run) -> Any:
    return tqdm(
        total=run.config.train.steps,
        initial=run.step,
        desc=run.config.run.name,
        unit="step",
        disable=run.world.rank != 0,
        dynamic_ncols=True,
        mininterval=1.0,
    )
