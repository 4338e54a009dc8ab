"""Model weights as safetensors in the diffusers layout: every rank reads the rows it owns, nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
Start = Callable[[str, tuple[int, ...]], Tensor]
"""(name, shape) -> the whole tensor that a new parameter starts with, on the CPU and the same on all ranks."""
ADAPTER = re.compile(r"\.(lora_[AB])\.(\w+)\.weight$")
"""End of the name that peft gives a parameter of an adapter: the matrix, the adapter's name."""


class CheckpointError(RuntimeError):
    """A weight folder that cannot be used, with what is wrong and where."""


def normal_start(deviation: float, seed: int) -> Start:
    """New weights ~ N(0, deviation^2), biases (one dimension) 0; numbers depend on the seed and the name alone."""

    def start(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) < 2:
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        return torch.randn(shape, generator=generator) * deviation

    return start


@dataclass(frozen=True)
class FlatPart:
    """What a process holds of a parameter that is not cut by rows: elements [start, start + len(local)), row-major.

    An engine sets it as the parameter's attribute `flat_part` while weights are loaded. shape: of the whole parameter;
    local: 1-D, filled in place.
    """

    shape: tuple[int, ...]
    start: int
    local: Tensor


def component(path: str | Path, name: str) -> Path:
    """The folder of a pipeline's component: path/name where it exists, else path itself."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; model.path must be a diffusers model folder on this machine"
        )
    return folder / name if (folder / name).is_dir() else folder


def plain_name(name: str) -> str:
    """A parameter's name without what torch's activation checkpointing puts into it."""
    return name.replace("_checkpoint_wrapped_module.", "")


def base_name(name: str) -> str:
    """A parameter's name in the model without wrappers and adapters."""
    return plain_name(name).replace(".base_layer.", ".")


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of the base model, by the name that they have without wrappers and adapters."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not ADAPTER.search(name):
            yield base_name(name), tensor


def flat_parts(model: nn.Module) -> dict[str, FlatPart]:
    """What this process holds of every parameter, however it is cut, by its name without wrappers."""
    parts = {}
    for name, tensor in model.named_parameters():
        if (part := getattr(tensor, "flat_part", None)) is None:
            row = math.prod(tensor.shape[1:])
            start = _first_row(tensor) * row if isinstance(tensor, DTensor) else 0
            part = FlatPart(tuple(tensor.shape), start, _local(tensor).detach().view(-1))
        parts[plain_name(name)] = part
    return parts


@torch.no_grad()
def load(model: nn.Module, folder: str | Path, derived: Mapping[str, str | Start]) -> None:
    """Fill plain or sharded (DTensor, FlatPart) parameters in place, cast to their dtype.

    derived: prefix of parameters that a base checkpoint does not have -> the prefix of their source, or what makes them.
    Where *all* keys of such a prefix are missing they start so; where they are present they are loaded like any other.

    Raises CheckpointError for every other missing, unexpected or misshapen key, before anything is changed.
    """
    folder = Path(folder)
    targets = {name: getattr(tensor, "flat_part", tensor) for name, tensor in named_tensors(model)}
    unallocated = [name for name, tensor in targets.items() if _local(tensor).is_meta]
    if unallocated:
        raise RuntimeError(f"parameters must be materialised (to_empty) before loading: {some(unallocated)}")
    files = _files(folder)
    missing = set(targets) - set(files)
    starts = {name: (new, start) for new, start in derived.items() for name in _absent(targets, missing, new)}
    problems = [f"missing: {name}" for name in sorted(missing - set(starts))]
    problems += [f"unexpected: {name}" for name in sorted(set(files) - set(targets))]
    _refuse(folder, problems)

    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        problems += _misshapen(file, {name: targets[name] for name in names})
    _refuse(folder, problems)

    for file, names in by_file.items():
        with _open(file) as reader:
            for name in names:
                fill(targets[name], reader.get_slice(name))
    for name, (new, start) in starts.items():
        if isinstance(start, str):
            _local(targets[name]).copy_(_local(targets[start + name.removeprefix(new)]))
        else:
            fill(targets[name], start(name, tuple(targets[name].shape)))


