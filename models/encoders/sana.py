"""Text encoder (Gemma 2) and autoencoder (DC-AE) of SANA."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderDC, SanaPipeline
from torch import Tensor
from transformers import AutoTokenizer, Gemma2Model

from models.backbone import Conditioning
from models.encoders.latents import LatentEncoder
from models.encoders.text import Shards, TextEncoder, frozen, subfolder, working

FAMILY = "SANA"
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What SanaPipeline writes before a caption, and not before a null prompt."""


class SanaText(TextEncoder):
    """Last hidden states of the caption behind SanaPipeline's instruction, of which the first and the last token stay.

    max_tokens counts these two, as the pipeline's max_sequence_length does.
    """

    longest = 512

    def __init__(self, pipeline: SanaPipeline, max_tokens: int, null_prompt: str):
        super().__init__(max_tokens, null_prompt)
        self.pipeline = pipeline
        self._instruction_tokens = len(pipeline.tokenizer.encode("\n".join(INSTRUCTION)))

    @classmethod
    def from_folder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> Self:
        tokenizer = AutoTokenizer.from_pretrained(subfolder(path, "tokenizer", FAMILY), local_files_only=True)
        model = Gemma2Model.from_pretrained(
            subfolder(path, "text_encoder", FAMILY), dtype=dtype, local_files_only=True, use_safetensors=True
        )
        pipeline = SanaPipeline(
            tokenizer=working(tokenizer, path),
            text_encoder=frozen(model, device),
            vae=None,
            transformer=None,
            scheduler=None,
        )
        return cls(pipeline, max_tokens, null_prompt)

    def shards(self) -> list[Shards]:
        model: Any = self.pipeline.text_encoder
        return [(model, list(model.layers), ())]

    def _encode(self, captions: list[str]) -> tuple[Conditioning, Tensor]:
        before, read = "\n".join(INSTRUCTION), self.pipeline._text_preprocessing(captions, clean_caption=False)
        ids = self.pipeline.tokenizer([before + caption for caption in read])["input_ids"]
        most = self._instruction_tokens + self.max_tokens - 2
        return self._conditions(captions, INSTRUCTION), torch.tensor([len(tokens) > most for tokens in ids])

    def _encode_null(self) -> Conditioning:
        return self._conditions([self.null_prompt], None)

    def _conditions(self, captions: list[str], instruction: list[str] | None) -> Conditioning:
        device = self.pipeline.text_encoder.device
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=self.max_tokens,
            complex_human_instruction=instruction,
        )
        # The pipeline pads all captions to max_tokens; the transformer's mask hides what is cut here.
        longest = int(mask.sum(dim=1).max())
        return Conditioning(embeds[:, :longest], mask[:, :longest].bool())


class SanaLatents(LatentEncoder):
    """A deterministic autoencoder: latents are its own times scaling_factor."""

    vae_class = AutoencoderDC
    family = FAMILY

    def __init__(self, vae: Any | None, samples: bool = False, tiling: bool = False):
        if samples:
            raise ValueError(
                "encoder.latents=sample: the autoencoder of SANA has no posterior; set encoder.latents=mean"
            )
        super().__init__(vae, samples, tiling)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found: Tensor = self.vae.encode(pixels).latent  # type: ignore[union-attr]
        return found, torch.zeros_like(found)

    def _normalised(self, latents: Tensor) -> Tensor:
        factor: float = self.vae.config.scaling_factor  # type: ignore[union-attr]
        return latents * factor

    def _raw(self, latents: Tensor) -> Tensor:
        factor: float = self.vae.config.scaling_factor  # type: ignore[union-attr]
        return latents / factor
