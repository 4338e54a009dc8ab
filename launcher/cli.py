"""The command line. Nothing here imports torch: verbs that need it start `python -m ...`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from configs import knobs, load
from configs.folders import ForeignFolder, refuse_foreign, run_folder, unused
from configs.schema import Config
from launcher import local
from launcher.job import Job, processes, threads

ROOT = Path(__file__).resolve().parent.parent
HELP = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": "markdown"}
app = typer.Typer(help="Train one- and two-step image generators with TwinFlow.", **HELP)  # type: ignore[arg-type]
config_app = typer.Typer(help="Check, show and compare configurations; starts nothing.", **HELP)  # type: ignore[arg-type]
data_app = typer.Typer(help="Make data sets.", **HELP)  # type: ignore[arg-type]
model_app = typer.Typer(help="Make models.", **HELP)  # type: ignore[arg-type]
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")
console, errors = Console(), Console(stderr=True)

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
    except ForeignFolder as error:
        _fail(str(error))
    logs = folder / "logs" / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    resolved = logs / "config.yaml"
    config.run.dir = str(folder)
    load.save(config, resolved)
    nproc = processes(config.runtime.nproc, local.count_gpus())
    changes = [argument for key in allow_change for argument in ("--allow-change", key)]
    job = Job(
        module="trainer.train",
        arguments=("--config", str(resolved), *changes),
        nproc=nproc,
        threads=threads(config.runtime.threads, os.cpu_count() or 1, nproc),
        log_dir=logs,
        root=ROOT,
        port=config.runtime.port or 0,
        stop_timeout_s=config.runtime.stop_timeout_s,
    )
    try:
        outcome = local.Runner(job).run()
    except local.LaunchError as error:
        _fail(str(error))
    raise typer.Exit(report(outcome, job, folder, " ".join(["twinflow train", *settings])))


def report(outcome: local.Outcome, job: Job, folder: Path, command: str) -> int:
    """Print how the run ended and where its results are; the exit code."""
    status = local.read_status(folder)
    state = status.get("state", "not started")
    if outcome.signal and state == "stopped":
        console.print(_panel("stopped and saved", "yellow", status, folder, f"Go on with: {command}"))
        return 128 + outcome.signal
    if outcome.code == 0 and state == "finished":
        console.print(_panel("finished", "green", status, folder, ""))
        return 0
    if outcome.code == 0 and state == "stopped":  # a rank was asked directly, not through this process
        console.print(_panel("stopped and saved", "yellow", status, folder, f"Go on with: {command}"))
        return 128 + signal.SIGTERM
    errors.print(Panel(_death(outcome, job), title=f"run failed ({folder})", border_style="red", title_align="left"))
    return 128 + outcome.signal if outcome.signal else 1


def _death(outcome: local.Outcome, job: Job) -> str:
    if outcome.died is None:
        return f"torchrun ended with status {outcome.code}\n{local.last_lines(job.log_dir / 'torchrun.log')}\nlogs: {job.log_dir}"
    rank, code = outcome.died
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = "; the kernel kills a process when memory runs out, see its log" if code == -signal.SIGKILL else ""
    own = local.rank_log(job.log_dir, rank, "stderr")
    return f"rank {rank} {how}{hint}\n\n{local.last_lines(own)}\n\nits output: {own}\nThe same command resumes from the last checkpoint."


def _panel(title: str, color: str, status: dict[str, Any], folder: Path, more: str) -> Panel:
    mlflow = status.get("mlflow") or {}
    lines = [
        status.get("message", ""),
        f"run         {folder}",
        f"checkpoint  {status.get('checkpoint')}",
        *[f"picture     {picture}" for picture in status.get("pictures", [])],
    ]
    if mlflow.get("run_id"):
        lines.append(f"MLflow      mlflow ui --backend-store-uri {mlflow['uri']}   (run {mlflow['run_id']})")
    return Panel("\n".join([*lines, *filter(None, [more])]), title=title, border_style=color, title_align="left")


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


@model_app.command("tiny", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def model_tiny(context: typer.Context, dest: Path) -> None:
    """Write a tiny Qwen-Image folder with random weights (options: python -m models.tiny --help)."""
    _module("models.tiny", str(dest), *context.args)


def all_knobs(config: Config) -> dict[str, list[knobs.Knob]]:
    """Every knob by section, the plug-ins' own options included."""
    plugins = {kind: knobs.plugin_knobs(kind, getattr(config, kind)["name"]) for kind in knobs.FOLDERS}
    return {**load.schema_sections(), **plugins}


def _load(settings: list[str]) -> Config:
    files = [text for text in settings if "=" not in text]
    try:
        return load.load(files, [text for text in settings if "=" in text])
    except load.ConfigError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    errors.print(Panel(message, title="cannot start", border_style="red", title_align="left"))
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
