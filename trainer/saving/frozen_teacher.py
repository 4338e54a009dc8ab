"""A frozen teacher is no part of a checkpoint: it is the weights that the run started with, loaded again at every start.

Their fingerprint is in every certificate, so that another model in the same folder cannot become the teacher unnoticed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from trainer.engines.engine import TensorPart
from trainer.saving.certificate import CheckpointError

KEY = "frozen_teacher"
TOLERANCE = 1e-9
"""Relative: sums in float64 differ with the number of ranks, by some 1e-13."""
_CHUNK = 1 << 22


@torch.no_grad()
def fingerprint(parts: Iterable[TensorPart]) -> list[float]:
    """Sum over tensors of weight * sum |w| and weight * sum w^2, the weight drawn from the name: equal at any number of
    ranks up to rounding. parts: those of the model before anything was resumed. Collective."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in parts:
        if part.group == "parameter" and part.owned:
            weight = 1 + zlib.crc32(part.name.encode()) / 2**32
            for chunk in part.local.split(_CHUNK):
                values = chunk.double()
                sums += weight * torch.stack([values.abs().sum(), values.square().sum()]).cpu()
    dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def check(found: Sequence[float], saved: Sequence[float] | None, model_path: str) -> None:
    """CheckpointError where the teacher is not the one of the checkpoint; saved: None in checkpoints without one."""
    if saved is not None and not all(map(_close, found, saved)):
        raise CheckpointError(
            f"the weights in {model_path} (model.path) are not those that this run was started with, and its frozen "
            f"teacher is made of them: fingerprint {list(found)} where the checkpoint says {list(saved)}. Set model.path "
            "to the initial weights, or start a new run with --fresh"
        )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE)