def export(
    path: str | Path,
    state: Mapping[str, Tensor],
    class_name: str,
    config: Mapping[str, Any],
    expected: Set[str],
    max_shard_size: str = "10GB",
) -> None:
    """Write a diffusers model folder (config.json, safetensors) that appears at `path` complete or not at all.

    Raises FileExistsError where `path` exists, ValueError where the state has other names than `expected`.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another folder or remove it")
    if set(state) != set(expected):
        raise ValueError(f"the state to export does not match the model: {some(sorted(set(state) ^ set(expected)))}")
    staging = path.with_name(f".{path.name}.partial-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        write(staging, state, state.__getitem__, max_shard_size)
        described = {"_class_name": class_name, "_diffusers_version": diffusers.__version__, **config}
        written = staging / "config.json"
        written.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        for file in staging.glob("*.safetensors"):
            shutil.copymode(written, file)  # safetensors makes files that only their owner can read
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write(
    folder: Path, stored: Mapping[str, Tensor], read: Callable[[str], Tensor], max_shard_size: str = "10GB"
) -> None:
    """Write safetensors files and, where they are several, their index. stored: shape and dtype of every tensor (meta
    ones will do); read: its values; one file at a time is in memory."""
    pattern = STEM + "{suffix}.safetensors"
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in stored.items()}
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        content = {name: read(name).detach().to("cpu", empty[name].dtype).contiguous() for name in names}
        save_file(content, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read(folder: str | Path, name: str) -> Tensor:
    """One tensor of a weight folder, as it is stored. Raises CheckpointError where it is not there."""
    file = _files(Path(folder)).get(name)
    if file is None:
        raise CheckpointError(f"{folder} has no tensor {name}; it is the folder of another model")
    with _open(file) as reader:
        tensor: Tensor = reader.get_tensor(name)
        return tensor


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or from the single file."""
    index, single = folder / INDEX, folder / f"{STEM}.safetensors"
    if index.is_file():
        listed = {name: folder / file for name, file in _weight_map(index).items()}
        lost = sorted({file.name for file in listed.values() if not file.is_file()})
        if lost:
            raise CheckpointError(f"{folder} lacks files that its index lists: {some(lost)}; fetch the model again")
        return listed
    if single.is_file():
        with _open(single) as reader:
            return dict.fromkeys(reader.keys(), single)
    raise CheckpointError(
        f"{folder} has neither {INDEX} nor {single.name}; model.path must be a diffusers model folder"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name. Of a folder from elsewhere: its names may not lead out of it."""
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{index} is no JSON ({error}); fetch the model again") from error
    listed = described.get("weight_map") if isinstance(described, dict) else None
    if not isinstance(listed, dict):
        raise CheckpointError(f"{index} has no weight_map, which says what is in which file; fetch the model again")
    for name, file in listed.items():
        if not isinstance(file, str) or file != Path(file).name or "\0" in file or file == "..":
            raise CheckpointError(
                f"{index} names {file!r} as the file of {name}: not the name of a file in the same folder; get the model "
                "from where you trust it"
            )
    return listed


def _absent(targets: Mapping[str, Any], missing: Set[str], prefix: str) -> list[str]:
    """Names under a derived prefix; none unless every one of its keys is missing."""
    names = [name for name in targets if name.startswith(prefix)]
    return names if missing >= set(names) else []


def _misshapen(file: Path, targets: Mapping[str, Tensor | FlatPart]) -> list[str]:
    problems = []
    with _open(file) as reader:
        stored = set(reader.keys())
        for name, tensor in targets.items():
            if name not in stored:
                problems.append(f"listed in the index but not in {file.name}: {name}")
            elif list(shape := reader.get_slice(name).get_shape()) != list(tensor.shape):
                problems.append(f"shape {tuple(shape)} instead of {tuple(tensor.shape)}: {name}")
    return problems


def fill(target: Tensor | FlatPart, stored: Any) -> None:
    """Copy this process's elements out of a whole tensor, or out of what slices like one."""
    local = _local(target)
    if isinstance(target, FlatPart):
        _fill_flat(target, stored)
    elif not isinstance(target, DTensor):
        local.copy_(stored[...])
    elif local.numel():
        first = _first_row(target)
        local.copy_(stored[first : first + local.shape[0]])


def _fill_flat(part: FlatPart, stored: Any) -> None:
    """Read the rows that hold the part's elements, and no others."""
    length = part.local.numel()
    if not length:
        return
    row = math.prod(part.shape[1:])
    first, last = part.start // row, -(-(part.start + length) // row)
    elements = (stored[first:last] if part.shape else stored[...]).reshape(-1)
    part.local.copy_(elements[part.start - first * row :][:length])


def _first_row(tensor: DTensor) -> int:
    """Row of the whole tensor at which this rank's part begins; rows are dealt as torch.chunk does."""
    first, rows = 0, tensor.shape[0]
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "ranks outside the mesh hold no rows"
    for size, index, placement in zip(tensor.device_mesh.shape, coordinate, tensor.placements, strict=True):
        if placement.is_shard(0) and type(placement) is Shard:
            chunk = -(-rows // size)
            begin = min(chunk * index, rows)
            first, rows = first + begin, min(chunk, rows - begin)
        elif not placement.is_replicate():
            raise NotImplementedError(f"weights can be loaded into rows or copies of a tensor, not into {placement}")
    assert rows == tensor.to_local().shape[0]
    return first


def _local(tensor: Tensor | FlatPart) -> Tensor:
    if isinstance(tensor, FlatPart):
        return tensor.local
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch the model again") from error


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit the model:\n  " + some(problems, "\n  ", 20))


def some(items: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """The first `most` items, and how many more there are."""
    shown = separator.join(items[:most])
    return shown if len(items) <= most else f"{shown}{separator}and {len(items) - most} more"
