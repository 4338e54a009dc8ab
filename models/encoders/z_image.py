"""Text encoder (Qwen3) and VAE of Z-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from models.backbone import Conditioning
from models.encoders.latents import ShiftedLatents
from models.encoders.text import Shards, TextEncoder, frozen, subfolder, working

FAMILY = "Z-Image"


class LongestPadding(Qwen2Tokenizer):
    """Pads to the longest text of a batch where ZImagePipeline asks for its maximum; the padding is cut off anyway."""

    def __call__(self, *args: Any, padding: Any = False, **kwargs: Any) -> Any:
        return super().__call__(*args, padding="longest" if padding == "max_length" else padding, **kwargs)


class ZImageText(TextEncoder):
    """Hidden states before the last layer, of the caption within the tokenizer's chat template, as ZImagePipeline takes
    them. Tokens of the template count as the caption's."""

    longest = 512

    def __init__(self, pipeline: ZImagePipeline, max_tokens: int, null_prompt: str):
        super().__init__(max_tokens, null_prompt)
        self.pipeline = pipeline

    @classmethod
    def from_folder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> Self:
        tokenizer = LongestPadding.from_pretrained(subfolder(path, "tokenizer", FAMILY), local_files_only=True)
        # The language model around the Qwen3Model: transformers finds what yields hidden states by its class, and
        # sharding replaces that of the outermost module.
        model = Qwen3ForCausalLM.from_pretrained(
            subfolder(path, "text_encoder", FAMILY),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            tie_word_embeddings=True,  # the vocabulary projection may be missing: it goes anyway
        )
        model.lm_head = nn.Identity()
        pipeline = ZImagePipeline(
            scheduler=None,
            vae=None,
            text_encoder=frozen(model, device),
            tokenizer=working(tokenizer, path),
            transformer=None,
        )
        return cls(pipeline, max_tokens, null_prompt)

    def shards(self) -> list[Shards]:
        model: Any = self.pipeline.text_encoder
        return [(model, list(model.model.layers), ())]

    def _encode(self, captions: list[str]) -> tuple[Conditioning, Tensor]:
        most, model = self.max_tokens, self.pipeline.text_encoder
        # One token more than is kept shows which captions were cut, without encoding all of a long one.
        texts, _ = self.pipeline.encode_prompt(
            list(captions), device=model.device, do_classifier_free_guidance=False, max_sequence_length=most + 1
        )
        lengths = torch.tensor([len(text) for text in texts])
        embeds = pad_sequence([text[:most] for text in texts], batch_first=True)
        mask = torch.arange(embeds.shape[1]) < lengths[:, None]
        return Conditioning(embeds, mask.to(embeds.device)), lengths > most


class ZImageLatents(ShiftedLatents):
    family = FAMILY
