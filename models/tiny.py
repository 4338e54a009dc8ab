"""Tiny model folders with random weights, built offline and loaded exactly as the published ones.

`python -m models.tiny DEST [--preset NAME] [--seed 0]`. The presets are whole pipelines of the backbones, as small as
their components allow; `digits` is one for training on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backbone import Conditioning

MARKER = "tiny.json"
QWEN_IMAGE = ("digits", "pipeline", "edit", "edit_plus")
PRESETS = dict.fromkeys(QWEN_IMAGE, "qwen_image") | {"sd3": "sd3", "z_image": "z_image", "sana": "sana"}
"""Preset -> module of models/tiny_pipelines that builds it."""
SMALLEST = {"qwen_image": "pipeline", "sd3": "sd3", "z_image": "z_image", "sana": "sana"}
"""Backbone (models/backbones) -> preset of its smallest model."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.tiny", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder to create")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="digits")
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


def build(preset: str, seed: int) -> Any:
    """The whole pipeline in memory, float32, the same for the same seed; torch's own generator is left alone."""
    family = importlib.import_module(f"models.tiny_pipelines.{PRESETS[preset]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.build(preset)


def example(backbone: Any, rows: int) -> tuple[Tensor, Conditioning, Conditioning]:
    """Latents [rows, C, H, W] of 2 x 3 patches, conditions of 2 to 5 text tokens, null conditions of 1 (all of 5 where
    the backbone knows no padding): random float32 numbers, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    edge = backbone.pixels_per_latent * backbone.patch
    shape = (rows, *backbone.latent_shape((2 * edge, 3 * edge)))
    embeds = torch.randn(2 * rows, 5, backbone.text_width, generator=generator)
    lengths = torch.cat([torch.arange(rows) % 4 + 2, torch.ones(rows, dtype=torch.int64)])
    mask = (torch.arange(5) < lengths[:, None]) | (not backbone.masked_text)
    x = torch.randn(shape, generator=generator)
    pooled = None
    if backbone.pooled_width is not None:
        pooled = torch.randn(2 * rows, backbone.pooled_width, generator=generator)
    both = Conditioning(embeds, mask, pooled)
    return x, both[:rows], both[rows:]


if __name__ == "__main__":
    raise SystemExit(main())
