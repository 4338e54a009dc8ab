"""Z-Image with a target time as diffusers loads it (trust_remote_code)."""

from __future__ import annotations

from functools import wraps
from typing import Any

from diffusers import ZImageTransformer2DModel
from torch import Tensor

from models.exported.following import FollowsScheduler
from models.z_image_time import ZImageTargetTime


class TwinFlowZImageTransformer2DModel(FollowsScheduler, ZImageTargetTime, ZImageTransformer2DModel):
    """ZImageTransformer2DModel plus `t_embedder_2`; the output is the negative of the mean velocity from t down to r, as
    ZImagePipeline wants it."""

    # diffusers reads the configuration's keys from the signature.
    @wraps(ZImageTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_target_time()

    def forward(self, x: Any, t: Tensor, *args: Any, target_time: Tensor | None = None, **kwargs: Any) -> Any:
        """As the base class's; t: 1 - the time of the noise [B]; target_time: r [B], see FollowsScheduler.exact_times."""
        with self.times(*self.exact_times(1 - t, target_time)):
            return super().forward(x, t, *args, **kwargs)
