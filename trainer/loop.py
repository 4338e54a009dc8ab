"""The training loop: batch -> encode -> targets -> loss -> backward -> step -> ema -> log -> save -> preempt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.batch import Batch
from trainer.bad_samples import TooManyBadSamples
from trainer.engines.distributed import Word, schedule_hash
from trainer.engines.optim import learning_rate
from trainer.objectives.objective import Targets
from trainer.observe.metrics import Clock, Tally
from trainer.run import Run, make_targets
from trainer.updates import Made, NotFinite, guarded

_log = logging.getLogger(__name__)


class StepRefused(RuntimeError):
    """Training cannot go on; the message names the step, the samples and the remedy."""


class PeerWithoutBatch(StepRefused):
    """Another rank has no batch; its own error is the cause."""


def fit(run: Run) -> bool:
    """Train from run.step to the last step; False when a signal ended it early. The state is saved either way."""
    config, tally, logged = run.config, Tally(run.engine.device), run.step
    batches, clock = iter(run.loader), Clock()  # in this order: to start loader processes is no part of a step
    with progress(run) as bar:
        while run.step < config.train.steps:
            if not advance(run, batches, tally, clock):
                break
            bar.update()
            if due(run.step, config.tracking.every) or run.step == config.train.steps:
                log(run, tally, clock, bar, run.step - logged)
                logged = run.step
            with clock.aside():
                if due(run.step, config.tracking.held_out_every) and run.step < config.train.steps:
                    with run.stages("held out"):
                        run.showcase.held_out(run)
                if due(run.step, config.sample.every) and run.step < config.train.steps:
                    run.showcase.grids(run)
                if due(run.step, config.checkpoint.every) and run.step < config.train.steps:
                    save(run)
        if run.step > logged:
            log(run, tally, clock, bar, run.step - logged)
    if run.profiler is not None:
        run.profiler.close(run.step)
    save(run)
    finish_saving(run)
    return run.step == config.train.steps


def advance(run: Run, batches: Iterator[Batch], tally: Tally, clock: Clock) -> bool:
    """Take one step, unless the ranks agree to stop here."""
    with run.stages("data"), clock.waiting():
        batch, trouble = next_batch(batches)
    with run.stages("agree"):
        stop = stop_agreed(run, batch, trouble)
    if stop or batch is None:
        return False
    if run.profiler is not None:
        run.profiler.begin_step(run.step)
    train_step(run, batch, tally)
    run.step += 1
    clock.step(run.config.train.global_batch_size)
    return True


def train_step(run: Run, batch: Batch, tally: Tally) -> None:
    """One optimizer step on this rank's window of the global batch."""
    config = run.config
    run.nets.begin_step(run.step)
    with run.stages("encode"):
        x, cond, null = run.encoding.encode(batch)
    with run.stages("targets"):
        targets = make_targets(run, batch, x, cond, null, run.step)
        tally.add(targets.tally)
    size, total = config.train.micro_batch_size, torch.zeros((), device=x.device)
    with run.stages("graded pass"):
        for begin in range(0, len(targets), size):
            total = total + graded_pass(run, targets[begin : begin + size], tally)
    with run.stages("optimizer step"):
        rate = learning_rate(run.step, config.schedule, config.optimizer.learning_rate, config.train.steps)
        norm = run.engine.step(rate)
        run.engine.update_ema()
    finite = norm.isfinite()
    tally.add({"grad_norm": torch.stack([norm.where(finite, 0), finite.to(norm.dtype)])})
    tally.end_step()
    run.updates.add(Made(run.step, batch.keys, total, norm))
    if run.sample_log is not None:
        run.sample_log.add(batch)


def graded_pass(run: Run, targets: Targets, tally: Tally) -> Tensor:
    """Forward and backward of one micro-batch; its loss. The graph is gone before the next one grows: kept longer it
    makes the allocator give memory back to the system, and take it anew, in every step."""
    loss = run.objective.loss(run.nets, targets)
    run.engine.backward(guarded(loss.total))
    total = loss.total.detach()
    tally.add(loss.tally)
    tally.add_terms({"loss": total, **{f"loss/{name}": value for name, value in loss.terms.items()}})
    return total


def stop_agreed(run: Run, batch: Batch | None, trouble: Exception | None) -> bool:
    """Exchange words with all ranks; True when the run shall stop here. A rank without a batch ends all of them."""
    plan = schedule_hash(run.objective, run.config.train, run.order.stream(run.step).name)
    bad = len(batch.replaced) if batch else 0
    word = Word(
        stop=run.stop.requested,
        data_error=trouble is not None,
        bad_samples=bad,
        schedule=plan,
        calls=run.nets.step_calls,
    )
    agreed = run.agreement.agree(run.step, word)
    if trouble is not None:
        raise trouble
    if agreed.data_errors:
        ranks = ", ".join(map(str, agreed.data_errors))
        raise PeerWithoutBatch(f"rank {ranks} has no batch for step {run.step}; its own message says why")
    if agreed.stop:
        return True
    try:
        run.bad_samples.add(run.step, agreed.bad_samples, batch.replaced if batch else ())
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


def log(run: Run, tally: Tally, clock: Clock, bar: Any, steps: int) -> None:
    """What the last `steps` steps came to: the only place of a step that reads numbers back from the device."""
    metrics, counts = tally.reduce() | clock.interval(), run.nets.drain()
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
    metrics |= {"captions_truncated": float(run.encoding.truncated)}
    metrics |= {f"seconds/{name}": value / steps for name, value in run.stages.drain().items()}
    metrics |= {f"passes/{name}": value for name, value in run.passes_per_step.items()}
    try:
        judge_updates(run)
    finally:  # the numbers of the interval that ends the run are worth most
        run.tracker.metrics(run.step, metrics | {"skipped_steps": float(run.updates.skipped)})
    bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['images_per_second']:.0f} images/s", refresh=False)
    if run.profiler is not None:
        run.profiler.look(run.step)


def judge_updates(run: Run) -> None:
    """Say which updates were left out since the last look; StepRefused where the policy does not bear them."""
    try:
        left_out = run.updates.judge(run.config.train.non_finite, run.config.train.max_skips)
    except NotFinite as error:
        raise StepRefused(str(error)) from error
    for line in left_out:
        run.tracker.event("update left out", message=line)
        if run.world.rank == 0:
            _log.warning("the update was left out on all ranks: %s", line)


def save(run: Run) -> None:
    """Begin a checkpoint of the steps done so far, unless it exists; it is written while training goes on."""
    judge_updates(run)  # a checkpoint must not hold steps that the policy refuses
    with run.stages("save"):
        counters = run.showcase.counters()
        run.checkpoints.save(run.engine, run.step, run.seconds, run.bad_samples.in_epoch, **counters)
    journal_saves(run)


def finish_saving(run: Run) -> None:
    """Wait until the last checkpoint is published. Raises CheckpointError on all ranks where that failed."""
    try:
        with run.stages("save"):
            run.checkpoints.finish()
    finally:
        journal_saves(run)


def journal_saves(run: Run) -> None:
    for saved in run.checkpoints.outcomes():
        run.tracker.event("checkpoint", **asdict(saved))


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
