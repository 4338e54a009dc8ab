"""Model folders below s3://, as every loader wants them: on this machine's disk, downloaded once a node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from configs.schema import Config
from data.mirror import mirror

MODEL_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Endings of what a diffusers pipeline is loaded from; code and pickles are left where they are."""


def is_model_file(name: str) -> bool:
    return PurePosixPath(name).suffix in MODEL_FILES


def with_local_model(config: Config) -> Config:
    """The same configuration with model.path on this machine; every process of a node may call it at once.

    Raises DataError where the store fails, or the disk is full (see data.mirror).
    """
    path = config.model.get("path")
    return config if path is None else replace(config, model={**config.model, "path": local_folder(config, str(path))})


def local_folder(config: Config, path: str) -> str:
    """`path` itself, or the mirror of an s3:// folder; read with the store of the data section."""
    if not path.startswith("s3://"):
        return path
    data = config.data
    return str(mirror(path, is_model_file, data.cache_dir, data.endpoint_url, data.read_budget_s))
