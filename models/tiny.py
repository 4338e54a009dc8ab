"""Tiny Qwen-Image folders with random weights, built offline and loaded exactly as the published one.

`python -m models.tiny DEST [--preset digits|pipeline] [--seed 0]`. `digits` generates 8x8 grey pixels without a VAE,
small enough to train on two CPU cores; `pipeline` goes through every component and is as small as they allow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from models.backbone import Conditioning

MARKER = "tiny.json"
SPECIAL_IDS = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>", "pad_token_id": "<|endoftext|>"}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = tuple(f"a handwritten {numeral}" for numeral in NUMERALS)
PROMPTS = (*CAPTIONS, "Generate an image.", "Edit this image.")

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


SMALLEST = {"qwen_image": "pipeline"}
"""Backbone (models/backbones) -> preset of its smallest model."""

# hidden_size = joint_attention_dim of the transformer; sum of mrope_section = half a head.
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "digits": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "mrope_section": [2, 3, 3]},
    "pipeline": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "mrope_section": [1, 1, 2]},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.tiny", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to create")
    parser.add_argument("--preset", choices=sorted(TRANSFORMERS), default="digits")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args(arguments)
    # diffusers imports DeepSpeed when it saves, and DeepSpeed looks for accelerators unless told.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        written = write(options.dest, options.preset, options.seed)
    except FileExistsError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.dest}: {'written' if written else 'already complete'} ({options.preset}, seed {options.seed})")
    return 0


def write(dest: Path, preset: str, seed: int) -> bool:
    """Create the folder `dest`, complete or not at all; False where the same one is already there.

    Raises FileExistsError where something else is.
    """
    recipe = {"preset": preset, "seed": seed}
    if dest.exists():
        if (dest / MARKER).is_file() and json.loads((dest / MARKER).read_text()) == recipe:
            return False
        raise FileExistsError(
            f"{dest} exists and is not the {preset} model of seed {seed}; choose another folder or remove it"
        )
    staging = dest.with_name(f".{dest.name}.partial-{os.getpid()}")
    marker = staging / MARKER
    try:
        build(preset, seed).save_pretrained(staging, safe_serialization=True)
        marker.write_text(json.dumps(recipe) + "\n")
        for file in staging.rglob("*.safetensors"):
            shutil.copymode(marker, file)  # safetensors makes files that only their owner can read
        staging.rename(dest)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return True


def build(preset: str, seed: int) -> QwenImagePipeline:
    """The whole pipeline in memory, float32, the same for the same seed; torch's own generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=AutoencoderKLQwenImage(**VAE),
            text_encoder=text_encoder(preset, words),
            tokenizer=words,
            transformer=QwenImageTransformer2DModel(**TRANSFORMERS[preset]),
        )


def example(backbone: Any, rows: int) -> tuple[Tensor, Conditioning, Conditioning]:
    """Latents [rows, C, H, W] of 2 x 3 patches, conditions of 2 to 5 text tokens, null conditions of 1: random float32
    numbers, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    patch = backbone.pixels_per_latent * backbone.config.patch_size
    shape = (rows, *backbone.latent_shape((2 * patch, 3 * patch)))
    embeds = torch.randn(2 * rows, 5, backbone.config.joint_attention_dim, generator=generator)
    lengths = torch.cat([torch.arange(rows) % 4 + 2, torch.ones(rows, dtype=torch.int64)])
    both = Conditioning(embeds, torch.arange(5) < lengths[:, None])
    return torch.randn(shape, generator=generator), both[:rows], both[rows:]


def text_encoder(preset: str, words: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL whose outputs tell the demo captions apart."""
    sizes = dict(TEXT_ENCODERS[preset])
    mrope_section = sizes.pop("mrope_section")
    special = {name: words.convert_tokens_to_ids(token) for name, token in SPECIAL_IDS.items()}
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
    empty = Qwen2Tokenizer()
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = empty.backend_tokenizer.normalizer
    bpe.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    template = pipeline.prompt_template_encode
    for special in SPECIAL_TOKENS:
        template = template.replace(special, "\n")
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=ByteLevel.alphabet(), min_frequency=1, show_progress=False
    )
    bpe.train_from_iterator([template.format(prompt) for prompt in PROMPTS], trainer)
    described = json.loads(bpe.to_str())["model"]
    # vocab= and merges= are the names that transformers 5 reads; vocab_file= is accepted and yields no tokens.
    built = Qwen2Tokenizer(vocab=described["vocab"], merges=[tuple(pair) for pair in described["merges"]])
    built.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return built


if __name__ == "__main__":
    raise SystemExit(main())
