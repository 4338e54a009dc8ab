"""Model folders below s3://, as every loader wants them: on this machine's disk, downloaded once a node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from configs.schema import Config
from data.mirror import mirror
from models.hub import INDEX, MODEL_FILES
from models.weights import CheckpointError


def is_model_file(name: str) -> bool:
    """Whether models are loaded from such a file; code and pickles are left where they are."""
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
    folder = mirror(path, is_model_file, data.cache_dir, data.endpoint_url, data.read_budget_s)
    if not any((folder / name).is_file() for name in (INDEX, "config.json")):
        raise CheckpointError(
            f"{path} has neither {INDEX} nor config.json: no diffusers model, or its upload has not ended"
        )
    return str(folder)
