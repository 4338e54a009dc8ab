"""What the watchdog sees of a run, and what the run's folder says when it has hung."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.watching.watchdog import Patience, Sight, Watchdog
from trainer.watching.whereabouts import Board, Position

if TYPE_CHECKING:
    from trainer.run import Run

_FLIGHT_RECORDS = 2000
_log = logging.getLogger(__name__)


def record_flights(folder: Path) -> None:
    """Let NCCL keep its last collectives and write them to `folder` where one times out. Before the process group is
    made; what the environment says already stays. Without NCCL it means nothing."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(_FLIGHT_RECORDS))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_trace_rank_"))


def watch(run: Run, results: Callable[[], dict[str, object]]) -> Watchdog:
    """The watchdog of this rank; as a context manager it watches. results: for status.json."""
    board = Board(run.world.rank, run.world.world_size)

    def see() -> Sight:
        stage, nets = run.stages.now, run.nets
        position = Position(run.world.rank, run.step, stage, nets.called_step, *nets.step_calls, idle_s=0.0)
        return Sight(position, (run.step, run.stages.entries, nets.calls), new=stage not in run.stages.longest)

    def ended(message: str) -> None:
        if run.world.rank != 0:
            return
        try:
            run.folder.write_status("failed", run.step, message, vain=False)
            run.folder.write_status("failed", run.step, message, vain=False, **results())
        except OSError as error:
            _log.warning("status.json could not be written: %s", error)
        run.tracker.finish("FAILED", timeout_s=5.0)

    return Watchdog(board, Patience.of(run.config.runtime), see, ended, traces=run.folder.path / "logs")
