"""Frozen encoders of a Qwen-Image folder: captions to conditions, pixels to latents and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from models.backbone import Conditioning

LONGEST_PROMPT = 1024  # of QwenImagePipeline, in tokens


class TextEncoder:
    """Captions to Conditioning through QwenImagePipeline's own prompt code.

    truncated: captions longer than max_tokens seen so far, each occurrence counted.
    """

    def __init__(self, pipeline: QwenImagePipeline, max_tokens: int, null_prompt: str):
        if not 1 <= max_tokens <= LONGEST_PROMPT:
            raise ValueError(f"encoder.max_text_tokens={max_tokens} must lie between 1 and {LONGEST_PROMPT}")
        self.pipeline = pipeline
        self.max_tokens = max_tokens
        self.null_prompt = null_prompt
        self.truncated = 0
        # One token more than is kept shows which captions were cut, without encoding all of a long one.
        pipeline.tokenizer_max_length = max_tokens + 1
        self._null: Conditioning | None = None

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        device: torch.device | str,
        dtype: torch.dtype,
        max_tokens: int,
        null_prompt: str,
    ) -> TextEncoder:
        """Load text_encoder/ and tokenizer/ of a diffusers model folder; nothing is fetched."""
        tokenizer = Qwen2Tokenizer.from_pretrained(_subfolder(path, "tokenizer"), local_files_only=True)
        # transformers accepts vocabulary files that it does not understand and then yields no tokens at all.
        if not tokenizer(null_prompt or "a")["input_ids"]:
            raise ValueError(
                f"the tokenizer in {path} turns text into no tokens; its files do not fit this transformers"
            )
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            _subfolder(path, "text_encoder"), dtype=dtype, local_files_only=True, use_safetensors=True
        )
        # Only hidden states of text are read: the vocabulary projection and the image tower would cost memory and time.
        model.lm_head, model.model.visual = nn.Identity(), nn.Identity()
        model.requires_grad_(False).eval().to(device)
        pipeline = QwenImagePipeline(
            scheduler=None, vae=None, text_encoder=model, tokenizer=tokenizer, transformer=None
        )
        return cls(pipeline, max_tokens, null_prompt)

    def shards(self) -> tuple[nn.Module, list[nn.Module], tuple[str, ...]]:
        """The network, the modules of it that run one after the other, once a call, and its methods beside forward."""
        model: Any = self.pipeline.text_encoder
        return model, list(model.model.language_model.layers), ()

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Conditioning:
        """Conditions of B captions, padded to the longest; equal captions are encoded once. embeds: encoder dtype."""
        if not captions:
            raise ValueError("no captions to encode")
        unique = list(dict.fromkeys(captions))
        model: Any = self.pipeline.text_encoder
        embeds, mask = self.pipeline.encode_prompt(unique, device=model.device)
        if mask is None:  # the pipeline's word for "no padding"
            mask = embeds.new_ones(embeds.shape[:2])
        mask = mask.bool()
        position = {caption: index for index, caption in enumerate(unique)}
        rows = torch.tensor([position[caption] for caption in captions], device=embeds.device)
        self.truncated += int((mask.sum(dim=1) > self.max_tokens)[rows].sum())
        return Conditioning(embeds[:, : self.max_tokens], mask[:, : self.max_tokens])[rows]

    def null(self) -> Conditioning:
        """The condition of the null prompt, one row; encoded at the first call and kept."""
        if self._null is None:
            self._null = self.encode([self.null_prompt])
        return self._null


class LatentEncoder:
    """Pixels [B, 3, H, W] in [-1, 1] to latents the transformer generates, and back.

    With a VAE the latents are its posterior mean normalised per channel, (z - mean) / std with the constants of its
    configuration (method 3), float32. Without one (model.latents: pixels) pixels are the latents.
    """

    def __init__(self, vae: AutoencoderKLQwenImage | None):
        self.vae = vae
        if vae is not None:
            # Image by image: memory stays that of one image, and latents do not depend on the batch.
            vae.enable_slicing()
            self._mean, self._std = (
                torch.tensor(constants, dtype=torch.float32, device=vae.device).view(1, -1, 1, 1)
                for constants in (vae.config.latents_mean, vae.config.latents_std)
            )

    @classmethod
    def from_folder(cls, path: str | Path, kind: str, device: torch.device | str, dtype: torch.dtype) -> LatentEncoder:
        """kind: "vae" loads vae/ of a diffusers model folder, "pixels" loads nothing."""
        if kind == "pixels":
            return cls(None)
        if kind != "vae":
            raise ValueError(f"model.latents={kind!r} is unknown; choose vae or pixels")
        vae = AutoencoderKLQwenImage.from_pretrained(
            _subfolder(path, "vae"), torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
        vae.requires_grad_(False).eval().to(device)
        return cls(vae)

    def shards(self) -> tuple[nn.Module, list[nn.Module], tuple[str, ...]] | None:
        """As of TextEncoder; None without a VAE. It is one unit, so that a call gathers once and not once an image."""
        return None if self.vae is None else (self.vae, [], ("encode", "decode"))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        if self.vae is None:
            return pixels
        frames = pixels.unsqueeze(2).to(self.vae.dtype)
        latents = self.vae.encode(frames).latent_dist.mode()[:, :, 0].float()
        return (latents - self._mean.to(latents.device)) / self._std.to(latents.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], float32; the VAE clamps them to [-1, 1], pixel latents come back as they are."""
        if self.vae is None:
            return latents
        mean, std = self._mean.to(latents.device), self._std.to(latents.device)
        frames = (latents.float() * std + mean).unsqueeze(2).to(self.vae.dtype)
        return self.vae.decode(frames).sample[:, :, 0].float()


def _subfolder(path: str | Path, name: str) -> Path:
    folder = Path(path) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; model.path must be a diffusers Qwen-Image model folder")
    return folder
