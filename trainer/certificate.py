"""The certificate of a checkpoint: written last, it says what every file holds; without it nothing is a checkpoint.

A checkpoint is a folder step_<8 digits> among the checkpoints of a run, with certificate.json and safetensors files of
flat 1-D ranges. Folders whose name starts with a dot are being written or replaced.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "certificate.json"
_FOLDER = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.replaced")
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and the remedy."""


class UnknownFormatError(CheckpointError):
    """The checkpoint was written by a newer version of this program."""


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
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def read(folder: Path) -> Certificate:
    """The certificate in a checkpoint folder.

    Raises:
        UnknownFormatError: written by a newer version. CheckpointError: absent or damaged.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text())
        if content["format"] > FORMAT:
            raise UnknownFormatError(
                f"{path} has checkpoint format {content['format']}, this version reads up to {FORMAT}: open the run "
                f"with the version that wrote it ({content.get('metadata', {})})"
            )
        tensors = {
            group: {name: _saved_tensor(saved) for name, saved in named.items()}
            for group, named in content["tensors"].items()
        }
        files = {str(name): int(size) for name, size in content["files"].items()}
        if any(Path(name).name != name for name in files):
            raise ValueError("a file name with a folder")
        return Certificate(int(content["step"]), content["counters"], content["metadata"], files, tensors)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {NAME} (an interrupted save); use an earlier one"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): remove {folder} or restore it from a copy") from error


def _saved_tensor(saved: dict[str, Any]) -> SavedTensor:
    ranges = tuple(Range(**part) for part in saved["ranges"])
    return SavedTensor(tuple(saved["shape"]), saved["dtype"], ranges)


def check_files(folder: Path, certificate: Certificate) -> None:
    """Every file exists with its size; CheckpointError names the first that does not."""
    for name, size in certificate.files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"{path} {state} where the certificate says {size} bytes: use an earlier checkpoint or restore the file"
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


def complete(checkpoints: Path) -> Iterator[Path]:
    """Complete checkpoints in a folder, newest first; incomplete ones are passed over with a warning.

    Raises:
        UnknownFormatError: a newer version wrote one of them; going on from an older one would lose its work.
    """
    found = [(match, path) for path in checkpoints.glob("*") if (match := _FOLDER.fullmatch(path.name))]
    # Of two with the same step the published one comes first, the one that it was replacing second.
    ordered = sorted(found, key=lambda item: (int(item[0][1] or item[0][2]), item[0][1] is not None), reverse=True)
    for _, path in ordered:
        try:
            check_files(path, read(path))
        except UnknownFormatError:
            raise
        except CheckpointError as error:
            _log.warning("passing over an incomplete checkpoint: %s", error)
            continue
        yield path


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None; see `complete`."""
    return next(complete(checkpoints), None)
