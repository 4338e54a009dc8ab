"""`twinflow doctor`: the ranks that look at this machine, or at all nodes of an allocation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from configs.schema import Config
from launcher import allocation, examine, local, scheduler
from launcher.job import Job, environment, processes, threads, torchrun_here
from launcher.settings import fail, load_config, split

ROOT = Path(__file__).resolve().parent.parent
MODULE = "trainer.doctor"

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG]... [KEY=VALUE]...", help="Look at what this run needs, too.", show_default=False),
]


def doctor(
    settings: Settings = None,
    quick: Annotated[bool, typer.Option("--quick", help="What a submitted job checks at its start.")] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Ranks of a node; default as `train`.", show_default=False)
    ] = None,
) -> None:
    """Say whether this machine, or this SLURM allocation, is fit to train: green, yellow or red with the remedy.

    Versions, GPUs, all-reduce between all ranks, clocks, disks, data, MLflow, attention. Ends non-zero on red.
    """
    given = settings or []
    config = load_config(given) if given else None
    files, overrides = split(given)
    if overrides and not files:
        fail("cannot start", "key=value belongs to a configuration; name its files, too")
    arguments = [part for file in files for part in ("--config", str(Path(file).absolute()))]
    arguments += [*(["--quick"] if quick else []), *overrides]
    ranks = nproc or _ranks(config)
    if allocation.held(os.environ):
        command = _on_all_nodes(ranks, arguments)
    else:
        command = [sys.executable, "-m", *torchrun_here(ranks, MODULE), *arguments]
    cores = threads(None, len(os.sched_getaffinity(0)), ranks)
    job = Job(MODULE, tuple(arguments), ranks, cores, log_dir=Path(os.devnull), root=ROOT)
    raise typer.Exit(subprocess.run(command, env=environment(job, os.environ), check=False).returncode)


def _ranks(config: Config | None) -> int:
    return processes(config.runtime.nproc if config is not None else None, local.count_gpus())


def _on_all_nodes(nproc: int, arguments: list[str]) -> list[str]:
    """srun with one launcher.examine per node of the allocation."""
    try:
        first = scheduler.hostnames(os.environ["SLURM_JOB_NODELIST"])[0]
        head = scheduler.node_address(first)
    except scheduler.SchedulerError as error:
        fail("cannot start", str(error))
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    around = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    return [*around, sys.executable, "-m", "launcher.examine", *examine.arguments(head, nproc, MODULE), *arguments]
