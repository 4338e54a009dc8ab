"""Model folders and adapters below s3://, as every loader wants them: on this machine's disk, downloaded once a node."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from configs.schema import Config
from data.mirror import mirror
from models import lora_files
from models.hub import CONFIG, INDEX, MODEL_FILES
from models.weights import CheckpointError


def is_model_file(name: str) -> bool:
    """Whether models are loaded from such a file; code and pickles are left where they are."""
    return PurePosixPath(name).suffix in MODEL_FILES


def single_time(folder: str | Path) -> bool:
    """Whether a model folder on this machine is an export of merged adapters whose network is asked at t - r/2."""
    file = Path(folder) / "scheduler/scheduler_config.json"
    return file.is_file() and bool(json.loads(file.read_text()).get("single_time"))


def with_local_model(config: Config) -> Config:
    """The same configuration with model.path on this machine; every process of a node may call it at once.

    Raises DataError where the store fails, or the disk is full (see data.mirror).
    """
    path = config.model.get("path")
    return config if path is None else replace(config, model={**config.model, "path": local_folder(config, str(path))})


def local_folder(config: Config, path: str) -> str:
    """`path` itself, or the mirror of an s3:// folder; read with the store of the data section."""
    return _local(config, path, (INDEX, CONFIG), "no diffusers model")


def local_start(config: Config, path: str) -> str:
    """As `local_folder`, of what init_from.path may name besides: a folder of adapters, or their .safetensors file."""
    if path.startswith("s3://") and path.endswith(".safetensors"):
        folder, _, name = path.rpartition("/")
        return str(_mirrored(config, folder, lambda other: other == name) / name)
    return _local(config, path, (INDEX, CONFIG, lora_files.FILE), "neither a diffusers model nor adapters")


def _local(config: Config, path: str, one_of: tuple[str, ...], otherwise: str) -> str:
    if not path.startswith("s3://"):
        return path
    folder = _mirrored(config, path, is_model_file)
    if not any((folder / name).is_file() for name in one_of):
        raise CheckpointError(f"{path} has none of {', '.join(one_of)}: {otherwise}, or its upload has not ended")
    return str(folder)


def _mirrored(config: Config, url: str, wanted: Callable[[str], bool]) -> Path:
    data = config.data
    return mirror(url, wanted, data.cache_dir, data.endpoint_url, data.read_budget_s)
