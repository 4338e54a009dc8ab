"""Where weights come from: one of our checkpoints, a base model folder, or an export; and the configuration that goes with
them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
import yaml
from torch import Tensor

from configs import load as configuration
from configs.folders import OURS
from configs.schema import Config
from models import backbones, weights
from models.transformer import TWIN
from trainer import initial_weights
from trainer.engines.engine import TensorPart
from trainer.model_folder import single_time, with_local_model
from trainer.plugins import plugin
from trainer.run_folder import CONFIG_FILE
from trainer.saving.certificate import CONFIG, SavedTensor
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoints_cli import reader
from trainer.saving.tensor_file import as_dtype

GROUPS = {"online": "parameter", "ema": "ema"}
_NEVER_TRAINED = {
    "run.name": "sample",
    "data.manifest": "none",
    "train.steps": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
}


class OriginError(ValueError):
    """What was named holds no weights that can be used; the message names it and the remedy."""


@dataclass(frozen=True)
class Origin:
    """name: of the run or folder; config: its model and encoder sections count; reader: our checkpoint, or None where
    the weights are those of the folder config.model.path; run: the run's folder on this machine, where there is one."""

    name: str
    config: Config
    reader: CheckpointReader | None
    run: Path | None = None

    @property
    def step(self) -> int | None:
        return None if self.reader is None else self.reader.certificate.step

    @property
    def base(self) -> Path:
        """The diffusers model folder with the encoders."""
        return Path(self.config.model["path"])

    @property
    def single_time(self) -> bool:
        """Whether the weights are those of an export whose network is asked at t - r/2 in place of (t, r)."""
        return self.reader is None and single_time(self.base)

    @property
    def resolution(self) -> tuple[int, int] | None:
        """(height, width) [pixels] of the run's first bucket, or of an export's images."""
        if self.reader is None:
            return _call_resolution(self.base)
        lanes = self.reader.certificate.metadata.get("data_order", {}).get("lanes", {})
        # NAME/HEIGHTxWIDTH, of edits with -from-HEIGHTxWIDTH of their sources
        sizes = [stream.rpartition("/")[2].partition("-from-")[0].split("x") for stream in lanes]
        return (int(sizes[0][0]), int(sizes[0][1])) if sizes else None

    def choose(self, which: str | None) -> str:
        """online or ema, as asked; unasked ema where averages were kept.

        Raises OriginError for averages that are not there.
        """
        groups = {"parameter"} if self.reader is None else set(self.reader.certificate.tensors)
        if which is None:
            return "ema" if "ema" in groups else "online"
        if GROUPS[which] not in groups:
            where = self.base if self.reader is None else self.reader.url
            raise OriginError(f"{where} holds no averaged weights (ema.decay was 0, or it is no run); take online")
        return which

    def saved(self, which: str) -> dict[str, tuple[str, SavedTensor]]:
        """Parameter -> its group and its place in the checkpoint; frozen parameters have no average."""
        assert self.reader is not None
        return initial_weights.tensors_of(self.reader, which)

    def whole(self, which: str, name: str) -> Tensor:
        """One whole parameter of the checkpoint, as it was saved."""
        assert self.reader is not None
        group, saved = self.saved(which)[name]
        tensor = torch.empty(saved.shape, dtype=as_dtype(saved.dtype, self.reader.url))
        self.reader.fill([TensorPart(group, name, saved.shape, 0, tensor.view(-1))])
        return tensor


def find(text: str, endpoint_url: str | None, base: str | None, overrides: Sequence[str] = ()) -> Origin:
    """What CHECKPOINT on the command line means. base: the base model's folder, where it is not at the run's model.path;
    overrides: key=value over the run's configuration.

    Raises:
        OriginError, ConfigError, CheckpointError, DataError: naming what is missing and the remedy.
    """
    more = [*overrides, *([f"model.path={json.dumps(base)}"] if base else [])]
    folder = Path(text)
    if (folder / "model_index.json").is_file():
        return Origin(folder.resolve().name, _of_folder(folder, more), None)
    if "://" not in text and not folder.exists():
        raise OriginError(
            f"{text} does not exist; name a run's folder, a checkpoint RUN/checkpoints/step_00000500, an s3:// one, or a "
            "diffusers model folder"
        )
    checkpoint = reader(text, endpoint_url)
    run = _run_folder(folder) if "://" not in text else None
    config = with_local_model(_of_run(checkpoint, run, more))
    if not Path(config.model["path"]).is_dir():
        raise OriginError(
            f"the base model {config.model['path']} of {text} is not on this machine; name it with --base"
        )
    return Origin(config.run.name, config, checkpoint, run)


def _of_run(checkpoint: CheckpointReader, run: Path | None, overrides: Sequence[str]) -> Config:
    recorded = checkpoint.certificate.metadata.get(CONFIG)
    if recorded is None and run is not None:
        recorded = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    if recorded is None:
        raise OriginError(
            f"{checkpoint.url} does not say which configuration it belongs to (an earlier version wrote it): name the "
            "run's folder instead"
        )
    return configuration.load([], overrides, recorded)


def _run_folder(path: Path) -> Path | None:
    """The run's folder of itself, or of a checkpoint in it."""
    candidates = [path, *path.resolve().parents[:2]]
    return next((folder for folder in candidates if (folder / OURS).is_file()), None)


def _of_folder(folder: Path, overrides: Sequence[str]) -> Config:
    """A configuration around a diffusers model folder: the backbone is the one whose class it names."""
    given = [f"{key}={value}" for key, value in _NEVER_TRAINED.items()]
    wanted = transformer_class(folder)
    names = [module.name for module in iter_modules(backbones.__path__)]
    fitting = [name for name in names if wanted in _diffusers_classes(name)]
    if not fitting:
        raise OriginError(f"{folder} has a transformer {wanted}; there are backbones for {', '.join(names)} alone")
    return configuration.load(
        [], [*given, f"model.name={fitting[0]}", f"model.path={json.dumps(str(folder))}", *overrides]
    )


def transformer_class(folder: Path) -> str:
    """Name of the diffusers class of a model folder's transformer; of an export's, the class that it extends.

    Raises OriginError where the folder has none.
    """
    file = weights.component(folder, "transformer") / "config.json"
    if not file.is_file():
        raise OriginError(f"{file} does not exist; a diffusers model folder has one")
    return str(json.loads(file.read_text()).get("_class_name", "")).removeprefix(TWIN)


def _diffusers_classes(backbone: str) -> set[str]:
    import_module(f"{backbones.__name__}.{backbone}")
    return {cls.__name__ for cls in plugin("model", {"name": backbone})[0].__mro__}


def _call_resolution(folder: Path) -> tuple[int, int] | None:
    file = folder / "scheduler/scheduler_config.json"
    given: dict[str, Any] = json.loads(file.read_text()).get("call_defaults") or {} if file.is_file() else {}
    return (given["height"], given["width"]) if given.keys() >= {"height", "width"} else None
