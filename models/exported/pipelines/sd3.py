"""Stable Diffusion 3's pipeline with the call of few-step models."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline

from models.exported.calling import FewStepCall


class TwinFlowStableDiffusion3Pipeline(FewStepCall, StableDiffusion3Pipeline):
    own_defaults = {"guidance_scale": 1.0}  # noqa: RUF012 (never changed)
