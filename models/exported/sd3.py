"""Stable Diffusion 3 with a target time as diffusers loads it (trust_remote_code)."""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers import SD3Transformer2DModel

from models.exported.following import FollowsByTimestep
from models.target_time import TargetTime


class TwinFlowSD3Transformer2DModel(FollowsByTimestep, TargetTime, SD3Transformer2DModel):
    """SD3Transformer2DModel plus `time_text_embed_2`; the output is the mean velocity from t down to r."""

    time_scale = 1000.0

    # diffusers reads the configuration's keys from the signature.
    @wraps(SD3Transformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_target_time()
