"""Submit a run to SLURM: configuration and code copied into its folder, the script written, the job queued."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.clusters import Cluster
from configs.folders import refuse_foreign
from configs.schema import Config
from launcher import scheduler
from launcher.chain import FOLDER, STOP, Chain
from launcher.job import threads
from launcher.local import LaunchError
from launcher.records import grace_too_short, grace_warning, set_status
from launcher.slurm import FILE, Submission, script
from launcher.snapshot import snapshot

SCRIPT = "job.sbatch"


@dataclass(frozen=True)
class Request:
    """What a person asked for: the configuration with its files and overrides, the run's folder, the cluster."""

    config: Config
    files: Sequence[str]
    overrides: Sequence[str]
    allow_change: Sequence[str]
    folder: Path
    cluster: Cluster


def plan(request: Request, root: Path) -> Submission:
    """The submission that the request means; writes nothing."""
    config, cluster, run = request.config, request.cluster, request.folder.absolute()
    folder = run / FOLDER / f"{len(list((run / FOLDER).glob('[0-9]*'))) + 1:03d}"
    nproc = cluster.gpus_per_node or config.runtime.nproc or 1
    cores = cluster.cpus_per_node or nproc
    files = [part for number in range(len(request.files)) for part in ("--config", str(folder / _copy(number)))]
    changes = [part for key in request.allow_change for part in ("--allow-change", key)]
    return Submission(
        name=config.run.name,
        run=run,
        folder=folder,
        code=root,
        directory=Path.cwd(),
        python=sys.executable,
        arguments=(*files, *changes, *request.overrides, f"run.dir={json.dumps(str(run))}"),
        nproc=nproc,
        threads=threads(config.runtime.threads, cores, nproc),
        steps=config.train.steps,
        cluster=cluster,
    )


def refuse_impossible(request: Request, own_job: str = "") -> str:
    """Check the run's folder before anything is written; a warning, or an empty text. own_job: the allocation that this
    process stands in, which may have trained this run before.

    Raises:
        LaunchError: a job of this run is queued or running, or the grace is shorter than a save. ForeignFolder.
        SchedulerError: SLURM does not answer.
    """
    refuse_foreign(request.folder)
    chain = Chain.read(request.folder)
    if chain is not None and chain.job not in ("", own_job) and scheduler.alive(found := scheduler.job(chain.job)):
        state = found.state.lower() if found else ""
        raise LaunchError(
            f"job {chain.job} of this run is {state} already; `twinflow stop {request.folder}` saves and ends it"
        )
    warning = grace_warning(request.folder, request.cluster)
    if grace_too_short(request.folder, request.cluster):
        raise LaunchError(warning)
    return warning


def write(job: Submission, files: Sequence[str], root: Path) -> Submission:
    """Fill the submission's folder: copies of configuration and code, the script. The copies are the user's files, not
    the resolved one, in which secrets are redacted; so nobody else may read them."""
    job.folder.mkdir(parents=True)
    job.folder.chmod(0o700)
    (job.run / "logs").mkdir(exist_ok=True)
    for number, file in enumerate(files):
        shutil.copyfile(file, job.folder / _copy(number))
    code, revision = snapshot(root, job.run / FOLDER / "code")
    job = Submission(**{**job.__dict__, "code": code, "revision": revision})
    (job.folder / FILE).write_text(job.to_json())
    (job.folder / SCRIPT).write_text(script(job))
    return job


def submit(job: Submission) -> str:
    """Queue a written submission; the job's id.

    Raises:
        SchedulerError: SLURM refuses it.
    """
    chain = Chain.read(job.run) or Chain(job.run / FOLDER)
    number = scheduler.submit(str(job.folder / SCRIPT))
    (job.run / FOLDER / STOP).unlink(missing_ok=True)
    started = Chain.read(job.run)  # a job on an idle cluster may have begun before this line
    if started is None or started.submission != job.folder.name:
        chain.submission, chain.job, chain.state, chain.reason = job.folder.name, number, "queued", ""
        chain.write()
        set_status(job.run, "stopped", f"submitted as job {number}")
    return number


def _copy(number: int) -> str:
    return f"config_{number}.yaml"
