"""`twinflow export CHECKPOINT DEST`: a checkpoint as a diffusers folder that runs without this project.

    DiffusionPipeline.from_pretrained(DEST, trust_remote_code=True)("a prompt").images[0]

The trained transformer with its target time, our scheduler and the pipeline's call travel as Python files of their own;
text encoder, VAE and tokenizer come from the base model, as hard links where the file system allows it. DEST appears
complete or not at all.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from data.s3 import DataError
from models import lora_files, weights
from models.exported import bundle
from models.transformer import TWIN
from trainer.export_tensors import adapters, tensors
from trainer.generate.sampler import preset
from trainer.generate.scheduler import TwinFlowScheduler
from trainer.model_card import Card, write_card
from trainer.origin import Origin, find, transformer_class
from trainer.saving import unsaved_weights
from trainer.saving.certificate import CheckpointError
from trainer.train import check_package

EXPORTED = Path(bundle.__file__).parent
TRAVELS = {".safetensors", ".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken"}
"""What is taken of the base model's components: weights as safetensors, configurations, vocabularies. Nothing that is
executed or unpickled."""
ADAPTERS_HELP = (
    "of a LoRA run: its adapters alone, not merged: for init_from.path, and for pipe.load_lora_weights where lora.variant "
    "is single_time"
)
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ExportRefused(ValueError):
    """The checkpoint cannot become such a folder; the message says why and what to do."""


@dataclass(frozen=True)
class Wanted:
    """weights: online | ema; dtype: of the transformer's files; preset: of a call that names none; license: of the base
    model as the hub calls it, base_model: its name there; both may be unknown. adapters: the adapters alone,
    for init_from.path (of lora.variant single_time for `pipe.load_lora_weights`, too), in place of a whole folder with
    them merged in."""

    weights: str
    dtype: str = "bfloat16"
    preset: str = "2nfe"
    license: str | None = None
    base_model: str | None = None
    adapters: bool = False


def export(origin: Origin, dest: Path, wanted: Wanted) -> None:
    """Write the folder.

    Raises:
        ExportRefused: DEST exists, or the model is of a kind that plain diffusers cannot run.
        CheckpointError, DataError, OSError: a part cannot be read or written.
    """
    if dest.exists():
        raise ExportRefused(f"{dest} exists; choose another folder or remove it")
    if origin.reader is None:
        raise ExportRefused(f"{origin.base} is a diffusers folder already; name a run or a checkpoint")
    if wanted.adapters:
        _export_adapters(origin, dest, wanted)
        return
    if origin.config.model.get("latents") == "pixels":
        raise ExportRefused("a model of pixels (model.latents=pixels) has no VAE, and diffusers' pipelines need one")
    index = json.loads(_required(origin.base / "model_index.json").read_text())
    dest.parent.mkdir(parents=True, exist_ok=True)
    staging = dest.with_name(f".{dest.name}.partial-{os.getpid()}")
    staging.mkdir()
    try:
        _write(staging, origin, wanted, index)
        for file in staging.rglob("*.safetensors"):
            if file.stat().st_nlink == 1:
                shutil.copymode(staging / "model_index.json", file)  # safetensors makes files only their owner can read
        os.sync()
        staging.rename(dest)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _export_adapters(origin: Origin, dest: Path, wanted: Wanted) -> None:
    found = adapters(origin, wanted.weights)
    state = {name: tensor.to(DTYPES[wanted.dtype]) for name, tensor in found.items()}
    assert origin.reader is not None
    base = origin.reader.certificate.metadata.get(unsaved_weights.BASE)
    file = lora_files.save(dest, state, origin.config.lora, base)
    if origin.config.lora.variant == "second_embedding":
        print(
            f"warning: the adapters in {file} need the transformer with two times (lora.variant=second_embedding): they "
            "are for init_from.path. pipe.load_lora_weights leaves out what it does not know, and draws other images; for "
            "diffusers export without --adapters, which merges them",
            file=sys.stderr,
        )


def _write(folder: Path, origin: Origin, wanted: Wanted, index: dict[str, Any]) -> None:
    named = index["_class_name"]
    pipeline = (named if isinstance(named, str) else named[1]).removeprefix(TWIN)
    transformer = transformer_class(origin.base)
    described: dict[str, Any] = {key: value for key, value in index.items() if not isinstance(value, list)}
    described["_class_name"] = _twin(pipeline, folder, "_pipeline")
    described["_diffusers_version"] = diffusers.__version__
    for component, library_and_class in index.items():
        if component.startswith("_") or not isinstance(library_and_class, list):
            continue
        described[component] = library_and_class
        if component == "transformer":
            (folder / component).mkdir()
            described[component] = _twin(transformer, folder / component)
            _write_transformer(folder / component, origin, wanted, TWIN + transformer)
        elif component == "scheduler":
            described[component] = _write_scheduler(folder / component, origin, wanted)
        elif library_and_class[0] is not None:
            _take(origin.base / component, folder / component)
    (folder / "model_index.json").write_text(json.dumps(described, indent=2) + "\n")
    for file in origin.base.glob("LICENSE*"):
        _link(file, folder / file.name)
    card = Card(origin, wanted.weights, wanted.dtype, wanted.preset, wanted.license, wanted.base_model)
    write_card(folder, card)


def _twin(base_class: str, folder: Path, suffix: str = "") -> list[str]:
    """Write the file with the exported twin of a diffusers class; what model_index.json says of it: file, class."""
    for file in sorted(EXPORTED.rglob("*.py")):
        if TWIN + base_class in _classes(file):
            # One name for each family: diffusers keeps the files of all local folders in one package.
            name = f"twinflow_{file.stem}{suffix}"
            module = ".".join(("models", "exported", *file.relative_to(EXPORTED).with_suffix("").parts))
            (folder / f"{name}.py").write_text(bundle.bundle(module))
            return [name, TWIN + base_class]
    raise ExportRefused(f"there is no exported form of diffusers' {base_class}; see models/exported/")


def _classes(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}


def _write_transformer(folder: Path, origin: Origin, wanted: Wanted, class_name: str) -> None:
    base = weights.component(origin.base, "transformer")
    given = json.loads((base / "config.json").read_text())
    config = {key: value for key, value in given.items() if not key.startswith("_")}
    head = {"_class_name": class_name, "_diffusers_version": diffusers.__version__}
    (folder / "config.json").write_text(json.dumps({**head, **config}, indent=2, sort_keys=True) + "\n")
    found = tensors(origin, wanted.weights)
    for name in found.parameters:
        found.stored[name] = torch.empty_like(found.stored[name], dtype=DTYPES[wanted.dtype])
    weights.write(folder, found.stored, found.read)


def _write_scheduler(folder: Path, origin: Origin, wanted: Wanted) -> list[str]:
    folder.mkdir()
    defaults: dict[str, Any] = {"max_sequence_length": origin.config.encoder.max_text_tokens}
    if origin.resolution is not None:
        defaults |= {"height": origin.resolution[0], "width": origin.resolution[1]}
    single_time = origin.config.lora.rank is not None and origin.config.lora.variant == "single_time"
    TwinFlowScheduler(wanted.preset, defaults, single_time=single_time).save_pretrained(folder)
    (folder / "twinflow_scheduler.py").write_text(bundle.bundle(TwinFlowScheduler.__module__))
    return ["twinflow_scheduler", TwinFlowScheduler.__name__]


def _take(source: Path, dest: Path) -> None:
    """A component of the base model."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    if not files:
        raise ExportRefused(f"{source} is missing or empty; the base model's folder must be complete (or name --base)")
    pickled = [file for file in files if file.suffix in PICKLES]
    if pickled and not any(file.suffix == ".safetensors" for file in files):
        raise ExportRefused(f"{pickled[0]} is a pickle; save the base model with safetensors first")
    for file in files:
        if file.suffix in TRAVELS:
            target = dest / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(file, target)


