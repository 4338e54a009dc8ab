"""Text encoder (Qwen2.5-VL) and VAE of Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from models.backbone import Conditioning
from models.encoders.latents import LatentEncoder
from models.encoders.text import Shards, TextEncoder, frozen, subfolder, working

FAMILY = "Qwen-Image"


class QwenImageText(TextEncoder):
    """Hidden states of the caption within QwenImagePipeline's prompt template."""

    longest = 1024

    def __init__(self, pipeline: QwenImagePipeline, max_tokens: int, null_prompt: str):
        super().__init__(max_tokens, null_prompt)
        self.pipeline = pipeline
        # One token more than is kept shows which captions were cut, without encoding all of a long one.
        pipeline.tokenizer_max_length = max_tokens + 1

    @classmethod
    def from_folder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> Self:
        tokenizer = Qwen2Tokenizer.from_pretrained(subfolder(path, "tokenizer", FAMILY), local_files_only=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            subfolder(path, "text_encoder", FAMILY), dtype=dtype, local_files_only=True, use_safetensors=True
        )
        # Only hidden states of text are read: the vocabulary projection and the image tower would cost memory and time.
        model.lm_head, model.model.visual = nn.Identity(), nn.Identity()
        pipeline = QwenImagePipeline(
            scheduler=None,
            vae=None,
            text_encoder=frozen(model, device),
            tokenizer=working(tokenizer, path),
            transformer=None,
        )
        return cls(pipeline, max_tokens, null_prompt)

    def shards(self) -> list[Shards]:
        model: Any = self.pipeline.text_encoder
        return [(model, list(model.model.language_model.layers), ())]

    def _encode(self, captions: list[str]) -> tuple[Conditioning, Tensor]:
        model: Any = self.pipeline.text_encoder
        embeds, mask = self.pipeline.encode_prompt(captions, device=model.device)
        if mask is None:  # the pipeline's word for "no padding"
            mask = embeds.new_ones(embeds.shape[:2])
        mask, most = mask.bool(), self.max_tokens
        return Conditioning(embeds[:, :most], mask[:, :most]), mask.sum(dim=1) > most


class QwenImageLatents(LatentEncoder):
    """A video VAE, for single frames: latents normalised per channel, (raw - mean) / std (method 3)."""

    vae_class = AutoencoderKLQwenImage
    family = FAMILY

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = super()._posterior(pixels.unsqueeze(2))
        return mean[:, :, 0], deviation[:, :, 0]

    def _pixels(self, latents: Tensor) -> Tensor:
        return super()._pixels(latents.unsqueeze(2))[:, :, 0]

    def _normalised(self, latents: Tensor) -> Tensor:
        return (latents - self._constant("latents_mean", latents)) / self._constant("latents_std", latents)

    def _raw(self, latents: Tensor) -> Tensor:
        return latents * self._constant("latents_std", latents) + self._constant("latents_mean", latents)

    def _constant(self, name: str, like: Tensor) -> Tensor:
        values = torch.tensor(self.vae.config[name], dtype=torch.float32)  # type: ignore[union-attr]
        return values.to(like.device, non_blocking=True).view(1, -1, 1, 1)
