"""Text encoders (two CLIPs, T5) and VAE of Stable Diffusion 3."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from models.backbone import Conditioning
from models.encoders.latents import ShiftedLatents
from models.encoders.text import Shards, TextEncoder, frozen, subfolder, working

FAMILY = "Stable Diffusion 3"
CLIP_TOKENS = 77
_ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
_TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast}


class SD3Text(TextEncoder):
    """77 tokens of both CLIPs side by side, then max_tokens of T5, and the CLIPs' pooled texts.

    Every caption has this one length: the transformer attends to padding as it was trained to, and the mask is all True.
    A caption counts as cut where T5 cuts it; the CLIPs read the first 77 tokens of any.
    """

    longest = 512

    def __init__(self, pipeline: StableDiffusion3Pipeline, max_tokens: int, null_prompt: str):
        super().__init__(max_tokens, null_prompt)
        self.pipeline = pipeline
        # It would say of every other caption what the CLIPs leave to T5.
        logging.getLogger(StableDiffusion3Pipeline.__module__).setLevel(logging.ERROR)

    @classmethod
    def from_folder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> Self:
        parts: dict[str, Any] = {}
        for name, kind in _TOKENIZERS.items():
            tokenizer = kind.from_pretrained(subfolder(path, name, FAMILY), local_files_only=True)
            parts[name] = working(tokenizer, path)
        for name, kind in _ENCODERS.items():
            model = kind.from_pretrained(
                subfolder(path, name, FAMILY), dtype=dtype, local_files_only=True, use_safetensors=True
            )
            parts[name] = frozen(model, device)
        return cls(
            StableDiffusion3Pipeline(transformer=None, scheduler=None, vae=None, **parts), max_tokens, null_prompt
        )

    def shards(self) -> list[Shards]:
        clips: list[Any] = [self.pipeline.text_encoder, self.pipeline.text_encoder_2]
        t5: Any = self.pipeline.text_encoder_3
        return [(clip, list(clip.text_model.encoder.layers), ()) for clip in clips] + [(t5, list(t5.encoder.block), ())]

    def _encode(self, captions: list[str]) -> tuple[Conditioning, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            captions,
            None,
            None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens,
        )
        lengths = [len(ids) for ids in self.pipeline.tokenizer_3(captions)["input_ids"]]
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return Conditioning(embeds, mask, pooled), torch.tensor(lengths) > self.max_tokens


class SD3Latents(ShiftedLatents):
    family = FAMILY
