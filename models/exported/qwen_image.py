"""Qwen-Image with a target time as diffusers loads it (trust_remote_code)."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from models.exported.following import FollowsByTimestep
from models.target_time import TargetTime


class TwinFlowQwenImageTransformer2DModel(FollowsByTimestep, TargetTime, QwenImageTransformer2DModel):
    """QwenImageTransformer2DModel plus `time_text_embed_2`; the output is the mean velocity from t down to r."""

    # diffusers reads the configuration's keys from the signature.
    @wraps(QwenImageTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_target_time()

    def exact_times(self, t: Tensor, target_time: Tensor | None) -> tuple[Tensor, Tensor]:
        """As the base class's; with zero_cond_t (Edit-2511) [2 B]: the rows' references follow, at time 0."""
        t, r = super().exact_times(t, target_time)
        if not self.config.zero_cond_t:
            return t, r
        return torch.cat([t, torch.zeros_like(t)]), torch.cat([r, torch.zeros_like(r)])
