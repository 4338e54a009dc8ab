"""SANA's pipeline with the call of few-step models."""

from __future__ import annotations

from diffusers import SanaPipeline

from models.exported.calling import FewStepCall


class TwinFlowSanaPipeline(FewStepCall, SanaPipeline):
    own_defaults = {"guidance_scale": 1.0, "use_resolution_binning": False}  # noqa: RUF012 (never changed)
