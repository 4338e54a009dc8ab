"""Weights that a run needs and its checkpoints do not hold: those it started with, loaded again at every start.

They are a frozen teacher, and the base under adapters. Their fingerprint is in every certificate, so that another model
in the same folder cannot take their place unnoticed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from trainer.engines.engine import Engine, TensorPart
from trainer.saving.certificate import CheckpointError

TEACHER, BASE = "frozen_teacher", "frozen_base"
"""Entries of a certificate's metadata."""
_USES = {TEACHER: "its frozen teacher is made of them", BASE: "its adapters belong to them"}
TOLERANCE = 1e-9
"""Relative: sums in float64 differ with the number of ranks, by some 1e-13."""
_CHUNK = 1 << 22


def fingerprints(engine: Engine, teacher: str) -> dict[str, list[float]]:
    """What a certificate says of the weights that its checkpoint leaves out; before anything is resumed. Collective.

    Of a base the values rounded to bfloat16 count: it may be kept so (engine.base_dtype).
    """
    if base := list(engine.unsaved()):
        return {BASE: fingerprint(base, rounded=True)}
    return {TEACHER: fingerprint(engine.parts())} if teacher == "frozen" else {}


@torch.no_grad()
def fingerprint(parts: Iterable[TensorPart], rounded: bool = False) -> list[float]:
    """Sum over tensors of weight * sum |w| and weight * sum w^2, the weight drawn from the name: equal at any number of
    ranks up to rounding. Collective."""
    sums = torch.zeros(2, dtype=torch.float64)
    for part in parts:
        if part.group == "parameter" and part.owned:
            weight = 1 + zlib.crc32(part.name.encode()) / 2**32
            for chunk in part.local.split(_CHUNK):
                values = (chunk.bfloat16() if rounded else chunk).double()
                sums += weight * torch.stack([values.abs().sum(), values.square().sum()]).cpu()
    dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def check(found: Mapping[str, list[float]], saved: Mapping[str, Any], model_path: str) -> None:
    """CheckpointError where the weights are not those of the checkpoint; saved: its metadata, which may not say."""
    for key, own in found.items():
        earlier = saved.get(key)
        if earlier is not None and not same(own, earlier):
            raise CheckpointError(
                f"the weights in {model_path} (model.path) are not those that this run was started with, and {_USES[key]}: "
                f"fingerprint {own} where the checkpoint says {list(earlier)}. Set model.path (init_from.path, where "
                "that named a whole model) to the initial weights, or start a new run with --fresh"
            )


def same(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same weights."""
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=TOLERANCE) for x, y in zip(a, b, strict=True))
