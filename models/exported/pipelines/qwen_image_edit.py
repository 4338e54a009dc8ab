"""The pipelines of Qwen-Image-Edit and Edit-Plus with the call of few-step models."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

from models.exported.calling import FewStepCall


class MarksImages:
    """Mixin before an editing pipeline: tells the text encoder which tokens are an image's.

    Since transformers 5 it wants to know, for its three-dimensional positions; diffusers 0.42 does not say, and then it
    numbers images like text, silently, which is not what the model was trained with.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        encoder: Any = self.text_encoder  # type: ignore[attr-defined]

        def mark(module: Any, given: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            images = named["input_ids"] == module.config.image_token_id
            return given, {**named, "mm_token_type_ids": images.int()}

        hook = encoder.register_forward_pre_hook(mark, with_kwargs=True)
        try:
            return super().__call__(*args, **options)  # type: ignore[misc]
        finally:
            hook.remove()


class TwinFlowQwenImageEditPipeline(FewStepCall, MarksImages, QwenImageEditPipeline):
    own_defaults = {"true_cfg_scale": 1.0}  # noqa: RUF012 (never changed)


class TwinFlowQwenImageEditPlusPipeline(FewStepCall, MarksImages, QwenImageEditPlusPipeline):
    own_defaults = {"true_cfg_scale": 1.0}  # noqa: RUF012 (never changed)
