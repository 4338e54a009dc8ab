"""The command line. Nothing here imports torch: verbs that need it start `python -m ...`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from configs import load
from configs.folders import ForeignFolder, refuse_foreign, run_folder, unused
from configs.schema import Config
from launcher import allocation, cluster_cli, doctor_cli, local
from launcher.job import Job, processes, threads, torchrun_here
from launcher.report import consoles, report
from launcher.settings import Settings, fail, load_config, split

ROOT = Path(__file__).resolve().parent.parent
HELP = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": "markdown"}
FORWARDED = {"ignore_unknown_options": True, "help_option_names": []}
"""Of verbs whose module explains its own options, --help included."""
app = typer.Typer(help="Train one- and two-step image generators with TwinFlow.", **HELP)  # type: ignore[arg-type]
config_app = typer.Typer(help="Check, show and compare configurations; starts nothing.", **HELP)  # type: ignore[arg-type]
data_app = typer.Typer(help="Make data sets.", **HELP)  # type: ignore[arg-type]
model_app = typer.Typer(help="Make models.", **HELP)  # type: ignore[arg-type]
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
checkpoint_app = typer.Typer(help="List, compare and verify checkpoints.", **HELP)  # type: ignore[arg-type]
app.add_typer(checkpoint_app, name="checkpoint")
console, _ = consoles()

app.command()(cluster_cli.submit)
app.command()(cluster_cli.status)
app.command()(cluster_cli.stop)
app.command()(doctor_cli.doctor)


@app.command()
def train(
    settings: Settings,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start in a new folder <name>-2 beside an existing run.")
    ] = False,
    allow_change: Annotated[
        list[str], typer.Option("--allow-change", metavar="KEY", help="Go on although this defining key has changed.")
    ] = [],  # noqa: B006 (typer wants a literal)
) -> None:
    """Train on this machine: one rank per GPU, or runtime.nproc ranks on the CPU; on all nodes of a SLURM allocation.

    The same command resumes. Ctrl-C saves and stops; twice ends at once.
    """
    config = load_config(settings)
    folder = unused(run_folder(config)) if fresh else run_folder(config)
    if allocation.held(os.environ):
        raise typer.Exit(allocation.train(config, *split(settings), allow_change, folder, ROOT))
    try:
        refuse_foreign(folder)
        logs = folder / "logs" / time.strftime("%Y%m%d-%H%M%S")
        logs.mkdir(parents=True, exist_ok=True)
        load.save(config, logs / "config.yaml")
        with local.sole_owner(folder) as lock:
            job = training_job(config, settings, allow_change, folder, logs)
            stamp = local.status_stamp(folder)
            outcome = local.Runner(job, lock).run()
    except (ForeignFolder, local.LaunchError, OSError) as error:
        fail("cannot start", str(error))
    raise typer.Exit(report(outcome, job, folder, resume_command(config, settings, folder), stamp))


def training_job(config: Config, settings: list[str], allow_change: list[str], folder: Path, logs: Path) -> Job:
    """Ranks that load the same files and overrides. They do not get the resolved file: secrets are redacted in it."""
    files, overrides = split(settings)
    arguments = [part for file in files for part in ("--config", file)]
    arguments += [part for key in allow_change for part in ("--allow-change", key)]
    wanted = config.runtime
    nproc = wanted.nproc or processes(None, local.count_gpus())
    return Job(
        module="trainer.train",
        arguments=(*arguments, *overrides, f"run.dir={json.dumps(str(folder))}"),
        nproc=nproc,
        threads=threads(wanted.threads, len(os.sched_getaffinity(0)), nproc),
        log_dir=logs,
        root=ROOT,
        port=wanted.port or 0,
        stop_timeout_s=wanted.stop_timeout_s,
    )


def resume_command(config: Config, settings: list[str], folder: Path) -> str:
    """The command that goes on with this very folder, also where --fresh chose it."""
    here = [] if folder == run_folder(config) else [f"run.dir={folder}"]
    return shlex.join(["twinflow", "train", *settings, *here])


@config_app.command()
def check(settings: Settings) -> None:
    """Say whether a configuration is complete and consistent."""
    config = load_config(settings)
    train = config.train
    console.print(
        f"ok: run {config.run.name}, {config.objective['name']} on {config.model['name']} with {config.engine['name']}, "
        f"{train.steps} steps of {train.global_batch_size} samples"
    )


@config_app.command()
def show(
    settings: Settings, yaml: Annotated[bool, typer.Option("--yaml", help="Print the resolved YAML alone.")] = False
) -> None:
    """List every knob: value, default, type, unit and meaning."""
    config = load_config(settings)
    if yaml:
        print(load.to_yaml(config), end="")
        return
    table = Table(
        "key", "value", "default", "type", "unit", "meaning", title="values that differ from the default in bold"
    )
    values = load.to_dict(config)
    for section, section_knobs in load.all_knobs(config).items():
        for knob in section_knobs:
            value = values[section][knob.name]
            default = load.json_value(knob.default) if knob.has_default else "required"
            style = "bold" if value != default else ""
            row = (f"{section}.{knob.name}", str(value), str(default), knob.annotation, knob.unit, knob.doc)
            table.add_row(*row, style=style)
    console.print(table)


@config_app.command()
def diff(first: Path, second: Path) -> None:
    """Compare two configurations key by key; defining keys are marked."""
    a, b = load_config([str(first)]), load_config([str(second)])
    table = Table("key", str(first), str(second), "changes")
    defining = load.identity(a).keys() | load.identity(b).keys()
    for key, old, new in load.difference(load.to_dict(a), load.to_dict(b)):
        table.add_row(key, str(old), str(new), "the experiment" if key in defining else "circumstances")
    console.print(table if table.row_count else "no difference")


@app.command()
def parity(
    settings: Settings,
    quick: Annotated[bool, typer.Option("--quick", help="Two ranks and a part of the combinations.")] = False,
) -> None:
    """Check on the CPU that sharded steps of this configuration, at tiny size, are those of one plain process.

    Losses and all gradients under every engine, number of ranks, accumulation, activation checkpointing and packing.
    """
    load_config(settings)
    files, overrides = split(settings)
    chosen = [part for file in files for part in ("--config", file)]
    _module("trainer.parity", *chosen, *(["--quick"] if quick else []), *overrides)


@data_app.command("demo", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def data_demo(context: typer.Context, dest: str) -> None:
    """Write scikit-learn's handwritten digits as WebDataset shards (options: python -m data.demo --help)."""
    _module("data.demo", dest, *context.args)


