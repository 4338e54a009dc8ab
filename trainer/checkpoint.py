"""Sharded checkpoints, complete or absent (law 6): every rank writes its ranges, one rename publishes them.

Staging (copies to host buffers that are allocated once) is separate from writing, and the collectives run on a gloo
group of their own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.schema import Checkpoint as CheckpointOptions
from trainer import certificate as certificates
from trainer import durable
from trainer.certificate import Certificate, CheckpointError, Range, SavedTensor
from trainer.engines.engine import Engine, TensorPart

SECONDS = "training_seconds"
BAD_SAMPLES = "bad_samples_in_epoch"
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run has come. step: optimizer steps done; seconds: spent on them; bad_samples: replaced samples among
    those of the last step's epoch, on all ranks."""

    step: int
    seconds: float
    bad_samples: int = 0


class Checkpoints:
    """The checkpoints of one run, in one folder that all ranks share.

    metadata: JSON values about the run, written into every certificate; rank 0's are. timeout_s: longest wait for
    another rank's writing. save, resume, write and read are collective: all ranks call them, and all raise where one
    fails. Works without a process group too, as a world of one.
    """

    def __init__(
        self, folder: Path, options: CheckpointOptions, metadata: Mapping[str, Any], timeout_s: float = 3600.0
    ) -> None:
        if options.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last is {options.keep_last}; at least 1 must stay to resume from")
        self._folder, self._keep_last, self._metadata = folder, options.keep_last, metadata
        self._rank, self._ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self._ranks > 1 else None
        self._staged: dict[str, Tensor] = {}
        self._step: int | None = None

    def save(self, engine: Engine, step: int, seconds: float, bad_samples: int = 0) -> None:
        """Publish the engine's state after `step` steps, unless this process has saved or loaded that very state."""
        if step != self._step:
            self.write(step, engine.parts(), {**engine.counters(), SECONDS: seconds, BAD_SAMPLES: bad_samples})
            self._step = step

    def resume(self, engine: Engine) -> Progress:
        """Fill the engine from the newest complete checkpoint, the one that rank 0 sees; from none, start at 0."""
        folder = self._from_rank_0(self._together(self.latest_path))
        if folder is None:
            return Progress(0, 0.0)
        certificate = self.read(folder, engine.parts())
        engine.load_counters(certificate.counters)
        self._step = certificate.step
        counters = certificate.counters
        return Progress(certificate.step, counters.get(SECONDS, 0.0), int(counters.get(BAD_SAMPLES, 0)))

    def latest_path(self) -> Path | None:
        """The newest complete checkpoint that this process sees."""
        return certificates.latest(self._folder)

    def write(self, step: int, parts: Iterable[TensorPart], counters: Mapping[str, float]) -> Path:
        """Write and publish the checkpoint of `step`, then remove older ones; the published folder.

        A write that fails or is killed leaves the earlier checkpoint in force.

        Raises:
            CheckpointError: on all ranks, naming the rank, the file and the remedy.
        """
        published = self._folder / f"step_{step:08d}"
        partial = published.with_name(f".{published.name}.partial")
        self._together(lambda: self._prepare(partial))
        path = partial / f"rank_{self._rank:05d}.safetensors"
        own = self._together(lambda: self._write(path, parts))
        written = self._gather(own)
        self._together(lambda: self._publish(published, partial, step, counters, written) if written else None)
        return published

    def read(self, folder: Path, parts: Iterable[TensorPart]) -> Certificate:
        """Fill the local views of `parts` from whatever ranges the files hold, at any number of ranks.

        Each rank reads only its own elements. In the groups asked for, names, shapes and dtypes must be the saved ones.

        Raises:
            CheckpointError: on all ranks, naming the rank, the file or tensor and the remedy.
        """
        return self._together(lambda: _read_parts(folder, list(parts)))

    def _together(self, action: Callable[[], _T]) -> _T:
        """Do something on every rank; its own result, or one and the same error on all."""
        message, result, cause = "", None, None
        try:
            result = action()
        except Exception as error:  # whatever it is, the others must not wait for this rank: they raise it too
            message, cause = str(error) if isinstance(error, CheckpointError) else repr(error), error
        messages = [message]
        if self._group is not None:
            messages = [""] * self._ranks
            dist.all_gather_object(messages, message, group=self._group)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(messages) if text]
        if failed:
            more = f" (and {len(failed) - 3} more ranks)" if len(failed) > 3 else ""
            raise CheckpointError("; ".join(failed[:3]) + more) from cause
        return cast(_T, result)

    def _gather(self, own: _T) -> list[_T]:
        """What every rank holds, on rank 0; empty elsewhere."""
        if self._group is None:
            return [own]
        everything: list[Any] = [None] * self._ranks if self._rank == 0 else []
        dist.gather_object(own, everything if self._rank == 0 else None, dst=0, group=self._group)
        return everything

    def _from_rank_0(self, value: _T) -> _T:
        box = [value]
        if self._group is not None:
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _remove(self, folder: Path) -> None:
        """Certificate first, so that an interruption leaves nothing that looks complete."""
        try:
            (folder / certificates.NAME).unlink(missing_ok=True)
            shutil.rmtree(folder)
        except OSError as error:
            _log.warning("cannot remove the old checkpoint %s (%s): remove it before the disk fills", folder, error)

    def _prepare(self, partial: Path) -> None:
        if self._rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".step_*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir()

    def _write(self, path: Path, parts: Iterable[TensorPart]) -> list[tuple[str, str, SavedTensor]]:
        """Stage and write this rank's ranges; (group, name, tensor) of each."""
        own = [part for part in parts if part.owned and (part.local.numel() or part.start == 0)]
        staged = self._stage([part for part in own if part.local.numel()])
        if staged:
            durable.save_tensors(staged, path)
        return [(part.group, part.name, _describe(part, path.name)) for part in own]

    def _stage(self, parts: list[TensorPart]) -> dict[str, Tensor]:
        """Copy the parts into this rank's host buffers; pinned, and copied side by side, where they come from a GPU."""
        staged: dict[str, Tensor] = {}
        for part in parts:
            key = _key(part)
            buffer = self._staged.get(key)
            if buffer is None or buffer.shape != part.local.shape or buffer.dtype != part.local.dtype:
                pinned = part.local.device.type == "cuda"
                buffer = torch.empty(part.local.shape, dtype=part.local.dtype, pin_memory=pinned)
            staged[key] = buffer.copy_(part.local, non_blocking=True)
        if any(part.local.device.type == "cuda" for part in parts):
            torch.cuda.synchronize()
        self._staged = staged
        return staged

    def _publish(
        self,
        published: Path,
        partial: Path,
        step: int,
        counters: Mapping[str, float],
        written: list[list[tuple[str, str, SavedTensor]]],
    ) -> None:
        """Rank 0: certificate, one rename, then retention."""
        files = {path.name: path.stat().st_size for path in sorted(partial.glob("*.safetensors"))}
        certificate = Certificate(step, dict(counters), dict(self._metadata), files, _merge(written))
        certificates.check_coverage(certificate)
        durable.write_text(partial / certificates.NAME, certificate.to_json())
        durable.sync_folder(partial)
        replaced = published.with_name(f".{published.name}.replaced")
        if published.exists():
            # A folder cannot be replaced in one act; set aside, it stays readable under its second name.
            if replaced.exists():
                shutil.rmtree(replaced)
            published.rename(replaced)
        partial.rename(published)
        durable.sync_folder(self._folder)
        if replaced.exists():
            self._remove(replaced)
        for old in list(certificates.complete(self._folder))[self._keep_last :]:
            self._remove(old)


