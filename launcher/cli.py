"""The command line. Nothing here imports torch: verbs that need it start `python -m ...`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from configs import knobs, load
from configs.folders import ForeignFolder, refuse_foreign, run_folder, unused
from configs.schema import Config
from launcher import local
from launcher.job import Job, processes, threads
from launcher.report import consoles, refuse, report

ROOT = Path(__file__).resolve().parent.parent
HELP = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": "markdown"}
app = typer.Typer(help="Train one- and two-step image generators with TwinFlow.", **HELP)  # type: ignore[arg-type]
config_app = typer.Typer(help="Check, show and compare configurations; starts nothing.", **HELP)  # type: ignore[arg-type]
data_app = typer.Typer(help="Make data sets.", **HELP)  # type: ignore[arg-type]
model_app = typer.Typer(help="Make models.", **HELP)  # type: ignore[arg-type]
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
console, _ = consoles()

Settings = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG... [KEY=VALUE]...", help="YAML files, merged left to right, then overrides."),
]


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
    """Train on this machine: one rank per GPU, or runtime.nproc ranks on the CPU.

    The same command resumes. Ctrl-C saves and stops; twice ends at once.
    """
    config = _load(settings)
    folder = unused(run_folder(config)) if fresh else run_folder(config)
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
        _fail("cannot start", str(error))
    raise typer.Exit(report(outcome, job, folder, resume_command(config, settings, folder), stamp))


def training_job(config: Config, settings: list[str], allow_change: list[str], folder: Path, logs: Path) -> Job:
    """Ranks that load the same files and overrides. They do not get the resolved file: secrets are redacted in it."""
    files, overrides = _split(settings)
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
    config = _load(settings)
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
    config = _load(settings)
    if yaml:
        print(load.to_yaml(config), end="")
        return
    table = Table(
        "key", "value", "default", "type", "unit", "meaning", title="values that differ from the default in bold"
    )
    values = load.to_dict(config)
    for section, section_knobs in all_knobs(config).items():
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
    a, b = _load([str(first)]), _load([str(second)])
    table = Table("key", str(first), str(second), "changes")
    defining = load.identity(a).keys() | load.identity(b).keys()
    for key, old, new in load.difference(load.to_dict(a), load.to_dict(b)):
        table.add_row(key, str(old), str(new), "the experiment" if key in defining else "circumstances")
    console.print(table if table.row_count else "no difference")


@data_app.command("demo", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def data_demo(context: typer.Context, dest: Path) -> None:
    """Write scikit-learn's handwritten digits as WebDataset shards (options: python -m data.demo --help)."""
    _module("data.demo", str(dest), *context.args)


@data_app.command("pack", context_settings={"ignore_unknown_options": True})
def data_pack(
    arguments: Annotated[list[str], typer.Argument(metavar="SOURCE DEST [OPTION]...", show_default=False)],
) -> None:
    """Write WebDataset shards of a folder of images, a table or tars (options: python -m data.pack --help)."""
    _module("data.pack", *arguments)


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


@model_app.command("tiny", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def model_tiny(context: typer.Context, dest: Path) -> None:
    """Write a tiny Qwen-Image folder with random weights (options: python -m models.tiny --help)."""
    _module("models.tiny", str(dest), *context.args)


def all_knobs(config: Config) -> dict[str, list[knobs.Knob]]:
    """Every knob by section, the plug-ins' own options included."""
    plugins = {kind: knobs.plugin_knobs(kind, getattr(config, kind)["name"]) for kind in knobs.FOLDERS}
    return {**load.schema_sections(), **plugins}


def _load(settings: list[str]) -> Config:
    try:
        return load.load(*_split(settings))
    except load.ConfigError as error:
        _fail("configuration refused", str(error))


def _split(settings: list[str]) -> tuple[list[str], list[str]]:
    """Files, overrides."""
    return [text for text in settings if "=" not in text], [text for text in settings if "=" in text]


def _fail(title: str, message: str) -> NoReturn:
    refuse(title, message)
    raise typer.Exit(2)


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
