"""`twinflow sample CHECKPOINT --prompts FILE`: images of a run, one of its checkpoints, a base model folder or an export.

CHECKPOINT is a run's folder (its newest checkpoint), RUN/checkpoints/step_00000500, either of them on s3://, or a
diffusers model folder. One PNG per image, named by number and prompt, and sheet.png with the first of them. The images
follow from weights, prompts, preset, resolution and seed; the number of ranks and --batch change rounding alone.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from configs.folders import unused
from data.s3 import DataError
from models import weights
from models.backbone import Conditioning
from models.transformer import TWIN
from trainer.build import latent_encoder, text_encoder
from trainer.engines.distributed import World, process_group
from trainer.generate import network
from trainer.generate.sample import picture, sample, share, write_grid
from trainer.generate.sampler import Sampler, preset
from trainer.origin import Origin, find
from trainer.saving.certificate import CheckpointError
from trainer.train import check_package

SHEET_ROWS = 32
"""Prompts on the contact sheet at most."""
EXPLAINED = (CheckpointError, DataError, weights.CheckpointError, OSError, ValueError)
_TIMEOUT_S = 3600.0


def draw(given: argparse.Namespace, world: World) -> Path:
    """This rank's share of the images; the folder they are in.

    Raises ValueError for what was asked wrongly, and what reading the weights raises.
    """
    captions, sampler = read_prompts(given.prompts), preset(given.preset)
    origin = find(given.checkpoint, given.endpoint_url, given.base, given.set)
    which = origin.choose(given.weights)
    backbone = network.architecture(origin)
    shape = backbone.latent_shape(_resolution(given.resolution, origin))
    folder = _folder(given.out, origin, given.preset, world)
    if world.rank == 0:
        print(_announcement(origin, which, sampler, len(captions) * given.per_prompt, world), flush=True)
    ids = share(len(captions) * given.per_prompt, world.rank, world.world_size)
    conditions = encoded(origin, [captions[i // given.per_prompt] for i in ids.tolist()], world.device)
    nets = network.load(origin, which, backbone, world.device)
    latents_to_pixels = latent_encoder(origin.config, world.device)
    bar = tqdm(total=len(ids), desc=given.preset, unit="image", disable=world.rank != 0)
    for begin in range(0, len(ids), given.batch):
        rows = slice(begin, begin + given.batch)
        cond = conditions[rows][0].cat(*conditions[rows][1:]).to(world.device)
        latents = sample(nets, cond, shape, sampler, given.seed, ids[rows], world.device)
        _write(folder, latents_to_pixels.decode(latents).cpu(), ids[rows], captions, given)
        bar.update(len(ids[rows]))
    bar.close()
    dist.barrier()
    if world.rank == 0:
        _write_sheet(
            folder, captions, given, f"{origin.name}, step {origin.step or 0}, {given.preset}, {which} weights"
        )
    return folder


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, UTF-8. Raises ValueError for an empty line or file, naming it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompts {path} cannot be read ({error}); write a UTF-8 text file, one prompt a line"
        ) from error
    if not lines:
        raise ValueError(f"{path} is empty; write one prompt a line")
    empty = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if empty:
        raise ValueError(f"{path}: line {empty[0]} is empty; write one prompt a line and nothing between them")
    return [line.strip() for line in lines]


@torch.no_grad()
def encoded(origin: Origin, captions: Sequence[str], device: torch.device) -> list[Conditioning]:
    """Conditions of the captions, on the CPU; each is encoded alone, so that it does not depend on its company. The text
    encoder is gone before the transformer comes."""
    encoder = text_encoder(origin.config, device)
    if encoder.sees_images:
        raise ValueError(
            f"{origin.base} is an editing model, and prompts alone are no edits; a run's pictures/ show held-out edits"
        )
    known = {caption: encoder.encode([caption]).to("cpu", torch.float32) for caption in dict.fromkeys(captions)}
    del encoder
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [known[caption] for caption in captions]


def _resolution(given: str | None, origin: Origin) -> tuple[int, int]:
    if given is None:
        if origin.resolution is None:
            raise ValueError(
                f"{origin.base} does not say how large its images are; give --resolution, for instance 1024"
            )
        return origin.resolution
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", given)
    if match is None:
        raise ValueError(f"--resolution {given} is neither N nor HEIGHTxWIDTH [pixels]")
    return int(match[1]), int(match[2] or match[1])


def _folder(out: Path | None, origin: Origin, name: str, world: World) -> Path:
    """The same folder on all ranks, new or empty."""
    box = [None]
    if world.rank == 0:
        step = "" if origin.step is None else f"_step{origin.step:08d}"
        folder = out or unused(Path("outputs/images") / f"{origin.name}{step}_{name}")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        box = [folder]  # type: ignore[list-item]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _announcement(origin: Origin, which: str, sampler: Sampler, images: int, world: World) -> str:
    where = origin.base if origin.reader is None else origin.reader.url
    text = f"{where}: {which} weights, {images} images, {sampler.nfe} evaluations each, {world.world_size} ranks"
    if origin.reader is None and sampler.style != "multi" and not _knows_target_time(origin):
        text += "\nnote: a base model knows no target time; only the multi presets show what it can do"
    return text


def _knows_target_time(origin: Origin) -> bool:
    return f'"{TWIN}' in (weights.component(origin.base, "transformer") / "config.json").read_text()


def file_name(number: int, caption: str, per_prompt: int) -> str:
    """<number of the prompt>[-<of its image>]_<prompt>.png"""
    slug = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60].rstrip("-") or "prompt"
    of_prompt = f"-{number % per_prompt}" if per_prompt > 1 else ""
    return f"{number // per_prompt:05d}{of_prompt}_{slug}.png"


def _write(folder: Path, pixels: Tensor, ids: Tensor, captions: Sequence[str], given: argparse.Namespace) -> None:
    """One file each, complete or absent; ranks that repeat the last id write the same file."""
    for image, number in zip(pixels, ids.tolist(), strict=True):
        caption = captions[number // given.per_prompt]
        text = PngInfo()
        for key, value in (("Prompt", caption), ("Preset", given.preset), ("Seed", str(given.seed))):
            text.add_itxt(key, value)
        path = folder / file_name(number, caption, given.per_prompt)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        picture(image).save(partial, format="PNG", pnginfo=text)
        partial.replace(path)


def _write_sheet(folder: Path, captions: Sequence[str], given: argparse.Namespace, title: str) -> None:
    shown = captions[:SHEET_ROWS]
    images = []
    for number in range(len(shown) * given.per_prompt):
        with Image.open(folder / file_name(number, shown[number // given.per_prompt], given.per_prompt)) as image:
            images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1.0)
    write_grid(folder / "sheet.png", torch.stack(images), shown, title)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="twinflow sample", description=(__doc__ or "").partition(": ")[2])
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("checkpoint", metavar="CHECKPOINT", help="run, checkpoint or model folder, or s3://")
    options.add_argument("--prompts", metavar="FILE", type=Path, required=True, help="UTF-8 text, one prompt a line")
    options.add_argument(
        "--preset", default="2nfe", help="1nfe, 2nfe, 4nfe; fewN, anyN, multiN with N steps [%(default)s]"
    )
    options.add_argument("--weights", choices=("ema", "online"), help="default: averaged ones where they were kept")
    options.add_argument("--seed", type=int, default=0, help="of all noise [%(default)s]")
    options.add_argument(
        "--per-prompt", metavar="N", type=_positive, default=1, help="images of each prompt [%(default)s]"
    )
    options.add_argument("--resolution", metavar="N|HxW", help="pixels; default: what the run was trained on")
    options.add_argument("--out", metavar="DIR", type=Path, help="new folder; default: below outputs/images")
    options.add_argument(
        "--batch", metavar="N", type=_positive, default=8, help="images of a rank at once [%(default)s]"
    )
    options.add_argument("--nproc", metavar="N", help="ranks on this machine; default: one per GPU, or one")
    options.add_argument("--base", metavar="FOLDER", help="base model folder, where it is not at the run's model.path")
    options.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="over the run's configuration")
    options.add_argument("--endpoint-url", help="S3 endpoint for stores other than AWS; default: the run's")
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    check_package()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    given = parser().parse_args(arguments)
    disable_progress_bar()  # of the encoders' loading
    with process_group(_TIMEOUT_S) as world:
        try:
            folder = draw(given, world)
        except EXPLAINED as error:
            who = f"rank {world.rank}: " if world.world_size > 1 else ""
            print(f"{who}error: {error}", file=sys.stderr, flush=True)
            if world.world_size == 1:
                return 1
            os._exit(1)  # the others may wait for this rank; torchrun ends them
        if world.rank == 0:
            print(f"images and sheet.png are in {folder}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
