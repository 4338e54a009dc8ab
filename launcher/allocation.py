"""`twinflow train` typed in an allocation of several nodes (salloc): the same step as a submitted job, never requeued."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from configs.clusters import Cluster
from configs.folders import ForeignFolder
from configs.schema import Config
from launcher import submit
from launcher.batch import Batch
from launcher.chain import FOLDER, STOP
from launcher.local import LaunchError, count_gpus
from launcher.scheduler import SchedulerError
from launcher.settings import fail
from launcher.slurm import environment, step
from launcher.submit import Request


def held(variables: Mapping[str, str]) -> bool:
    """Whether this process stands in an allocation of several nodes, and is not one of several tasks of a step."""
    nodes = int(variables.get("SLURM_JOB_NUM_NODES", "1"))
    return nodes > 1 and int(variables.get("SLURM_STEP_NUM_TASKS", "1")) == 1


def train(
    config: Config,
    files: Sequence[str],
    overrides: Sequence[str],
    allow_change: Sequence[str],
    folder: Path,
    root: Path,
) -> int:
    """Train on all nodes of the allocation; the exit status. Ctrl-C saves and stops."""
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    cluster = Cluster(nodes=nodes, gpus_per_node=0 if config.runtime.nproc else count_gpus())
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", "0"))
    request = Request(config, files, overrides, allow_change, folder, replace(cluster, cpus_per_node=cores or None))
    try:
        submit.refuse_impossible(request, os.environ["SLURM_JOB_ID"])
        job = submit.write(submit.plan(request, root), files, root)
        (job.run / FOLDER / STOP).unlink(missing_ok=True)
        os.environ.update(environment(job))
        command = [part for line in step(job) for part in line]
        return Batch(job, command, requeues=False).run()
    except (ForeignFolder, LaunchError, SchedulerError, OSError) as error:
        fail("cannot start", str(error))
