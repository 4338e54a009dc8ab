"""From a batch to what the objective works on: latents, conditions, null conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import Batch
from models.backbone import Conditioning
from models.encoders import LatentEncoder, TextEncoder


@dataclass
class Encoding:
    """The frozen encoders of a run. needs_null: whether the objective evaluates the null condition."""

    text: TextEncoder
    latents: LatentEncoder
    device: torch.device
    needs_null: bool

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning, Conditioning | None]:
        """Latents [n, C, H, W] float32, the rows' conditions, and as many rows of the null condition (None if unused)."""
        x = self.latents.encode(batch.to(self.device).pixels)
        null = self.text.null().to(self.device, torch.float32).expand(len(batch)) if self.needs_null else None
        return x, self.prompts(batch.captions), null

    def prompts(self, captions: Sequence[str]) -> Conditioning:
        """Conditions of B captions, float32 on the device."""
        return self.text.encode(captions).to(self.device, torch.float32)
