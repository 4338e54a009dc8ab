"""Files that are on the disk when the call returns."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.certificate import CheckpointError


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file down to the disk; CheckpointError names the file, and a full disk with its figures."""
    try:
        save_file(tensors, path)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise _explained(error, path, needed) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file down to the disk; raises like save_tensors."""
    try:
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _explained(error, path, len(text)) from error


def _explained(error: Exception, path: Path, needed: int) -> CheckpointError:
    # safetensors reports the operating system's errors as text.
    if getattr(error, "errno", None) != errno.ENOSPC and f"os error {errno.ENOSPC}" not in str(error):
        return CheckpointError(f"cannot write {path}: {error}; the earlier checkpoint stays in force")
    free = shutil.disk_usage(path.parent).free
    return CheckpointError(
        f"the disk is full: {path} needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free. The earlier checkpoint "
        "stays in force; free space, lower checkpoint.keep_last, or set run.dir to a larger disk"
    )


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
