"""Z-Image's pipeline with the call of few-step models."""

from __future__ import annotations

from diffusers import ZImagePipeline

from models.exported.calling import FewStepCall


class TwinFlowZImagePipeline(FewStepCall, ZImagePipeline):
    own_defaults = {"guidance_scale": 0.0}  # noqa: RUF012 (never changed)
