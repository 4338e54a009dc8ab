"""Files that are on the disk when the call returns."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from trainer.saving.certificate import CheckpointError


def write_file(path: Path, pieces: Iterable[memoryview | bytes], size: int) -> None:
    """Write a new file of `size` bytes down to the disk; CheckpointError names the file, and a full disk with its
    figures."""
    try:
        with path.open("xb", buffering=0) as file:
            for piece in pieces:
                write_all(file.fileno(), memoryview(piece))
            os.fsync(file.fileno())
    except OSError as error:
        raise _explained(error, path, size) from error


def write_all(descriptor: int, piece: memoryview) -> None:
    """All bytes of one piece; the system may take fewer at a time."""
    while len(piece):
        piece = piece[os.write(descriptor, piece) :]


def write_text(path: Path, text: str) -> None:
    """Write a text file down to the disk; raises like write_file."""
    encoded = text.encode()
    write_file(path, [encoded], len(encoded))


def _explained(error: OSError, path: Path, needed: int) -> CheckpointError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"cannot write {path}: {error}; the earlier checkpoint stays in force")
    free = shutil.disk_usage(path.parent).free
    return CheckpointError(
        f"the disk is full: {path} needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free. The earlier checkpoint "
        "stays in force; free space, lower checkpoint.keep_last, or set checkpoint.dir to a larger disk"
    )


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
