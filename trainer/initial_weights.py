"""What a new run starts from: the base model, or with init_from the weights of an earlier run or a published checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from configs.schema import Config
from models.weights import CheckpointError, FlatPart, component, flat_parts, some
from trainer.engines.engine import TensorPart
from trainer.model_folder import local_folder
from trainer.saving.certificate import SavedTensor
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoints_cli import place, reader
from trainer.saving.tensor_file import as_dtype

log = logging.getLogger(__name__)


def loader(config: Config, resumes: bool, teacher: str) -> Callable[[Any], None]:
    """What fills the (sharded) parameters of a backbone: of init_from where it is set, else of model.path.

    resumes: whether a checkpoint of the run itself follows. Then init_from need not be there any more, unless a frozen
    teacher is made of it.
    """
    path = config.init_from.path
    if path is None or (resumes and teacher != "frozen"):
        return lambda module: module.load(config.model["path"], config.run.seed)
    endpoint_url = config.checkpoint.endpoint_url or config.data.endpoint_url
    if not _holds_checkpoints(path, endpoint_url):
        folder = local_folder(config, path)
        log.info("the weights are those of %s", path)
        return lambda module: _load_folder(module, folder, config.run.seed)
    source = reader(path, endpoint_url)
    log.info("the weights are the %s ones of %s", config.init_from.weights, source.url)

    def load(module: Any) -> None:
        module.load(config.model["path"], config.run.seed)  # what is no parameter is in no checkpoint
        fill(module, source, config.init_from.weights)

    return load


def _holds_checkpoints(path: str, endpoint_url: str | None) -> bool:
    store, name = place(path, endpoint_url)
    return name is not None or bool(store.listing())


def _load_folder(module: Any, folder: str, seed: int) -> None:
    try:
        component(folder, "transformer")
        module.load(folder, seed)
    except (FileNotFoundError, CheckpointError) as error:
        raise CheckpointError(
            f"init_from.path={folder} holds no checkpoint of a run and no fitting diffusers model: {error}"
        ) from error


@torch.no_grad()
def fill(module: nn.Module, source: CheckpointReader, which: str) -> None:
    """Fill plain or sharded parameters from a run's checkpoint. which: ema | online; frozen parameters have no average.

    Raises CheckpointError for every missing, unexpected or misshapen tensor, before anything is changed.
    """
    saved = _saved(source, which)
    targets = flat_parts(module)
    problems = [f"missing: {name}" for name in sorted(targets.keys() - saved.keys())]
    problems += [f"unexpected: {name}" for name in sorted(saved.keys() - targets.keys())]
    problems += [
        f"shape {saved[name][1].shape} instead of {target.shape}: {name}"
        for name, target in targets.items()
        if name in saved and saved[name][1].shape != target.shape
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {source.url} do not fit the model:\n  {some(problems, chr(10) + '  ', 20)}\n"
            "Set model.path to the model that they were trained from"
        )
    staged = list(_staged(source, saved, targets))
    source.fill(part for part, _ in staged)
    for part, target in staged:
        if part.local is not target.local:
            target.local.copy_(part.local)


def _saved(source: CheckpointReader, which: str) -> dict[str, tuple[str, SavedTensor]]:
    """(group, tensor) by parameter name."""
    tensors = source.certificate.tensors
    if which == "ema" and not tensors.get("ema"):
        raise CheckpointError(f"{source.url} has no averaged weights; set init_from.weights=online")
    averages = tensors["ema"] if which == "ema" else {}
    found = {name: ("parameter", tensor) for name, tensor in tensors.get("parameter", {}).items()}
    return found | {name: ("ema", tensor) for name, tensor in averages.items()}


def _staged(
    source: CheckpointReader, saved: dict[str, tuple[str, SavedTensor]], targets: dict[str, FlatPart]
) -> Iterator[tuple[TensorPart, FlatPart]]:
    """What to read for each target: into it where it has the saved dtype and device, else into memory beside it."""
    for name, target in targets.items():
        group, tensor = saved[name]
        dtype, local = as_dtype(tensor.dtype, source.url), target.local
        if local.dtype != dtype:
            local = torch.empty(local.shape, dtype=dtype)
        assert target.start + local.numel() <= math.prod(target.shape), "a part outside its tensor"
        yield TensorPart(group, name, target.shape, target.start, local), target
