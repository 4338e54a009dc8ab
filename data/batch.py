"""What one rank receives for one step: its rows of the global batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Replacement(NamedTuple):
    """A sample that could not be decoded, and what stands in for it.

    row: of the global batch; offset: of its first member in the shard [bytes]; stand_in: key of the sample of the same
    shard that took its place; reason: why, naming shard and key.
    """

    row: int
    shard: str
    key: str
    offset: int
    stand_in: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Rows [rank * n, (rank + 1) * n) of global step `step`.

    pixels: [n, C, H, W] float32 in [-1, 1]; captions, keys, shards: n strings; own_epochs: n passes through the stream
    completed before this sample; bucket: (height, width) of every image; rows: [n] int64 row in the global batch;
    replaced: rows whose own sample could not be decoded (keys then names the stand-in).
    """

    step: int
    bucket: tuple[int, int]
    rows: Tensor
    pixels: Tensor
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    shards: tuple[str, ...]
    own_epochs: tuple[int, ...]
    replaced: tuple[Replacement, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return replace(self, pixels=self.pixels.pin_memory())