@data_app.command("pack", context_settings={"ignore_unknown_options": True})
def data_pack(
    arguments: Annotated[list[str], typer.Argument(metavar="SOURCE DEST [OPTION]...", show_default=False)],
) -> None:
    """Write WebDataset shards of a folder of images, a table or tars (options: python -m data.pack --help).

    With --precompute CONFIG they hold latents and embeddings instead, made by one rank per GPU, or --nproc N ranks
    (options: python -m trainer.precompute --help).
    """
    if not any(argument.split("=")[0] == "--precompute" for argument in arguments):
        _module("data.pack", *arguments)
    nproc, rest = _nproc(arguments)
    _module(*torchrun_here(nproc, "trainer.precompute"), *rest)


@data_app.command("index", context_settings={"ignore_unknown_options": True})
def data_index(arguments: Annotated[list[str], typer.Argument(metavar="DEST [OPTION]...", show_default=False)]) -> None:
    """Make existing WebDataset tars ready to train on (options: python -m data.index_cli --help)."""
    _module("data.index_cli", *arguments)


@data_app.command("verify", context_settings={"ignore_unknown_options": True})
def data_verify(
    arguments: Annotated[list[str], typer.Argument(metavar="DEST [OPTION]...", show_default=False)],
) -> None:
    """Read all of a data set and report what is wrong (options: python -m data.verify --help)."""
    _module("data.verify", *arguments)


@checkpoint_app.command("ls", context_settings={"ignore_unknown_options": True})
def checkpoint_ls(
    arguments: Annotated[list[str], typer.Argument(metavar="RUN [OPTION]...", show_default=False)],
) -> None:
    """Steps, sizes, ages, ranks, engine, and which are complete (a run's folder, or a folder or s3:// of checkpoints)."""
    _module("trainer.saving.checkpoints_cli", "ls", *arguments)


@checkpoint_app.command("diff", context_settings={"ignore_unknown_options": True})
def checkpoint_diff(
    arguments: Annotated[list[str], typer.Argument(metavar="A B [OPTION]...", show_default=False)],
) -> None:
    """How far two checkpoints are apart, tensor by tensor (options: python -m trainer.saving.checkpoints_cli diff --help)."""
    _module("trainer.saving.checkpoints_cli", "diff", *arguments)


@checkpoint_app.command("verify", context_settings={"ignore_unknown_options": True})
def checkpoint_verify(
    arguments: Annotated[list[str], typer.Argument(metavar="CHECKPOINT [OPTION]...", show_default=False)],
) -> None:
    """Read all of a checkpoint: files, sizes, coverage, every tensor finite; RUN means its newest complete one."""
    _module("trainer.saving.checkpoints_cli", "verify", *arguments)


@app.command("sample", context_settings=FORWARDED)
def sample(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT --prompts FILE [OPTION]...", show_default=False)
    ],
) -> None:
    """Draw images with a run, a checkpoint, a base model or an export, on one rank per GPU, or --nproc N ranks."""
    nproc, rest = _nproc(arguments)
    _module(*torchrun_here(1 if "--help" in rest else nproc, "trainer.generate.draw"), *rest)


@app.command("export", context_settings=FORWARDED)
def export(
    arguments: Annotated[list[str], typer.Argument(metavar="CHECKPOINT DEST [OPTION]...", show_default=False)],
) -> None:
    """Write a checkpoint as a diffusers folder that runs without this project, with a model card."""
    _module("trainer.export", *arguments)


@model_app.command("tiny", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def model_tiny(context: typer.Context, dest: Path) -> None:
    """Write a tiny model folder of any backbone with random weights (options: python -m models.tiny --help)."""
    _module("models.tiny", str(dest), *context.args)


@model_app.command("fetch", context_settings={"ignore_unknown_options": True})
def model_fetch(
    arguments: Annotated[list[str], typer.Argument(metavar="REPO DEST [OPTION]...", show_default=False)],
) -> None:
    """Bring a base model from the hub to a folder or s3://, once (options: python -m trainer.fetch_model --help)."""
    _module("trainer.fetch_model", *arguments)


def _nproc(arguments: list[str]) -> tuple[int, list[str]]:
    """Ranks on this machine, and the arguments without --nproc N."""
    if "--nproc" not in arguments:
        return processes(None, local.count_gpus()), arguments
    at = arguments.index("--nproc")
    given = arguments[at + 1 : at + 2]
    if not given or not given[0].isdigit() or int(given[0]) < 1:
        fail("cannot start", f"--nproc wants a number of ranks, not {given[0] if given else 'nothing'}")
    return int(given[0]), arguments[:at] + arguments[at + 2 :]


def _module(module: str, *arguments: str) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    raise typer.Exit(
        subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode
    )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
