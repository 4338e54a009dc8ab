"""Where checkpoints lie: a folder that all ranks share, or an s3:// prefix. In both a checkpoint is complete or absent.

On disk a save goes to a folder .step_*.partial and one rename publishes it. An object store has no rename: files get
names that no earlier save used, and the certificate, put last, is what names them.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from data.s3 import READ_BUDGET_S
from trainer.saving import certificate as certificates
from trainer.saving import durable
from trainer.saving.certificate import Certificate, CheckpointError, UnknownFormatError
from trainer.saving.tensor_file import StagedFile

_FOLDER = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.replaced")
OWNER = "owner"
_log = logging.getLogger(__name__)

Listing = dict[str, dict[str, int]]
"""Checkpoint -> file -> size [bytes]; complete and incomplete ones."""


class CheckpointStore(Protocol):
    """url: the place as errors name it. A checkpoint is named step_<8 digits>. `attempt` is what `begin` returned for a
    save. Raises CheckpointError or DataError, naming the file or URL."""

    url: str

    def owner(self) -> str | None:
        """Id of the run whose checkpoints these are; None where no run has claimed the place."""

    def claim(self, run: str) -> None:
        """Write down whose place this is."""

    def listing(self) -> Listing:
        """What is there."""

    def text(self, name: str) -> str:
        """A checkpoint's certificate.json; CheckpointError where it has none."""

    def read_into(self, name: str, file: str, start: int, block: memoryview) -> None:
        """Fill `block` with the file's bytes from `start` on."""

    def begin(self, step: int) -> str:
        """Remove what killed saves and removals left behind and prepare a save of `step`. By rank 0, before any rank
        writes."""

    def write(self, attempt: str, rank: int, staged: StagedFile) -> str:
        """Write a rank's file so that it stays; its name in the certificate."""

    def publish(self, attempt: str, step: int, certificate: Certificate) -> str:
        """Make the save a checkpoint in one act, in place of an earlier one of that step; its name. By rank 0."""

    def remove(self, name: str) -> None:
        """Remove a checkpoint; an interruption leaves nothing that looks complete, and what it leaves goes with the next
        save."""


def open_store(where: str | Path, endpoint_url: str | None = None, budget_s: float = READ_BUDGET_S) -> CheckpointStore:
    """Store of a folder or an s3:// URL. Raises CheckpointError for other schemes."""
    text = str(where)
    if text.startswith("s3://"):
        from trainer.saving.checkpoint_s3 import S3Checkpoints

        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        return S3Checkpoints(bucket, prefix.strip("/"), endpoint_url, budget_s)
    if "://" in text:
        raise CheckpointError(f"{text}: checkpoints lie in a folder or below s3://; set checkpoint.dir to one of these")
    return LocalCheckpoints(Path(where))


def read(store: CheckpointStore, name: str) -> Certificate:
    """The certificate of a checkpoint. Raises like certificate.parse, and CheckpointError where there is none."""
    return certificates.parse(store.text(name), f"{store.url}/{name}/{certificates.NAME}")


def complete(store: CheckpointStore) -> Iterator[tuple[str, Certificate]]:
    """Complete checkpoints with their certificates, newest first; incomplete ones are passed over with a warning.

    Raises:
        UnknownFormatError: a newer version wrote one of them; going on from an older one would lose its work.
    """
    listing = store.listing()
    for name in newest_first(listing):
        try:
            yield name, checked(store, name, listing[name])
        except UnknownFormatError:
            raise
        except CheckpointError as error:
            _log.warning("passing over an incomplete checkpoint: %s", error)


def checked(store: CheckpointStore, name: str, files: Mapping[str, int]) -> Certificate:
    """The certificate of a checkpoint that `files` make complete; CheckpointError says what is missing."""
    if certificates.NAME not in files:
        raise CheckpointError(
            f"{store.url}/{name} is not a complete checkpoint: it has no {certificates.NAME} (an interrupted save, or a "
            "wrong name); use an earlier one"
        )
    certificate = read(store, name)
    certificates.check_files(dict(files), certificate, f"{store.url}/{name}")
    return certificate


def latest(store: CheckpointStore) -> str | None:
    """Name of the newest complete checkpoint, or None; see `complete`."""
    return next((name for name, _ in complete(store)), None)


def step_of(name: str) -> int:
    """Optimizer steps that a checkpoint's name says; ValueError for another name."""
    match = _FOLDER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no checkpoint's name")
    return int(match[1] or match[2])


def newest_first(names: Mapping[str, object]) -> list[str]:
    """Of two with the same step the published one comes first, the one that it was replacing second."""
    return sorted(names, key=lambda name: (step_of(name), not name.startswith(".")), reverse=True)


def named(step: int) -> str:
    return f"step_{step:08d}"


class LocalCheckpoints:
    """A folder on a file system that all ranks share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def owner(self) -> str | None:
        path = self.folder / OWNER
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def claim(self, run: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{OWNER}"
        temporary.write_text(run + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / OWNER)

    def listing(self) -> Listing:
        if not self.folder.is_dir():
            return {}
        found = {entry.name: entry for entry in self.folder.iterdir() if _FOLDER.fullmatch(entry.name)}
        return {name: _sizes(path) for name, path in found.items() if path.is_dir()}

    def text(self, name: str) -> str:
        path = self.folder / name / certificates.NAME
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): use an earlier checkpoint, or restore it"
            ) from error

    def read_into(self, name: str, file: str, start: int, block: memoryview) -> None:
        path = self.folder / name / file
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                while len(block) and (count := os.preadv(descriptor, [block], start)):
                    block, start = block[count:], start + count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}; use an earlier checkpoint") from error
        if len(block):
            raise CheckpointError(f"{path} is damaged (it ends early): use an earlier checkpoint, or restore the file")

    def begin(self, step: int) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        partial = self.folder / f".{named(step)}.partial"
        partial.mkdir()
        return partial.name

    def write(self, attempt: str, rank: int, staged: StagedFile) -> str:
        name = f"rank_{rank:05d}.safetensors"
        durable.write_file(self.folder / attempt / name, staged.pieces(), staged.size)
        return name

    def publish(self, attempt: str, step: int, certificate: Certificate) -> str:
        partial, published = self.folder / attempt, self.folder / named(step)
        certificates.check_files(_sizes(partial), certificate, str(partial))
        durable.write_text(partial / certificates.NAME, certificate.to_json())
        durable.sync_folder(partial)
        replaced = published.with_name(f".{published.name}.replaced")
        if published.exists():
            # A folder cannot be replaced in one act; set aside, it stays readable under its second name.
            if replaced.exists():
                shutil.rmtree(replaced)
            published.rename(replaced)
        partial.rename(published)
        durable.sync_folder(self.folder)
        if replaced.exists():
            self.remove(replaced.name)
        return published.name

    def remove(self, name: str) -> None:
        folder = self.folder / name
        # Out of sight in one act; what an interruption leaves of it, the next save removes.
        doomed = self.folder / f".{named(step_of(name))}.removed.partial"
        try:
            folder.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            _log.warning("cannot remove the old checkpoint %s (%s): remove it before the disk fills", folder, error)


def _sizes(folder: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
