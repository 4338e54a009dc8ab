"""The time embeddings of Z-Image, whose network knows a time of its own and reads the length of a jump."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from torch import Tensor

from models.target_time import Sinusoid, TargetTime


class CleanTimeSinusoid(Sinusoid):
    """Sinusoid of times t in [-1, 1] for a network whose own time u runs from noise (0) to data (1): u = 1 - t.

    Times of the fake flow lie beyond the data, in [1, 2]: every t has a u of its own, and the two flows touch where
    their velocities agree, at t = 0. (The published patch uses u = sign(t) (1 - |t|), in which r = 0 and r = 1, and
    t = 1 and t = -1, are the same time: method 6.3, item 32.)
    """

    def __init__(self, features: int, time_scale: float):
        super().__init__(features, True, 0, 1)
        self.time_scale = time_scale

    def forward(self, timesteps: Tensor) -> Tensor:
        return super().forward((1 - timesteps) * self.time_scale)  # diffusers' order of products: equal bits


class ExactTimestepEmbedder(TimestepEmbedder):
    """diffusers' TimestepEmbedder with its sinusoid as a module, which knows float64."""

    sinusoid: Sinusoid

    def timestep_embedding(self, t: Tensor, dim: int, max_period: int = 10000) -> Tensor:
        features: Tensor = self.sinusoid(t)
        return features


class ZImageTargetTime(TargetTime):
    """Mixin of a ZImageTransformer2DModel: its time embedding becomes E1(1 - t) + (t - r) E2(t - r).

    E2 reads the length of the jump, as published: for t, r in (0, 1] the numbers are those of the published patch.
    """

    time_embedding = "t_embedder"
    t_embedder: Any
    t_embedder_2: Any
    t_scale: float

    def add_target_time(self) -> None:
        features = self.t_embedder.frequency_embedding_size
        self.t_embedder.__class__ = ExactTimestepEmbedder
        self.t_embedder.sinusoid = CleanTimeSinusoid(features, self.t_scale)
        super().add_target_time()
        self.t_embedder_2.sinusoid = Sinusoid(features, True, 0, self.t_scale)

    def target_argument(self, t: Tensor, r: Tensor) -> Tensor:
        return t - r
