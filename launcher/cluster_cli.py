"""The verbs submit, status and stop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs import load
from configs.clusters import load_cluster
from configs.folders import ForeignFolder, run_folder, unused
from launcher import status as run_status
from launcher import submit as submission
from launcher.local import LaunchError
from launcher.report import consoles
from launcher.scheduler import SchedulerError
from launcher.settings import Settings, fail, load_config, split
from launcher.slurm import script

ROOT = Path(__file__).resolve().parent.parent
console, errors = consoles()
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, outputs/<name> by default.")]


def submit(
    settings: Settings,
    cluster: Annotated[
        list[Path], typer.Option("--cluster", help="YAML of the cluster, see configs/cluster/; several are merged.")
    ] = [],  # noqa: B006 (typer wants a literal)
    change: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the cluster file.")
    ] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; write and submit nothing.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start in a new folder <name>-2 beside an existing run.")
    ] = False,
    allow_change: Annotated[
        list[str], typer.Option("--allow-change", metavar="KEY", help="Go on although this defining key has changed.")
    ] = [],  # noqa: B006
) -> None:
    """Submit a run to SLURM; it saves before the time limit and on pre-emption, and requeues itself until it is done.

    The same command resumes a run whose chain of jobs has stopped.
    """
    config = load_config(settings)
    files, overrides = split(settings)
    folder = unused(run_folder(config)) if fresh else run_folder(config)
    try:
        place = load_cluster(cluster, change)
        request = submission.Request(config, files, overrides, allow_change, folder, place)
        job = submission.plan(request, ROOT)
        if dry_run:
            print(script(job), end="")
            return
        warning = submission.refuse_impossible(request)
        number = submission.submit(submission.write(job, files, ROOT))
    except (load.ConfigError, ForeignFolder, LaunchError, SchedulerError, OSError) as error:
        fail("cannot submit", str(error))
    if warning:
        errors.print(f"warning: {warning}", soft_wrap=True)
    console.print(f"job {number} submitted: {place.nodes} nodes of {job.nproc} ranks, {place.time} each time")
    console.print(f"watch it:  twinflow status {folder}", soft_wrap=True)
    console.print(f"its log:   {job.run}/logs/job_{number}.log", soft_wrap=True)
    console.print(f"stop it:   twinflow stop {folder}", soft_wrap=True)


def status(
    run: RunFolder, lines: Annotated[int, typer.Option("--lines", "-n", help="Lines of the newest output.")] = 5
) -> None:
    """Say where a run stands: step, checkpoint, jobs, queue, and the last words of its ranks."""
    try:
        for line in run_status.describe(run, lines):
            console.print(line, soft_wrap=True)
    except (LaunchError, OSError) as error:
        fail("no status", str(error))


def stop(run: RunFolder) -> None:
    """Ask a run, here or under SLURM, to finish its step, save and end."""
    try:
        console.print(run_status.stop(run), soft_wrap=True)
    except (LaunchError, SchedulerError, OSError) as error:
        fail("cannot stop", str(error))
