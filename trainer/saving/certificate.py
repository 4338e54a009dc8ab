"""The certificate of a checkpoint: written last, it says what every file holds; without it nothing is a checkpoint.

A checkpoint is a folder (or an s3:// prefix) step_<8 digits> with certificate.json and safetensors files of flat 1-D
ranges. Where it lies is trainer/saving/checkpoint_store.py's business.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

FORMAT = 2
"""2 numbers the files of a range and leaves its key out, since that is group/name; 1 wrote both out."""
OLDEST = 1
NAME = "certificate.json"
CONFIG = "config"
"""Metadata of a checkpoint: the run's resolved configuration, secrets redacted."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and the remedy."""


class UnknownFormatError(CheckpointError):
    """The checkpoint was written by a version of this program with another format."""


@dataclass(frozen=True)
class Range:
    """Elements [start, start + length) of a flattened tensor are the whole 1-D tensor `key` of `file`."""

    file: str
    key: str
    start: int
    length: int


@dataclass(frozen=True)
class SavedTensor:
    """shape of the whole tensor (flattened row-major); dtype as torch names it, without "torch."."""

    shape: tuple[int, ...]
    dtype: str
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Certificate:
    """step: optimizer steps done; counters: scalars of the state; metadata: what the run wrote about itself (config
    digest, code revision, data order, engine, world size, versions); files: name -> size [bytes]; tensors: group ->
    name -> where its elements are."""

    step: int
    counters: dict[str, float]
    metadata: dict[str, Any]
    files: dict[str, int]
    tensors: dict[str, dict[str, SavedTensor]]

    def to_json(self) -> str:
        """In format 2. The keys of all ranges must be their tensor's group/name."""
        number = {name: index for index, name in enumerate(self.files)}
        tensors: dict[str, dict[str, Any]] = {}
        for group, named in self.tensors.items():
            for name, saved in named.items():
                assert all(part.key == f"{group}/{name}" for part in saved.ranges), "a range under another key"
                ranges = [[number[part.file], part.start, part.length] for part in saved.ranges]
                tensors.setdefault(group, {})[name] = {"shape": saved.shape, "dtype": saved.dtype, "ranges": ranges}
        head = {"format": FORMAT, "step": self.step, "counters": self.counters, "metadata": self.metadata}
        return json.dumps({**head, "files": self.files, "tensors": tensors}, separators=(",", ":"))


def parse(text: str, where: str) -> Certificate:
    """The certificate that `text` holds; `where` it was read is for messages.

    Raises:
        UnknownFormatError: written by a version with another format. CheckpointError: damaged.
    """
    try:
        content = json.loads(text)
        number = int(content["format"])
        if not OLDEST <= number <= FORMAT:
            raise UnknownFormatError(_other_version(number, content, where))
        files = {str(name): int(size) for name, size in content["files"].items()}
        if any(PurePosixPath(name).name != name or name == ".." for name in files):
            raise ValueError("a file name with a folder")
        read = _saved_tensor_1 if number == 1 else _saved_tensor_2
        names = list(files)
        tensors = {
            group: {name: read(saved, names, f"{group}/{name}") for name, saved in named.items()}
            for group, named in content["tensors"].items()
        }
        return Certificate(int(content["step"]), content["counters"], content["metadata"], files, tensors)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{where} is damaged ({error!r}): remove that checkpoint, or restore it from a copy"
        ) from error


def _other_version(number: int, content: dict[str, Any], where: str) -> str:
    metadata = content.get("metadata", {})
    versions = metadata.get("versions", {})
    wrote = f"code revision {metadata.get('code_revision', 'unknown')}, versions {versions}"
    return (
        f"{where} has checkpoint format {number}, this version reads {OLDEST} to {FORMAT}: open the run with the version "
        f"that wrote it ({wrote})"
    )


def _saved_tensor_1(saved: dict[str, Any], files: list[str], key: str) -> SavedTensor:
    return _saved(saved, tuple(Range(**part) for part in saved["ranges"]), files)


def _saved_tensor_2(saved: dict[str, Any], files: list[str], key: str) -> SavedTensor:
    ranges = tuple(Range(files[number], key, start, length) for number, start, length in saved["ranges"])
    return _saved(saved, ranges, files)


def _saved(saved: dict[str, Any], ranges: tuple[Range, ...], files: list[str]) -> SavedTensor:
    known = set(files)
    if any(part.file not in known or part.start < 0 or part.length < 0 for part in ranges):
        raise ValueError("a range outside the files")
    return SavedTensor(tuple(saved["shape"]), str(saved["dtype"]), ranges)


def check_files(found: dict[str, int], certificate: Certificate, where: str) -> None:
    """Every file is among those found, with its size; CheckpointError names the first that is not."""
    for name, size in certificate.files.items():
        if found.get(name) != size:
            state = "is missing" if name not in found else f"has {found[name]} bytes"
            raise CheckpointError(
                f"{where}/{name} {state} where the certificate says {size} bytes: use an earlier checkpoint or restore "
                "the file"
            )


def check_coverage(certificate: Certificate) -> None:
    """Every tensor's elements are there exactly once; CheckpointError names the first where they are not."""
    for group, named in certificate.tensors.items():
        for name, saved in named.items():
            reached = 0
            for part in sorted(saved.ranges, key=lambda part: part.start):
                if part.start != reached:
                    break
                reached += part.length
            if reached != math.prod(saved.shape) or reached != sum(part.length for part in saved.ranges):
                raise CheckpointError(f"the ranks' parts of {group}/{name} {saved.shape} leave gaps or overlap")
