"""The brief examination at the start of a submitted run, before its model is loaded."""

from __future__ import annotations

import logging
import os
import time

from configs.schema import Config
from trainer.engines.distributed import World
from trainer.health.checks import BRIEF
from trainer.health.examination import examine
from trainer.health.findings import GREEN, RED
from trainer.observe.tracking import NullTracker, Tracker

log = logging.getLogger(__name__)

SUBMITTED = "TWINFLOW_LOGS"
"""Variable that ranks of a SLURM job find in their environment."""


class PreflightRefused(RuntimeError):
    """Something would spoil this run; the message names it, its node and the remedy."""


def policy(config: Config) -> str:
    """runtime.preflight; where it is not set, warn in a job that was submitted, and off elsewhere."""
    return config.runtime.preflight or ("warn" if SUBMITTED in os.environ else "off")


def preflight(config: Config, world: World, tracker: Tracker | NullTracker) -> None:
    """Examine all nodes as the policy wants it. Collective.

    Raises:
        PreflightRefused: on all ranks, where something is red and the policy is strict.
    """
    wanted = policy(config)
    if wanted == "off":
        return
    began = time.monotonic()
    report = examine(world, config, BRIEF)
    seconds = round(time.monotonic() - began, 1)
    lines = [row.line() for row in report.rows if row.level != GREEN]
    if world.rank == 0:
        tracker.event("preflight", level=report.level, seconds=seconds, findings=lines)
        log.info("preflight of %d ranks on %d nodes: %s (%s s)", world.world_size, report.nodes, report.level, seconds)
        for line in lines:
            log.warning("preflight: %s", line)
    if report.level == RED and wanted == "strict":
        reds = "\n".join(row.line() for row in report.rows if row.level == RED)
        raise PreflightRefused(
            f"{reds}\nMend it, or leave the node out, or go on all the same with runtime.preflight=warn"
        )
