"""What a new run starts from: the base model, or with init_from the weights of an earlier run or a published checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.schema import Config, Lora
from models import lora, lora_files
from models.weights import ADAPTER, CheckpointError, FlatPart, base_name, component, flat_parts, some
from trainer.engines.engine import TensorPart
from trainer.model_folder import local_start, single_time
from trainer.saving import unsaved_weights
from trainer.saving.certificate import CONFIG, SavedTensor
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.checkpoints_cli import place, reader
from trainer.saving.tensor_file import as_dtype

log = logging.getLogger(__name__)
SEED_UNDER_ADAPTERS = 0
"""Of new parameters of a base under adapters (a second time embedding drawn at random): no checkpoint and no file of
adapters holds them, so they must be the same in every run, whatever its run.seed."""


@dataclass(frozen=True)
class Source:
    """load: fills the (sharded) parameters of a backbone, or of its adapters where the source holds those. base: the
    fingerprint of the weights that its adapters were trained on, where it is known."""

    load: Callable[[Any], None]
    holds_adapters: bool = False
    base: list[float] | None = None


@dataclass(frozen=True)
class Loader:
    """Call it to fill the (sharded) parameters of a backbone. adapters: what those in it are filled with."""

    load: Callable[[Any], None]
    adapters: Source
    path: str | None

    def __call__(self, module: Any) -> None:
        self.load(module)

    def refuse_other_base(self, found: Mapping[str, list[float]], model_path: str) -> None:
        """CheckpointError where given adapters were trained on other weights than the base that was loaded; found:
        `unsaved_weights.fingerprints` of the engine."""
        own, theirs = found.get(unsaved_weights.BASE), self.adapters.base
        if own is not None and theirs is not None and not unsaved_weights.same(own, theirs):
            raise CheckpointError(
                f"the adapters in {self.path} (init_from.path) were trained on other weights than those in {model_path} "
                f"(model.path): fingerprint {theirs}, here {own}. Set model.path to the model that they were trained on; "
                "or export their run merged (twinflow export) and set init_from.path to that, for new adapters on it"
            )


def loader(config: Config, resumes: bool, teacher: str) -> Loader:
    """What fills the (sharded) parameters of a backbone: of init_from where it is set, else of model.path.

    resumes: whether a checkpoint of the run itself follows. Then init_from need not be there any more, unless a frozen
    teacher or the base of adapters may be made of it.
    """
    path, adapted = config.init_from.path, config.lora.rank is not None
    base = Source(lambda module: module.load(config.model["path"], _seed(config)))
    adapters = Source(lambda module: lora.initialise(module, config.run.seed), holds_adapters=True)
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

    return Loader(load, adapters, path)


def _seed(config: Config) -> int:
    """Of parameters that neither the base model nor what a run starts from has."""
    return config.run.seed if config.lora.rank is None else SEED_UNDER_ADAPTERS


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
            _refuse_other_adapters(config.lora, _recorded_options(source), source.url)
        log.info("the %s are the %s ones of %s", "adapters" if holds_adapters else "weights", which, source.url)

        def load(module: Any) -> None:
            if not holds_adapters:
                module.load(config.model["path"], _seed(config))  # what is no parameter is in no checkpoint
            fill(module, source, which, holds_adapters)

        return Source(load, holds_adapters, source.certificate.metadata.get(unsaved_weights.BASE))
    folder = local_start(config, path)
    if Path(folder).suffix == ".safetensors" or (Path(folder) / lora_files.FILE).is_file():
        saved = lora_files.read(folder)
        _refuse_other_adapters(config.lora, saved.options, path)
        log.info("the adapters are those of %s", path)
        if saved.base is None:
            log.warning("%s does not say which weights its adapters belong to; they are taken for model.path's", path)
        return Source(lambda module: lora.initialise(module, config.run.seed, saved.tensors), True, saved.base)
    if single_time(folder) and not (config.lora.rank is not None and config.lora.variant == "single_time"):
        raise CheckpointError(
            f"init_from.path={path} is an export of merged adapters that is asked at t - r/2; its second time embedding is "
            "zero and could not learn. Set lora.rank and lora.variant=single_time, or start from the model that the "
            "adapters were trained on"
        )
    log.info("the weights are those of %s", path)
    return Source(lambda module: _load_folder(module, folder, _seed(config)))


def _recorded_options(source: CheckpointReader) -> Lora:
    """What the certificate of a checkpoint of adapters says of them."""
    config = source.certificate.metadata.get(CONFIG)
    recorded = config.get("lora") if isinstance(config, dict) else None
    if not isinstance(recorded, dict) or not isinstance(recorded.get("rank"), int):
        raise CheckpointError(
            f"{source.url} holds adapters and does not say of which rank, alpha and variant (an earlier version wrote "
            "it): write them as a file, twinflow export RUN DEST --adapters, and set init_from.path to DEST"
        )
    if unknown := recorded.keys() - {field.name for field in fields(Lora)}:
        raise CheckpointError(
            f"{source.url} was written with lora.{sorted(unknown)[0]}, which is unknown here, by another version: use that "
            "version, or write the adapters with it as a file (twinflow export RUN DEST --adapters)"
        )
    return Lora(**recorded)


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
