"""What is in a checkpoint, tensor by tensor: is all of it readable and finite, and how far are two of them apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.engines.engine import TensorPart
from trainer.sameness import relative
from trainer.saving import certificate as certificates
from trainer.saving.certificate import CheckpointError
from trainer.saving.checkpoint_reader import CheckpointReader
from trainer.saving.tensor_file import as_dtype

CHUNK = 4 << 20
"""Elements held at a time."""


@dataclass(frozen=True)
class Difference:
    """Of tensor group/name in two checkpoints. error: of law 9 within b's group (trainer/sameness.py); largest: maximum
    of |a - b|."""

    group: str
    name: str
    error: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    """only: group/name (and shape) of what one of the two has alone, by side; differences: of what both have."""

    only: tuple[list[str], list[str]]
    differences: list[Difference]

    def within(self, bound: float) -> bool:
        return not any(self.only) and all(found.error <= bound for found in self.differences)


def flaws(reader: CheckpointReader) -> Iterator[tuple[str, str]]:
    """(group/name, what is wrong or empty) of every tensor, in order; a tensor that cannot be read is a flaw, too.

    Raises:
        CheckpointError: the ranks' parts leave gaps or overlap.
    """
    certificates.check_coverage(reader.certificate)
    for group, named in reader.certificate.tensors.items():
        for name in named:
            yield f"{group}/{name}", _flaw(reader, group, name)


def _flaw(reader: CheckpointReader, group: str, name: str) -> str:
    try:
        bad = sum(int((~torch.isfinite(chunk)).sum()) for chunk in chunks(reader, group, name))
    except CheckpointError as error:
        return str(error)
    return f"{bad} elements are not finite" if bad else ""


def chunks(reader: CheckpointReader, group: str, name: str) -> Iterator[Tensor]:
    """The flattened tensor in pieces of CHUNK elements."""
    saved = reader.certificate.tensors[group][name]
    dtype, total = as_dtype(saved.dtype, reader.url), math.prod(saved.shape)
    for start in range(0, total, CHUNK):
        local = torch.empty(min(CHUNK, total - start), dtype=dtype)
        reader.fill([TensorPart(group, name, saved.shape, start, local)])
        yield local


def compare(first: CheckpointReader, second: CheckpointReader) -> Comparison:
    """Measure every tensor that both hold in one shape."""
    names = [_names(first), _names(second)]
    both = sorted(names[0].keys() & names[1].keys())
    only = tuple(sorted(names[side][key] for key in names[side].keys() - names[1 - side].keys()) for side in (0, 1))
    norms: dict[str, float] = {}
    measured: list[tuple[str, str, float, float, float]] = []
    for group, name, _ in both:
        distance, norm, largest = _measure(first, second, group, name)
        norms[group] = norms.get(group, 0.0) + norm**2
        measured.append((group, name, distance, norm, largest))
    differences = []
    for group, name, distance, norm, largest in measured:
        error = relative(distance, norm, math.sqrt(norms[group]))
        differences.append(Difference(group, name, error, largest))
    return Comparison((only[0], only[1]), differences)


def _names(reader: CheckpointReader) -> dict[tuple[str, str, tuple[int, ...]], str]:
    return {
        (group, name, saved.shape): f"{group}/{name} {list(saved.shape)}"
        for group, named in reader.certificate.tensors.items()
        for name, saved in named.items()
    }


def _measure(first: CheckpointReader, second: CheckpointReader, group: str, name: str) -> tuple[float, float, float]:
    """||a - b||, ||b||, maximum of |a - b|."""
    distance = norm = largest = 0.0
    for a, b in itertools.zip_longest(chunks(first, group, name), chunks(second, group, name)):
        other = b.double()
        apart = (a.double() - other).abs()
        distance += float(apart.square().sum())
        norm += float(other.square().sum())
        largest = max(largest, float(apart.max().nan_to_num(math.inf)))
    return math.sqrt(distance), math.sqrt(norm), largest
