"""A tiny SANA pipeline."""

from __future__ import annotations

import json
from typing import Any

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer, models, processors, trainers
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from models.tiny_pipelines.prompts import PROMPTS

TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 16,
}
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
    "scaling_factor": 0.41407,
}
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


def build(preset: str) -> SanaPipeline:
    """The whole pipeline in memory, float32, from torch's random generator as it stands."""
    words = tokenizer()
    return SanaPipeline(
        tokenizer=words,
        text_encoder=gemma(words),
        vae=AutoencoderDC(**VAE),
        transformer=SanaTransformer2DModel(**TRANSFORMER),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def gemma(words: GemmaTokenizer) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(words),
            hidden_size=TRANSFORMER["caption_channels"],
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
            initializer_range=0.5,  # so that captions differ
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def tokenizer() -> GemmaTokenizer:
    """A BPE as Gemma's, with every word of the demo captions one token and bytes for the rest."""
    empty = GemmaTokenizer()
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = empty.backend_tokenizer.normalizer
    bpe.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        min_frequency=1,
        show_progress=False,
    )
    # Words one by one: Gemma's pre-tokenizer would make one token of a whole caption.
    bpe.train_from_iterator([f" {word.lower()}" for prompt in PROMPTS for word in prompt.split()], trainer)
    described = json.loads(bpe.to_str())["model"]
    built = GemmaTokenizer(vocab=described["vocab"], merges=[tuple(pair) for pair in described["merges"]])
    built.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", built.bos_token_id)]
    )
    return built
