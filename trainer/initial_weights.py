"""What a new run starts from: the base model, or with init_from the weights of an earlier run or a published checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.schema import Config, Lora
from models import lora, lora_files
from models.weights import ADAPTER, CheckpointError, FlatPart, base_name, component, flat_parts, some
from trainer.engines.engine import TensorPart
from trainer.model_folder import local_folder
from trainer.saving.certificate import CONFIG, SavedTensor
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoints_cli import place, reader
from trainer.saving.tensor_file import as_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """load: fills the (sharded) parameters of a backbone, or of its adapters where the source holds those."""

    load: Callable[[Any], None]
    holds_adapters: bool = False


def loader(config: Config, resumes: bool, teacher: str) -> Callable[[Any], None]:
    """What fills the (sharded) parameters of a backbone: of init_from where it is set, else of model.path.

    resumes: whether a checkpoint of the run itself follows. Then init_from need not be there any more, unless a frozen
    teacher or the base of adapters may be made of it.
    """
    seed, path, adapted = config.run.seed, config.init_from.path, config.lora.rank is not None
    base = Source(lambda module: module.load(config.model["path"], seed))
    adapters = Source(lambda module: lora.initialise(module, seed), holds_adapters=True)
    if path is not None and (adapted or not resumes or teacher == "frozen"):
        given = _given(config, path)
        if given.holds_adapters and not adapted:
            raise CheckpointError(
                f"init_from.path={path} holds adapters, and lora.rank is null, which trains all parameters: set lora.rank "
                "and the other lora options to theirs, or start from an export in which they are merged"
            )
        if not given.holds_adapters:
            base = given
        elif not resumes:
            adapters = given

    def load(module: Any) -> None:
        base.load(module)
        if adapted:
            adapters.load(module)

    return load


def restore_adapters(config: Config, source: CheckpointReader, which: str, module: Any) -> None:
    """Fill a (sharded) backbone that carries the adapters of `config.lora`, the base too, with the state of one of that
    run's checkpoints; for sampling and export. which: ema | online."""
    loader(config, resumes=True, teacher="online")(module)
    fill(module, source, which, of_adapters=True)


def _given(config: Config, path: str) -> Source:
    """What init_from.path holds: a run, adapters as diffusers reads them, or a model folder."""
    endpoint_url = config.checkpoint.endpoint_url or config.data.endpoint_url
    if not path.endswith(".safetensors") and _holds_checkpoints(path, endpoint_url):
        source, which = reader(path, endpoint_url), config.init_from.weights
        holds_adapters = any(ADAPTER.search(name) for name in source.certificate.tensors.get("parameter", {}))
        if holds_adapters:
            _refuse_other_adapters(config.lora, Lora(**source.certificate.metadata[CONFIG]["lora"]), source.url)
        log.info("the %s are the %s ones of %s", "adapters" if holds_adapters else "weights", which, source.url)

        def load(module: Any) -> None:
            if not holds_adapters:
                module.load(config.model["path"], config.run.seed)  # what is no parameter is in no checkpoint
            fill(module, source, which, holds_adapters)

        return Source(load, holds_adapters)
    folder = local_folder(config, path)
    if Path(folder).suffix == ".safetensors" or (Path(folder) / lora_files.FILE).is_file():
        saved = lora_files.read(folder)
        _refuse_other_adapters(config.lora, saved.options, path)
        log.info("the adapters are those of %s", path)
        return Source(lambda module: lora.initialise(module, config.run.seed, saved.tensors), holds_adapters=True)
    log.info("the weights are those of %s", path)
    return Source(lambda module: _load_folder(module, folder, config.run.seed))


def _refuse_other_adapters(wanted: Lora, saved: Lora, where: str) -> None:
    """Adapters of another scale or way of telling the target time would be loaded without an error, and mean another
    network."""
    own, theirs = lora.described(wanted), lora.described(saved)
    if other := [f"lora.{key}={theirs[key]}" for key in own if own[key] != theirs[key]]:
        raise CheckpointError(f"the adapters in {where} are others than this run's; set {' '.join(other)}")


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
def fill(module: nn.Module, source: CheckpointReader, which: str, of_adapters: bool = False) -> None:
    """Fill plain or sharded parameters from a run's checkpoint. which: ema | online; frozen parameters have no average.

    of_adapters: fill those of the adapters, online and averaged alike; else those of the model without adapters.
    Raises CheckpointError for every missing, unexpected or misshapen tensor, before anything is changed.
    """
    saved = tensors_of(source, which)
    targets = list(_targets(module, of_adapters))
    names = {name for name, _ in targets}
    problems = [f"missing: {name}" for name in sorted(names - saved.keys())]
    problems += [f"unexpected: {name}" for name in sorted(saved.keys() - names)]
    problems += [
        f"shape {saved[name][1].shape} instead of {target.shape}: {name}"
        for name, target in targets
        if name in saved and saved[name][1].shape != target.shape
    ]
    if problems:
        remedy = (
            "lora.targets to those of that run" if of_adapters else "model.path to the model they were trained from"
        )
        raise CheckpointError(
            f"the weights in {source.url} do not fit the model:\n  {some(problems, chr(10) + '  ', 20)}\nSet {remedy}"
        )
    staged = list(_staged(source, saved, targets))
    source.fill(part for part, _ in staged)
    for part, target in staged:
        if part.local is not target.local:
            target.local.copy_(part.local)


def _targets(module: nn.Module, of_adapters: bool) -> Iterator[tuple[str, FlatPart]]:
    """(saved name, what this process holds)."""
    for name, part in flat_parts(module).items():
        if bool(ADAPTER.search(name)) == of_adapters:
            yield (lora.online_name(name) if of_adapters else base_name(name)), part


def tensors_of(source: CheckpointReader, which: str) -> dict[str, tuple[str, SavedTensor]]:
    """(group, tensor) by parameter name; which: ema | online. Frozen parameters have no average."""
    tensors = source.certificate.tensors
    if which == "ema" and not tensors.get("ema"):
        raise CheckpointError(f"{source.url} has no averaged weights; set init_from.weights=online")
    averages = tensors["ema"] if which == "ema" else {}
    found = {name: ("parameter", tensor) for name, tensor in tensors.get("parameter", {}).items()}
    return found | {name: ("ema", tensor) for name, tensor in averages.items()}


def _staged(
    source: CheckpointReader, saved: dict[str, tuple[str, SavedTensor]], targets: list[tuple[str, FlatPart]]
) -> Iterator[tuple[TensorPart, FlatPart]]:
    """What to read for each target: into it where it has the saved dtype and device, else into memory beside it."""
    for name, target in targets:
        group, tensor = saved[name]
        dtype, local = as_dtype(tensor.dtype, source.url), target.local
        if local.dtype != dtype:
            local = torch.empty(local.shape, dtype=dtype)
        assert target.start + local.numel() <= math.prod(target.shape), "a part outside its tensor"
        yield TensorPart(group, name, target.shape, target.start, local), target
