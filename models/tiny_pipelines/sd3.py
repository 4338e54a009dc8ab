"""A tiny Stable Diffusion 3.5 pipeline: one block with and one without second attention, and the last."""

from __future__ import annotations

import json
import string
from typing import Any

from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from models.tiny_pipelines.prompts import PROMPTS

TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 32,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build(preset: str) -> StableDiffusion3Pipeline:
    """The whole pipeline in memory, float32, from torch's random generator as it stands."""
    words, pieces = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**VAE),
        text_encoder=clip(words, projection=8),
        tokenizer=words,
        text_encoder_2=clip(words, projection=12),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(pieces),
        tokenizer_3=pieces,
    )


def clip(words: CLIPTokenizer, projection: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=16,
            projection_dim=projection,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            initializer_factor=10.0,  # so that captions differ
        )
    )


def t5(pieces: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=TRANSFORMER["joint_attention_dim"],
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def clip_tokenizer() -> CLIPTokenizer:
    """A BPE as CLIP's, with every word of the demo captions one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    empty = CLIPTokenizer()
    bpe.normalizer = empty.backend_tokenizer.normalizer
    bpe.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=list(CLIP_SPECIAL),
        end_of_word_suffix="</w>",
        min_frequency=1,
        show_progress=False,
    )
    bpe.train_from_iterator([*PROMPTS, *string.ascii_lowercase], trainer)
    described = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(
        vocab=described["vocab"], merges=[tuple(pair) for pair in described["merges"]], model_max_length=77
    )


def t5_tokenizer() -> T5TokenizerFast:
    """Unigrams as T5's: the words of the demo captions, and characters for the rest."""
    words = dict.fromkeys(word for prompt in PROMPTS for word in prompt.split())
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    whole = [(f"▁{word}", -2.0) for word in words]
    single = [(character, -8.0) for character in ("▁", *string.ascii_letters, *string.digits, *string.punctuation)]
    return T5TokenizerFast(vocab=special + whole + single, extra_ids=0, model_max_length=512)