def _link(source: Path, target: Path) -> None:
    source = source.resolve()  # a hub cache holds links
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _required(file: Path) -> Path:
    if not file.is_file():
        raise ExportRefused(f"{file} does not exist; the base model must be a whole diffusers folder (or name --base)")
    return file


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="twinflow export", description=(__doc__ or "").partition(":")[2].strip())
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder, checkpoint folder, or s3:// one")
    options.add_argument("dest", metavar="DEST", type=Path, help="folder to create")
    options.add_argument("--weights", choices=("ema", "online"), help="default: averaged ones where they were kept")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the transformer's files [%(default)s]")
    options.add_argument("--preset", default="2nfe", help="sampler of a call that names none [%(default)s]")
    options.add_argument("--base", metavar="FOLDER", help="base model folder, where it is not at the run's model.path")
    options.add_argument("--adapters", action="store_true", help=ADAPTERS_HELP)
    options.add_argument("--license", help="licence of the base model, for the model card; the hub's short name")
    options.add_argument("--base-model", metavar="REPO", help="name of the base model on the hub, for the model card")
    options.add_argument("--endpoint-url", help="S3 endpoint for stores other than AWS; default: the run's")
    return options


def main(arguments: list[str] | None = None) -> int:
    check_package()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    given = parser().parse_args(arguments)
    try:
        preset(given.preset)
        origin = find(given.checkpoint, given.endpoint_url, given.base)
        chosen = origin.choose(given.weights)
        wanted = Wanted(chosen, given.dtype, given.preset, given.license, given.base_model, given.adapters)
        export(origin, given.dest, wanted)
    except (CheckpointError, DataError, weights.CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in given.dest.rglob("*") if file.is_file()) / 1e9
    print(f"{given.dest}: step {origin.step} of {origin.name}, {chosen} weights, {given.dtype}, {size:.3f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
