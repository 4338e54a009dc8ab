"""What one rank receives for one step: its rows of the global batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows [rank * n, (rank + 1) * n) of global step `step`.

    pixels: [n, C, H, W] float32 in [-1, 1]; captions, keys, shards: n strings; own_epochs: n passes through the stream
    completed before this sample; bucket: (height, width) of every image; rows: [n] int64 row in the global batch.
    """

    step: int
    bucket: tuple[int, int]
    rows: Tensor
    pixels: Tensor
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    shards: tuple[str, ...]
    own_epochs: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return replace(self, pixels=self.pixels.pin_memory())
