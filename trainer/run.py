"""A run as an object: all its parts, and the targets of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from configs.schema import Config
from data.batch import Batch
from data.loader import Loader
from data.order import Order
from trainer.bad_samples import BadSamples
from trainer.encoding import Encoding
from trainer.engines.distributed import Agreement, World
from trainer.engines.engine import Engine
from trainer.ledger import SampleLog
from trainer.objectives.objective import Objective, Rows, Targets
from trainer.objectives.roles import assign
from trainer.observe.counting import CountedNets
from trainer.observe.profiler import Profiler
from trainer.observe.tracking import NullTracker, Tracker
from trainer.run_folder import RunFolder
from trainer.saving.checkpoint import Checkpoints
from trainer.signals import StopRequest
from trainer.stages import Stages
from trainer.updates import Updates

if TYPE_CHECKING:
    from trainer.generate.showcase import Showcase


@dataclass
class Run:
    """Everything a run consists of; trainer/build.py makes it. step: optimizer steps done; seconds: spent on them."""

    config: Config
    world: World
    folder: RunFolder
    objective: Objective
    engine: Engine
    nets: CountedNets
    encoding: Encoding
    order: Order
    loader: Loader
    agreement: Agreement
    checkpoints: Checkpoints
    tracker: Tracker | NullTracker
    showcase: Showcase
    stop: StopRequest
    accumulation: int
    bad_samples: BadSamples
    sample_log: SampleLog | None = None
    profiler: Profiler | None = None
    step: int = 0
    seconds: float = 0.0
    stages: Stages = field(default_factory=Stages)
    updates: Updates = field(default_factory=Updates)
    passes_per_step: dict[str, float] = field(default_factory=dict)


def make_targets(run: Run, batch: Batch, x: Tensor, cond: Any, null: Any, draw_step: int) -> Targets:
    """Draws and no-grad passes of one window; draw_step keys the random numbers and the roles."""
    rank, world_size = run.world.rank, run.world.world_size
    roles = assign(
        run.objective.role_weights,
        draw_step,
        len(batch) * world_size,
        rank,
        world_size,
        published=run.objective.published_partition,
    )
    rows = Rows(run.config.run.seed, draw_step, batch.rows, roles)
    draws = run.objective.draw(rows, tuple(x.shape[1:]), x.device, x.dtype)
    return run.objective.targets(run.nets, x, cond, null, roles, draws, run.config.train.chunk_rows)
