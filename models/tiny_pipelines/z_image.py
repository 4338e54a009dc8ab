"""Tiny Z-Image pipeline: `z_image` goes through every component and is as small as they allow."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from models.tiny_pipelines.prompts import PROMPTS
from models.tiny_pipelines.qwen_image import qwen_tokenizer, special_ids

TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 6, 6],
    "axes_lens": [256, 64, 64],
}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What the published template makes of a single user message with enable_thinking."""


def build(preset: str) -> ZImagePipeline:
    """The whole pipeline in memory, float32, from torch's random generator as it stands."""
    words = tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**VAE),
        text_encoder=Qwen3Model(Qwen3Config(**TEXT_ENCODER, **special_ids(words))),
        tokenizer=words,
        transformer=ZImageTransformer2DModel(**TRANSFORMER),
    )


def tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of the chat template and of the demo captions is one token."""
    words = qwen_tokenizer([f"user\n{prompt}\n\nassistant\n" for prompt in PROMPTS])
    words.chat_template = CHAT_TEMPLATE
    return words
