"""Files in the run's folder that say which samples it saw: replaced ones always, all of them on request.

replacements.jsonl                    step, row, shard, key, offset, stand_in, reason of every sample that could not be
                                      decoded; without those of steps that a resumed run takes again
samples/step_<first>_rank_<n>.jsonl   with tracking.samples: step, rows, own_epochs, shards, keys of every step trained
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch.distributed as dist

from data.batch import Batch, Replacement

REPLACEMENTS = "replacements.jsonl"
SAMPLES = "samples"
_MOST = 10_000
"""Entries of replacements.jsonl; a set that is bad beyond this is counted on (data.max_bad_samples) but not listed."""
log = logging.getLogger(__name__)


class Ledger:
    """replacements.jsonl of a run; rank 0 writes it, all ranks call `add`. step: at which the run goes on."""

    def __init__(self, folder: Path, step: int, most: int = _MOST) -> None:
        self._path, self._most, self._entries = folder / REPLACEMENTS, most, 0
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        if self._rank == 0 and self._path.exists():
            kept = [line for line in self._path.read_text(encoding="utf-8").splitlines() if _before(line, step)]
            partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            partial.replace(self._path)
            self._entries = len(kept)

    def add(self, step: int, replaced: Sequence[Replacement]) -> None:
        """Write what all ranks replaced in `step`. A collective: called where any rank replaced something."""
        everything: list[Sequence[Replacement]] = [replaced]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everything = [()] * dist.get_world_size()
            dist.gather_object(replaced, everything if self._rank == 0 else None, dst=0)
        if self._rank:
            return
        found = sorted((entry for part in everything for entry in part), key=lambda entry: entry.row)
        room = max(self._most - self._entries, 0)
        self._entries += len(found)
        lines = [json.dumps({"step": step, **entry._asdict()}, ensure_ascii=False) for entry in found[:room]]
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            log.warning("%s cannot be written (%s); step %d replaced: %s", self._path, error, step, "; ".join(lines))
        if self._entries - len(found) <= self._most < self._entries:
            log.warning("%s holds %d samples; more are counted, but no longer listed", self._path, self._most)


def _before(line: str, step: int) -> bool:
    """Whether a line belongs to a step before `step`; a line that a killed process left unfinished does not."""
    try:
        return int(json.loads(line)["step"]) < step
    except (ValueError, KeyError, TypeError):
        return False


class SampleLog:
    """samples/ of a run: what this rank trained on, written after each step. step: at which the run goes on."""

    def __init__(self, folder: Path, rank: int, step: int) -> None:
        path = folder / SAMPLES / f"step_{step:08d}_rank_{rank:05d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        self._full = False
        self._file: IO[str] = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (lives as long as the run)

    def add(self, batch: Batch) -> None:
        """Record the samples of a step that was trained."""
        content = {
            "step": batch.step,
            "rows": batch.rows.tolist(),
            "own_epochs": batch.own_epochs,
            "shards": batch.shards,
            "keys": batch.keys,
        }
        if self._full:
            return
        try:
            self._file.write(json.dumps(content, ensure_ascii=False) + "\n")
        except OSError as error:  # training is worth more than its record
            self._full = True
            log.warning("%s ends at step %d: %s; free space and start again", self._file.name, batch.step, error)