def _key(part: TensorPart) -> str:
    return f"{part.group}/{part.name}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(part: TensorPart, file: str) -> SavedTensor:
    length = part.local.numel()
    ranges = (Range(file, _key(part), part.start, length),) if length else ()
    return SavedTensor(tuple(part.shape), _dtype(part.local), ranges)


def _merge(written: list[list[tuple[str, str, SavedTensor]]]) -> dict[str, dict[str, SavedTensor]]:
    """All ranks' ranges by group and name."""
    merged: dict[str, dict[str, SavedTensor]] = {}
    for of_rank in written:
        for group, name, saved in of_rank:
            named = merged.setdefault(group, {})
            before = named[name].ranges if name in named else ()
            named[name] = SavedTensor(saved.shape, saved.dtype, before + saved.ranges)
    return merged


def _read_parts(folder: Path, parts: list[TensorPart]) -> Certificate:
    certificate = certificates.read(folder)
    certificates.check_files(folder, certificate)
    _check_names(folder, certificate, parts)
    with contextlib.ExitStack() as opened:
        files: dict[str, Any] = {}
        for part in parts:
            filled = 0
            for saved in certificate.tensors[part.group][part.name].ranges:
                begin = max(part.start, saved.start)
                end = min(part.start + part.local.numel(), saved.start + saved.length)
                if begin >= end:
                    continue
                if saved.file not in files:
                    files[saved.file] = opened.enter_context(_open(folder / saved.file))
                elements = files[saved.file].get_slice(saved.key)[begin - saved.start : end - saved.start]
                part.local[begin - part.start : end - part.start].copy_(elements)
                filled += end - begin
            if filled != part.local.numel():
                raise CheckpointError(f"{folder} lacks elements of {_key(part)}: its certificate is damaged")
    return certificate


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): use an earlier checkpoint, or restore the file") from error


def _check_names(folder: Path, certificate: Certificate, parts: list[TensorPart]) -> None:
    wanted = {(part.group, part.name): part for part in parts}
    groups = {group for group, _ in wanted}
    saved = {(group, name) for group in groups for name in certificate.tensors.get(group, {})}
    if saved != wanted.keys():
        missing, unexpected = sorted(wanted.keys() - saved), sorted(saved - wanted.keys())
        raise CheckpointError(
            f"{folder} holds other tensors than this run: {len(missing)} missing {missing[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}. Resume with the model, adapters and optimizer that the run was started with"
        )
    for (group, name), part in wanted.items():
        there = certificate.tensors[group][name]
        if there.shape != tuple(part.shape) or there.dtype != _dtype(part.local):
            raise CheckpointError(
                f"{group}/{name} is {there.dtype} {there.shape} in {folder} and {_dtype(part.local)} "
                f"{tuple(part.shape)} in this run: resume with the model that the run was started with"
            )
        assert math.prod(part.shape) >= part.start + part.local.numel(), "a part outside its tensor"
