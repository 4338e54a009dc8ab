"""Qwen-Image's pipeline with the call of few-step models."""

from __future__ import annotations

from diffusers import QwenImagePipeline

from models.exported.calling import FewStepCall


class TwinFlowQwenImagePipeline(FewStepCall, QwenImagePipeline):
    own_defaults = {"true_cfg_scale": 1.0}  # noqa: RUF012 (never changed)
