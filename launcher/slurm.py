"""A submission as pure functions: what is to run -> the text of its sbatch script and the command of a node."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.clusters import Cluster, Container

FILE = "submission.json"
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}


@dataclass(frozen=True)
class Submission:
    """One `twinflow submit`, kept in its folder. name: of the job; run: the run's folder; folder: of this submission,
    below it; code: the copy of the code that runs; directory: where relative paths of the configuration begin; python:
    the interpreter that submits; arguments: of trainer.train; nproc, threads: ranks of a node and their CPU threads;
    steps: of the whole run; revision: of the code; module: what every rank runs."""

    name: str
    run: Path
    folder: Path
    code: Path
    directory: Path
    python: str
    arguments: tuple[str, ...]
    nproc: int
    threads: int
    steps: int
    cluster: Cluster
    revision: str = "none"
    module: str = "trainer.train"

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str, indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Submission:
        values = json.loads((folder / FILE).read_text())
        values |= {key: Path(values[key]) for key in ("run", "folder", "code", "directory")}
        values["arguments"] = tuple(values["arguments"])
        container = Container(**values["cluster"].pop("container"))
        values["cluster"] = Cluster(**values["cluster"], container=container)
        return cls(**values)


def script(job: Submission) -> str:
    """The batch script. Its last line turns the batch shell into launcher.batch, which hears the signals and decides
    whether the job is requeued; everything after `--` starts one launcher.node per node."""
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in _directives(job)), "set -euo pipefail"]
    # Node-local and of this user: another's folder could not be written to.
    lines.append(f'caches={shlex.quote(f"{job.cluster.scratch}/twinflow-compile")}-"$(id -u)"')
    lines += [f'export {name}="$caches/{folder}"' for name, folder in CACHES.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment(job).items()]
    driver = [job.python, "-m", "launcher.batch", str(job.folder), "--"]
    lines.append(" \\\n    ".join(["exec " + shlex.join(driver), *map(shlex.join, step(job))]))
    return "\n".join(lines) + "\n"


def _directives(job: Submission) -> list[str]:
    cluster = job.cluster
    named = {
        "job-name": job.name,
        "nodes": str(cluster.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cluster.cpus_per_node) if cluster.cpus_per_node else None,
        "gpus-per-node": str(cluster.gpus_per_node) if cluster.gpus_per_node else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "exclude": ",".join(cluster.exclude) or None,
        "signal": f"B:USR1@{cluster.grace_s}",
        "chdir": str(job.directory),
        "output": f"{_percent(job.run)}/logs/job_%j.log",
        "open-mode": "append",
    }
    options = [f"--{name}={_directive(value)}" for name, value in named.items() if value is not None]
    flags = ["--requeue", *(["--exclusive"] if cluster.exclusive else [])]
    return [*options, *flags, *map(_directive, cluster.directives)]


def _percent(path: Path) -> str:
    """sbatch replaces %j and the like in file names; %% is a percent sign."""
    return str(path).replace("%", "%%")


def _directive(value: str) -> str:
    """sbatch splits directives at blanks and honours double quotes only."""
    return f'"{value}"' if any(character.isspace() for character in value) else value


def environment(job: Submission) -> dict[str, str]:
    """Of the ranks. PYTHONSAFEPATH keeps a checkout in the current folder from coming before the copied code."""
    return {
        "PYTHONPATH": str(job.code),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TWINFLOW_REVISION": job.revision,
        **job.cluster.environment,
    }


def step(job: Submission) -> list[list[str]]:
    """One task per node; the arguments as lines. A node that fails does not kill the others (kill-on-bad-exit):
    launcher.batch gives them time to say what they know."""
    nodes = job.cluster.nodes
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"]
    if job.cluster.cpus_per_node:  # srun does not inherit it from sbatch
        srun.append(f"--cpus-per-task={job.cluster.cpus_per_node}")
    *around, python = _contained(job)
    return [
        srun,
        *([option] for option in job.cluster.srun),
        *around,
        [*python, "-m", "launcher.node", str(job.folder)],
    ]


def _contained(job: Submission) -> list[list[str]]:
    """What puts the ranks into the container, as lines; the last begins the command inside."""
    container = job.cluster.container
    mounts = [*dict.fromkeys(f"{path}:{path}" for path in (job.run, job.directory)), *container.mounts]
    if container.kind == "pyxis":
        return [
            [f"--container-image={container.image}"],
            [f"--container-mounts={','.join(mounts)}"],
            [f"--container-workdir={job.directory}"],
            [container.python],
        ]
    if container.kind == "apptainer":
        gpus = ["--nv"] if job.cluster.gpus_per_node else []
        binds = [["--bind", mount] for mount in mounts]
        return [
            ["apptainer", "exec", *gpus],
            *binds,
            ["--pwd", str(job.directory), container.image],
            [container.python],
        ]
    return [[job.python]]
