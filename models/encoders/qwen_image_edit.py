"""Text encoder of Qwen-Image-Edit: Qwen2.5-VL reads the instruction and sees the source images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from models.backbone import Conditioning
from models.encoders.text import Shards, TextEncoder, frozen, subfolder, working

FAMILY = "Qwen-Image-Edit"
PIPELINES = {"QwenImageEditPipeline": QwenImageEditPipeline, "QwenImageEditPlusPipeline": QwenImageEditPlusPipeline}
"""By the class that model_index.json names."""
SEEN_EDGE = {QwenImageEditPipeline: 1024, QwenImageEditPlusPipeline: 384}
"""Edge of the square whose area the pipelines give images before the text encoder sees them [pixels]."""


def edit_pipeline(path: str | Path) -> Any | None:
    """The editing pipeline that a diffusers model folder is made for; None where it is for something else."""
    index = Path(path) / "model_index.json"
    name = json.loads(index.read_text()).get("_class_name") if index.is_file() else None
    return PIPELINES.get(str(name))


class ImagesAndText(Qwen2VLProcessor):
    """Qwen2VLProcessor without its video part, which cannot be made without torchvision.

    images: one list for each reference, of as many images as there are texts.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        in_order = [image for of_row in zip(*images, strict=True) for image in of_row]
        return super().__call__(images=in_order, text=text, **kwargs)


class QwenImageEditText(TextEncoder):
    """Hidden states of source images and instruction within the prompt template of QwenImageEditPipeline or
    QwenImageEditPlusPipeline.

    max_tokens: of the instruction alone; the images' tokens come on top. seen_edge: edge of the square whose area images
    get before they are seen [pixels]; None: as the pipeline does.
    """

    longest = 1024
    sees_images = True

    def __init__(self, pipeline: Any, max_tokens: int, null_prompt: str, seen_edge: int | None = None):
        super().__init__(max_tokens, null_prompt)
        self.pipeline = pipeline
        self.seen_edge = seen_edge or SEEN_EDGE[type(pipeline)]
        # Since transformers 5 the model wants to be told which tokens are an image's, for its three-dimensional
        # positions; the pipelines of diffusers 0.42 do not, and it silently numbers them like text.
        pipeline.text_encoder.register_forward_pre_hook(self._mark_images, with_kwargs=True)

    @classmethod
    def from_folder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> Self:
        kind = edit_pipeline(path)
        if kind is None:
            raise ValueError(f"{path} is no editing model: its model_index.json names none of {', '.join(PIPELINES)}")
        tokenizer = Qwen2Tokenizer.from_pretrained(subfolder(path, "tokenizer", FAMILY), local_files_only=True)
        images = Qwen2VLImageProcessorPil.from_pretrained(subfolder(path, "processor", FAMILY), local_files_only=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            subfolder(path, "text_encoder", FAMILY), dtype=dtype, local_files_only=True, use_safetensors=True
        )
        model.lm_head = nn.Identity()  # only hidden states are read
        pipeline = kind(
            scheduler=None,
            vae=None,
            text_encoder=frozen(model, device),
            tokenizer=working(tokenizer, path),
            processor=ImagesAndText(images, tokenizer),
            transformer=None,
        )
        return cls(pipeline, max_tokens, null_prompt)

    def shards(self) -> list[Shards]:
        model: Any = self.pipeline.text_encoder
        return [(model, [*model.model.visual.blocks, *model.model.language_model.layers], ())]

    @torch.no_grad()
    def encode(self, captions: Sequence[str], sources: Sequence[Tensor] = ()) -> Conditioning:
        """Conditions of B instructions with the images that they are about. sources: one [B, 3, H, W] in [-1, 1] for each
        reference."""
        if not captions or any(len(source) != len(captions) for source in sources):
            raise ValueError(f"{len(captions)} instructions came with {[len(source) for source in sources]} images")
        if not sources:
            raise ValueError(
                "an editing model wants a source image with every instruction: pack the data with --kind edits, and leave "
                "sample.prompts empty"
            )
        if len(sources) > 1 and isinstance(self.pipeline, QwenImageEditPipeline):
            raise ValueError(
                f"Qwen-Image-Edit takes one source image, not {len(sources)}; take a Qwen-Image-Edit-2509 folder, or later"
            )
        cut = [self._cut(caption) for caption in captions]
        self.truncated += sum(short != caption for short, caption in zip(cut, captions, strict=True))
        images = [[self._seen(image) for image in source.cpu()] for source in sources]
        device = self.pipeline.text_encoder.device
        embeds, mask = self.pipeline.encode_prompt(cut, image=images, device=device)
        if mask is None:  # the pipeline's word for "no padding"
            mask = embeds.new_ones(embeds.shape[:2])
        return Conditioning(embeds, mask.bool())

    def _encode(self, captions: list[str]) -> tuple[Conditioning, Tensor]:
        raise NotImplementedError("conditions of edits are functions of images, too: see encode")

    def _cut(self, caption: str) -> str:
        """The caption's first max_tokens tokens; the template's end comes after it and must stay."""
        found = self.pipeline.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in found["offset_mapping"]]
        return caption if len(ends) <= self.max_tokens else caption[: ends[self.max_tokens - 1]]

    def _seen(self, image: Tensor) -> Image.Image:
        """An image [3, H, W] in [-1, 1] as the text encoder gets it: of the pipeline's area, sides multiples of 32."""
        levels = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
        width, height, *_ = calculate_dimensions(self.seen_edge**2, picture.width / picture.height)
        resized: Image.Image = self.pipeline.image_processor.resize(picture, height, width)
        return resized

    def _mark_images(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        images = kwargs["input_ids"] == model.config.image_token_id
        return args, {**kwargs, "mm_token_type_ids": images.to(torch.int32)}
