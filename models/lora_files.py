"""Adapters as the file that `pipe.load_lora_weights` reads, and merged into the base model.

For an export (trainer/initial_weights.py restores a run's checkpoint into a backbone): `save(folder, state, options)`
writes the adapters alone, `merge(state, base, options)` gives the weights of a model without adapters. state: tensors by
parameter name, adapters among them (`Engine.full_state`, or the groups `parameter` and `ema` of a checkpoint, whose names
are the same).

Adapters of the variant single_time mean something to every pipeline of the base model; those of second_embedding need
the transformer with two times, so they are for going on (init_from) or for merging.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import Lora
from models.lora import ONLINE, Adapters, alpha
from models.weights import CheckpointError

FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""
PREFIX = "transformer."
_DIFFUSERS, _OURS = "lora_adapter_metadata", "twinflow_lora"
"""Entries of the file's header: peft's configuration as diffusers writes it, and ours."""
_OTHER_SCALES = ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora")
"""Of peft's configuration: what computes something else than alpha / rank B A, the same alpha and rank in every layer."""
_BASE = "frozen_base"
"""Within ours."""


@dataclass(frozen=True)
class SavedAdapters:
    """tensors: by parameter name; options: rank, alpha and variant (in files of others as their tensors show it); base:
    the fingerprint of the weights that they were trained on (trainer/saving/unsaved_weights.py), None in files of others."""

    tensors: dict[str, Tensor]
    options: Lora
    base: list[float] | None = None


def save(folder: str | Path, state: Mapping[str, Tensor], options: Lora, base: Sequence[float] | None = None) -> Path:
    """Write the adapters among `state`, in their dtype; the file, there complete or not at all.

    base: the fingerprint of the weights that they were trained on.

    Raises:
        FileExistsError: the file exists. ValueError: no adapters.
    """
    file = Path(folder) / FILE
    if file.exists():
        raise FileExistsError(f"{file} exists; choose another folder or remove it")
    tensors = {_diffusers_name(name): state[name].detach().contiguous() for name in state if Adapters.holds(name)}
    if not tensors:
        raise ValueError("there are no adapters to save: the model was trained in full (lora.rank null)")
    assert options.rank is not None
    layers = sorted({name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors})
    described = {"r": options.rank, "lora_alpha": alpha(options), "target_modules": layers}
    header = {
        "format": "pt",
        _DIFFUSERS: json.dumps({f"{PREFIX}{key}": value for key, value in described.items()}, sort_keys=True),
        _OURS: json.dumps({"variant": options.variant} | ({} if base is None else {_BASE: list(base)})),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, partial, metadata=header)
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def read(path: str | Path) -> SavedAdapters:
    """Adapters of a file, or of a folder that holds FILE, as `save` or diffusers wrote them.

    Raises:
        CheckpointError: no such file, not readable, other tensors than the adapters of a transformer, or adapters that are
        not all scaled by alpha / rank.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        with safe_open(file, framework="pt", device="cpu") as reader:
            header = reader.metadata() or {}
            tensors = {_our_name(name): reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as adapters ({error}); name a .safetensors file") from error
    foreign = [name for name in tensors if not Adapters.holds(name)]
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    if foreign or len(ranks) != 1:
        what = f"tensors like {foreign[0]}" if foreign else f"adapters of ranks {sorted(ranks)}"
        raise CheckpointError(f"{file} holds {what}; it must hold the adapters of one rank of a diffusers transformer")
    rank = ranks.pop()
    scaled = _alpha(file, _entry(file, header, _DIFFUSERS), rank)
    two_times = any(re.search(r"embed(der)?_2\.", name) for name in tensors)
    of_others = "second_embedding" if two_times else "single_time"
    ours = _entry(file, header, _OURS)
    options = Lora(rank=rank, alpha=scaled, variant=ours.get("variant", of_others))
    return SavedAdapters(tensors, options, ours.get(_BASE))


def _entry(file: Path, header: Mapping[str, str], key: str) -> dict[str, Any]:
    """A JSON object of the header; empty where it is not there."""
    try:
        found = json.loads(header.get(key, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{file}: its header's {key} is no JSON ({error}); fetch or export it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: its header's {key} is no JSON object; fetch or export it again")
    return found


def _alpha(file: Path, described: Mapping[str, Any], rank: int) -> int:
    """The alpha of adapters that are all scaled by alpha / rank; without a word on it the rank, as diffusers has it."""
    other = [key for key in _OTHER_SCALES if described.get(f"{PREFIX}{key}")]
    given = described.get(f"{PREFIX}lora_alpha", rank)
    if other or not isinstance(given, int | float) or not float(given).is_integer():
        what = other[0] if other else f"lora_alpha {given}"
        raise CheckpointError(
            f"{file} is of adapters with {what}; here all of them have one scale, lora.alpha / lora.rank, of whole numbers. "
            "Merge them in diffusers (pipe.load_lora_weights, pipe.fuse_lora, pipe.unload_lora_weights, "
            "pipe.save_pretrained) and set init_from.path to that folder"
        )
    return int(given)


@torch.no_grad()
def merge(state: Mapping[str, Tensor], base: Mapping[str, Tensor], options: Lora) -> dict[str, Tensor]:
    """The base weights (by their names in a model without adapters) with alpha / rank B A added, in their dtypes.

    Computed in float32, in float64 for float64 weights. Only adapted weights are new tensors. The result computes what
    adapters and base compute; of the variant single_time it is still to be asked at t - r/2 in place of t.

    Raises:
        KeyError: an adapter for a weight that the base has not.
    """
    merged = dict(base)
    for name, first in state.items():
        if Adapters.holds(name) and ".lora_A." in name:
            plain = name.replace(f".lora_A.{ONLINE}.", ".")
            wide = torch.promote_types(base[plain].dtype, torch.float32)
            second = state[name.replace(".lora_A.", ".lora_B.")]
            added = alpha(options) / len(first) * (second.to(wide) @ first.to(wide))
            merged[plain] = (base[plain].to(wide) + added).to(base[plain].dtype)
    return merged


def _diffusers_name(name: str) -> str:
    return PREFIX + name.replace(f".{ONLINE}.weight", ".weight")


def _our_name(name: str) -> str:
    name = name.removeprefix(PREFIX)
    return name if Adapters.holds(name) else name.removesuffix("weight") + f"{ONLINE}.weight"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
