"""Tiny Qwen-Image pipelines: `digits` generates 8x8 grey pixels without a VAE, small enough to train on two CPU cores;
`pipeline` goes through every component and is as small as they allow; `edit` and `edit_plus` edit images, the latter with
references at time 0 (zero_cond_t), as Qwen-Image-Edit-2511."""

from __future__ import annotations

import json
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models.encoders.qwen_image_edit import ImagesAndText
from models.tiny_pipelines.prompts import PROMPTS

SPECIAL_IDS = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
EDITORS: dict[str, Any] = {"edit": QwenImageEditPipeline, "edit_plus": QwenImageEditPlusPipeline}

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
TRANSFORMERS |= {
    "edit": TRANSFORMERS["pipeline"],
    "edit_plus": {**TRANSFORMERS["pipeline"], "zero_cond_t": True},
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
TEXT_ENCODERS |= {"edit": TEXT_ENCODERS["pipeline"], "edit_plus": TEXT_ENCODERS["pipeline"]}


def build(preset: str) -> Any:
    """The whole pipeline in memory, float32, from torch's random generator as it stands."""
    kind = EDITORS.get(preset, QwenImagePipeline)
    words = tokenizer(kind)
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": AutoencoderKLQwenImage(**VAE),
        "text_encoder": text_encoder(preset, words),
        "tokenizer": words,
        "transformer": QwenImageTransformer2DModel(**TRANSFORMERS[preset]),
    }
    if preset in EDITORS:
        parts["processor"] = PublishedProcessor(Qwen2VLImageProcessorPil(), words)
    return kind(**parts)


class PublishedProcessor(ImagesAndText):
    """Goes by the name that published folders have in model_index.json."""


PublishedProcessor.__name__, PublishedProcessor.__module__ = "Qwen2VLProcessor", "transformers"


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
        **{
            f"{name}_token_id": words.convert_tokens_to_ids(token)
            for name, token in zip(("vision_start", "vision_end", "image", "video"), IMAGE_TOKENS, strict=True)
            if preset in EDITORS
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def tokenizer(kind: Any = QwenImagePipeline) -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of the pipeline's prompt template and of the demo captions is one token.

    The template before the caption is then 34 tokens long (64 of editing), as with the published vocabulary, and the
    pipeline drops exactly it.
    """
    editing = {"processor": None} if kind is not QwenImagePipeline else {}
    pipeline = kind(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None, **editing)
    special, template = (*SPECIAL_TOKENS, *(IMAGE_TOKENS if editing else ())), pipeline.prompt_template_encode
    for token in special:
        template = template.replace(token, "\n")
    return qwen_tokenizer([template.format(prompt) for prompt in PROMPTS], special)


def qwen_tokenizer(texts: list[str], special: tuple[str, ...] = SPECIAL_TOKENS) -> Qwen2Tokenizer:
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
    built.add_special_tokens({"additional_special_tokens": list(special[1:])})
    return built


def special_ids(words: Qwen2Tokenizer) -> dict[str, int]:
    return {name: words.convert_tokens_to_ids(token) for name, token in SPECIAL_IDS.items()}
