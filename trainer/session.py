"""One process's part of a run: open the folder, build, train, conclude; say clearly what failed."""

from __future__ import annotations

import faulthandler
import functools
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs import load as configuration
from configs.folders import ForeignFolder
from configs.folders import run_folder as configured_folder
from configs.schema import Config
from data.s3 import DataError
from models import weights
from trainer import run_folder
from trainer.build import build_objective, build_order, build_run
from trainer.engines.distributed import World, process_group
from trainer.ledger import REPLACEMENTS
from trainer.loop import PeerWithoutBatch, StepRefused, fit
from trainer.model_folder import with_local_model
from trainer.observe.tracking import NullTracker, Tracker, open_tracker
from trainer.preflight import PreflightRefused, preflight
from trainer.run import Run
from trainer.run_folder import RunFolder, RunRefused
from trainer.saving.checkpoint import CheckpointError
from trainer.signals import StopRequest
from trainer.stages import OutOfMemory
from trainer.training_data import read_data
from trainer.watching import hang
from trainer.watching.heartbeat import Heartbeat

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
# What a person can mend: one message, no traceback.
EXPLAINED = (
    DataError,
    RunRefused,
    PreflightRefused,
    StepRefused,
    OutOfMemory,
    CheckpointError,
    weights.CheckpointError,
)


def main(
    files: Sequence[str], overrides: Sequence[str], stop: StopRequest, fresh: bool, allow_change: list[str]
) -> int:
    """Load the configuration, join the other ranks, train; the exit status."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        config = configuration.load(files, overrides)
    except configuration.ConfigError as error:
        if first:
            print(error, file=sys.stderr, flush=True)
        return 2
    set_numerics(config)
    faulthandler.enable()
    hang.record_flights(configured_folder(config) / "logs")
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    with process_group(config.runtime.collective_timeout_s) as world:
        code = train(config, world, stop, fresh=fresh, allow_change=allow_change)
        if code:
            # Peers may be gone: leaving the process group in order would wait for them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code


def train(config: Config, world: World, stop: StopRequest, *, fresh: bool, allow_change: list[str]) -> int:
    """One process's part of a run; 0 when the run is finished or saved on request, 1 on an explained failure."""
    folder, run, tracker = None, None, None
    try:
        objective = build_objective(config)
        manifest = read_data(config)
        order = build_order(config, manifest)
        folder = agree_on_folder(config, world, order.identity(), fresh, allow_change)
        if folder.finished:
            if world.rank == 0:
                print(f"{folder.path} is finished already ({config.train.steps} steps); start another with --fresh")
            return 0
        tracker = open_tracker(
            folder.path, config.tracking.uri, config.tracking.experiment, config.run.name, world.rank
        )
        tracker.params({**configuration.to_dict(config), "world_size": world.world_size})
        for key, earlier, now in folder.changes:
            tracker.event("change", key=key, earlier=earlier, now=now)
            log.info("%s was %s and is %s from here on", key, earlier, now)
        config = with_local_model(config)
        preflight(config, world, tracker)
        run = build_run(config, world, folder, manifest, order, objective, stop, tracker)
        if world.rank == 0:
            folder.write_status("running", run.step, "training", **results(run))
            run.stages.entered = Heartbeat(run)
        with hang.watch(run, functools.partial(results, run)):
            conclude(run, fit(run))
        return 0
    except Exception as error:
        fail(error, world, folder, run, tracker)
        return 1


def agree_on_folder(
    config: Config, world: World, data_order: dict[str, Any], fresh: bool, allow: list[str]
) -> RunFolder:
    """Rank 0 opens the folder; all ranks hear the outcome, a refusal too."""
    outcome: list[Any] = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = run_folder.open_run(config, data_order, world.world_size, fresh, allow)
        except (DataError, CheckpointError) as error:  # of checkpoint.dir; another start may do
            outcome[1] = error
        except (RunRefused, ForeignFolder, OSError) as error:
            outcome[1] = RunRefused(str(error))
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    folder: RunFolder = outcome[0]
    return folder


def conclude(run: Run, complete: bool) -> None:
    """Pictures, scores and summary of a finished run; for a stopped one the word how to go on."""
    if complete:
        with run.stages("held out"):
            held_out = run.showcase.held_out(run)
        run.showcase.grids(run)
        scores = run.showcase.evaluate(run)
        if run.world.rank == 0:
            run_folder.write_json(run.folder.path / "summary.json", summarize(run, held_out, scores))
            run.tracker.artifact(run.folder.path / "summary.json")
            if (run.folder.path / REPLACEMENTS).exists():
                run.tracker.artifact(run.folder.path / REPLACEMENTS)
        state, message = "finished", f"all {run.step} steps are done"
    else:
        state, message = "stopped", f"stopped on request, saved at step {run.step}; the same command goes on from there"
    run.tracker.finish("FINISHED" if complete else "KILLED", timeout_s=60.0 if complete else 10.0)
    if run.world.rank == 0:
        run.folder.write_status(state, run.step, message, **results(run))


def summarize(run: Run, held_out: dict[str, float], scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "name": run.config.run.name,
        "objective": run.config.objective["name"],
        "engine": run.config.engine["name"],
        "world_size": run.world.world_size,
        "steps": run.step,
        "accumulation": run.accumulation,
        "training_seconds": round(run.seconds, 1),
        "images_per_second": round(run.step * run.config.train.global_batch_size / max(run.seconds, 1e-9), 1),
        "passes_per_step": run.passes_per_step,
        "evaluated_weights": run.config.sample.weights,
        "held_out": held_out,
        **scores,
    }


def results(run: Run) -> dict[str, Any]:
    """Where a person finds what the run has made so far."""
    checkpoint = run.checkpoints.latest_path()
    return {
        "checkpoint": str(checkpoint) if checkpoint else None,
        "pictures": run.showcase.pictures,
        "mlflow": run.tracker.info(),
        "save_seconds": round(max(run.stages.longest["save"], run.checkpoints.longest_s), 1),
    }


def fail(
    error: Exception, world: World, folder: RunFolder | None, run: Run | None, tracker: Tracker | NullTracker | None
) -> None:
    """Say what happened once and clearly; the run's status and tracker say so too."""
    text = str(error) if explained(error) else "".join(traceback.format_exception(error))
    print(f"\nrank {world.rank} failed{f' at step {run.step}' if run else ''}: {text}", file=sys.stderr, flush=True)
    if run is not None:
        run.checkpoints.abandon(timeout_s=10.0)  # the state of an earlier step that is being written is worth keeping
    if tracker is not None:
        tracker.finish("FAILED", timeout_s=5.0)
    if folder is not None and world.rank == 0:
        step, where = (run.step, results(run)) if run else (0, {})
        folder.write_status("failed", step, str(error), vain=vain(error), **where)


def explained(error: Exception) -> bool:
    """Whether the message alone tells a person what to do: our own errors, and ValueErrors that our own code raised."""
    if isinstance(error, EXPLAINED):
        return True
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = raised_in.is_relative_to(ROOT) and "site-packages" not in raised_in.parts
    return isinstance(error, ValueError | FileNotFoundError) and ours


def vain(error: Exception) -> bool:
    """Whether the same start would fail again: a mistake that a person has to mend, no trouble of the surroundings."""
    if isinstance(error, DataError | CheckpointError | PeerWithoutBatch | PreflightRefused):
        return False
    return explained(error)


def set_numerics(config: Config) -> None:
    runtime = config.runtime
    torch.set_float32_matmul_precision(runtime.matmul_precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = runtime.tf32
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
