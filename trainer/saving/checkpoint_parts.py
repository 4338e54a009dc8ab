"""What ranks say about the tensors that they hold, and whether a checkpoint holds the tensors that a run wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.engines.engine import TensorPart
from trainer.saving.certificate import Certificate, CheckpointError, Range, SavedTensor
from trainer.saving.tensor_file import key


@dataclass(frozen=True)
class Described:
    """One rank's elements of a tensor."""

    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    length: int


@dataclass(frozen=True)
class Written:
    """What a rank wrote: its file (none without elements), the file's bytes, and what is in it."""

    file: str | None
    size: int
    tensors: list[Described]


def describe(part: TensorPart) -> Described:
    """This rank's elements of a tensor."""
    dtype = str(part.local.dtype).removeprefix("torch.")
    return Described(part.group, part.name, tuple(part.shape), dtype, part.start, part.local.numel())


def merge(written: Sequence[Written]) -> dict[str, dict[str, SavedTensor]]:
    """All ranks' ranges by group and name."""
    found: dict[tuple[str, str], tuple[Described, list[Range]]] = {}
    for of_rank in written:
        for part in of_rank.tensors:
            ranges = found.setdefault((part.group, part.name), (part, []))[1]
            if part.length and of_rank.file is not None:
                ranges.append(Range(of_rank.file, f"{part.group}/{part.name}", part.start, part.length))
    merged: dict[str, dict[str, SavedTensor]] = {}
    for (group, name), (part, ranges) in found.items():
        merged.setdefault(group, {})[name] = SavedTensor(part.shape, part.dtype, tuple(ranges))
    return merged


def check_names(where: str, certificate: Certificate, parts: Sequence[TensorPart]) -> None:
    """CheckpointError where, in the groups of `parts`, names, shapes or dtypes are not the saved ones."""
    wanted = {(part.group, part.name): part for part in parts}
    groups = {group for group, _ in wanted}
    saved = {(group, name) for group in groups for name in certificate.tensors.get(group, {})}
    if saved != wanted.keys():
        missing, unexpected = sorted(wanted.keys() - saved), sorted(saved - wanted.keys())
        raise CheckpointError(
            f"{where} holds other tensors than this run: {len(missing)} missing {missing[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}. Resume with the model, adapters and optimizer that the run was started with"
        )
    for (group, name), part in wanted.items():
        there, here = certificate.tensors[group][name], describe(part)
        if (there.shape, there.dtype) != (here.shape, here.dtype):
            raise CheckpointError(
                f"{key(part)} is {there.dtype} {there.shape} in {where} and {here.dtype} {here.shape} in this run: "
                "resume with the model that the run was started with"
            )
        assert math.prod(part.shape) >= part.start + part.local.numel(), "a part outside its tensor"
