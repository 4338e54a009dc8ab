"""Tiny Qwen-Image pipelines: `digits` generates 8x8 grey pixels without a VAE, small enough to train on two CPU cores;
`pipeline` goes through every component and is as small as they allow."""

from __future__ import annotations

import json
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from models.tiny_pipelines.prompts import PROMPTS

SPECIAL_IDS = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "digits": {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 1,
        "num_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
    "pipeline": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
}
VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [-0.25, 0.1, 0.0, 0.3],
    "latents_std": [0.5, 1.5, 1.0, 2.0],
}

# hidden_size = joint_attention_dim of the transformer; sum of mrope_section = half a head.
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "digits": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "mrope_section": [2, 3, 3]},
    "pipeline": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "mrope_section": [1, 1, 2]},
}


def build(preset: str) -> QwenImagePipeline:
    """The whole pipeline in memory, float32, from torch's random generator as it stands."""
    words = tokenizer()
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(**VAE),
        text_encoder=text_encoder(preset, words),
        tokenizer=words,
        transformer=QwenImageTransformer2DModel(**TRANSFORMERS[preset]),
    )


def text_encoder(preset: str, words: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL whose outputs tell the demo captions apart."""
    sizes = dict(TEXT_ENCODERS[preset])
    mrope_section = sizes.pop("mrope_section")
    special = special_ids(words)
    config = Qwen2_5_VLConfig(
        text_config={
            **sizes,
            **special,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
            "max_position_embeddings": 4096,
            "rope_scaling": {"mrope_section": mrope_section, "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": sizes["hidden_size"],
            "patch_size": 14,
            "fullatt_block_indexes": [1],
        },
        **special,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of Qwen-Image's prompt template and of the demo captions is one token.

    The template before the caption is then 34 tokens long, as with the published vocabulary, and QwenImagePipeline
    drops exactly it.
    """
    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    template = pipeline.prompt_template_encode
    for special in SPECIAL_TOKENS:
        template = template.replace(special, "\n")
    return qwen_tokenizer([template.format(prompt) for prompt in PROMPTS])


def qwen_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of the texts is one token."""
    empty = Qwen2Tokenizer()
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = empty.backend_tokenizer.normalizer
    bpe.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=ByteLevel.alphabet(), min_frequency=1, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    described = json.loads(bpe.to_str())["model"]
    # vocab= and merges= are the names that transformers 5 reads; vocab_file= is accepted and yields no tokens.
    built = Qwen2Tokenizer(vocab=described["vocab"], merges=[tuple(pair) for pair in described["merges"]])
    built.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return built


def special_ids(words: Qwen2Tokenizer) -> dict[str, int]:
    return {name: words.convert_tokens_to_ids(token) for name, token in SPECIAL_IDS.items()}
