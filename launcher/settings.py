"""Reading a configuration for a verb of the command line: files and overrides in one list, refusals in plain words."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from configs import load
from configs.schema import Config
from launcher.report import refuse

Settings = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG... [KEY=VALUE]...", help="YAML files, merged left to right, then overrides."),
]


def load_config(settings: list[str]) -> Config:
    """The configuration, or the end of this program with what is wrong."""
    try:
        return load.load(*split(settings))
    except load.ConfigError as error:
        fail("configuration refused", str(error))


def split(settings: list[str]) -> tuple[list[str], list[str]]:
    """Files, overrides."""
    return [text for text in settings if "=" not in text], [text for text in settings if "=" in text]


def fail(title: str, message: str) -> NoReturn:
    """Say why nothing was started and end with exit status 2."""
    refuse(title, message)
    raise typer.Exit(2)
