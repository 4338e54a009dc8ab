"""SANA with a target time as diffusers loads it (trust_remote_code)."""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers import SanaTransformer2DModel

from models.exported.following import FollowsByTimestep
from models.target_time import TargetTime


class TwinFlowSanaTransformer2DModel(FollowsByTimestep, TargetTime, SanaTransformer2DModel):
    """SanaTransformer2DModel plus `time_embed_2`; the output is the mean velocity from t down to r."""

    time_embedding = "time_embed"

    # diffusers reads the configuration's keys from the signature.
    @wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.time_scale = 1000 * self.config.timestep_scale
        self.add_target_time()
