"""Samples by global id, spread over ranks, and the contact sheet a person looks at.

A sample is a function of (weights, condition, sampler, seed, id): its numbers do not depend on the rank, the chunk or
the rows beside it (rounding of the network apart). All ranks make the same network calls: they hold equally many rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from trainer.generate.sampler import Sampler
from trainer.objectives.objective import Nets
from trainer.objectives.random_streams import normals, purpose_id

_CELL = (64, 256)
"""Smallest and largest side of a picture on the sheet [pixels]."""
_GAP = 4
_FONT_SIZE = 15
_BROKEN = np.array([255, 0, 255], dtype=np.uint8)


def share(total: int, rank: int, world_size: int) -> Tensor:
    """This rank's ids of 0 .. total - 1: ceil(total / world_size) in a row [n] int64.

    Ranks beyond the end repeat the last id, so that all make the same calls; `gather` drops the repetitions.
    """
    if total < 1:
        raise ValueError(f"nothing to sample: {total} samples")
    count = -(-total // world_size)
    return torch.arange(rank * count, (rank + 1) * count).clamp_max(total - 1)


def gather(local: Tensor, total: int) -> Tensor | None:
    """The rows [total, ...] of all ranks in the order of `share`, on the CPU of rank 0; None elsewhere.

    A collective: every rank calls it with equally many rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local[:total].cpu()
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(local.contiguous(), parts, dst=0)
    return None if parts is None else torch.cat(parts)[:total].cpu()


@torch.no_grad()
def sample(
    nets: Nets,
    conditioning: Any,
    latent_shape: tuple[int, ...],
    sampler: Sampler,
    seed: int,
    ids: Tensor,
    device: torch.device | str,
    chunk: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Latents [n, *latent_shape] of the samples `ids` [n], row i under conditioning[i]; in `dtype`, which is also what
    the network is given. chunk: most rows of one network call.

    The start noise of an id is the same for every sampler and at every step of training, so that grids can be compared.
    """
    if len(conditioning) != len(ids):
        raise ValueError(f"{len(ids)} samples were asked for under {len(conditioning)} conditions")
    parts = []
    for rows in _chunks(len(ids), chunk):
        cond, keys = conditioning[rows], ids[rows]

        def velocity(x_t: Tensor, t: Tensor, r: Tensor, cond: Any = cond) -> Tensor:
            return nets.velocity(x_t.to(dtype), t.to(dtype), r.to(dtype), cond)

        def numbers(purpose: str, step: int, keys: Tensor = keys) -> Tensor:
            return normals(seed, step, purpose_id(purpose), keys, latent_shape, device, torch.float64)

        start = numbers("sample.start", 0)
        parts.append(sampler.sample(velocity, start, lambda i, draw=numbers: draw("sample.renoise", i)).to(dtype))  # type: ignore[misc]
    return torch.cat(parts)


def _chunks(rows: int, chunk: int | None) -> list[slice]:
    size = chunk or rows
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def write_grid(path: str | Path, images: Tensor, captions: Sequence[str], title: str = "") -> Path:
    """Write a PNG contact sheet: one caption and one row of pictures each, under an optional title.

    images: [len(captions) * columns, C, H, W] in [-1, 1], C = 1 or 3, row by row. Small pictures are enlarged by a
    whole factor with hard pixels, large ones reduced. Values that are not finite are shown in magenta. The captions are
    also kept whole in the file's text fields. The file appears complete or not at all. ValueError for a wrong shape.
    """
    shape_fits = images.ndim == 4 and images.shape[1] in (1, 3) and len(images) > 0
    if not shape_fits or not captions or len(images) % len(captions):
        raise ValueError(f"cannot lay out images {tuple(images.shape)} in {len(captions)} captioned rows")
    columns = len(images) // len(captions)
    cells = [_cell(image) for image in images.detach().float().cpu()]
    width, height = cells[0].size
    font = ImageFont.load_default(size=_FONT_SIZE)
    line = _FONT_SIZE + 2 * _GAP
    top = line if title else 0
    sheet_width = max(columns * (width + _GAP) + _GAP, 320)
    sheet = Image.new("RGB", (sheet_width, top + len(captions) * (line + height + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), _shorten(title, font, sheet_width), fill="black", font=font)
    for row, caption in enumerate(captions):
        y = top + row * (line + height + _GAP)
        draw.text((_GAP, y + _GAP), _shorten(caption, font, sheet_width), fill="black", font=font)
        for column in range(columns):
            sheet.paste(cells[row * columns + column], (_GAP + column * (width + _GAP), y + line))
    return _publish(sheet, Path(path), captions, title)


def picture(image: Tensor) -> Image.Image:
    """[C, H, W] in [-1, 1], C = 1 or 3, on the CPU, as a picture; values that are not finite are magenta."""
    channels_last = image.expand(3, -1, -1).permute(1, 2, 0)
    values = ((channels_last.clamp(-1.0, 1.0) + 1.0) * 127.5).round().nan_to_num(0.0).to(torch.uint8)
    pixels: NDArray[np.uint8] = values.numpy().copy()
    pixels[(~channels_last.isfinite()).any(dim=-1).numpy()] = _BROKEN
    return Image.fromarray(pixels)


def _cell(image: Tensor) -> Image.Image:
    """One picture at its size on the sheet."""
    whole = picture(image)
    longest = max(whole.size)
    if longest < _CELL[0]:
        factor = -(-_CELL[0] // longest)
        return whole.resize((whole.width * factor, whole.height * factor), Image.Resampling.NEAREST)
    if longest > _CELL[1]:
        scale = _CELL[1] / longest
        small = (max(1, round(whole.width * scale)), max(1, round(whole.height * scale)))
        return whole.resize(small, Image.Resampling.LANCZOS)
    return whole


def _shorten(text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width - 2 * _GAP:
        return text
    while text and font.getlength(text + "...") > width - 2 * _GAP:
        text = text[:-1]
    return text + "..."


def _publish(sheet: Image.Image, path: Path, captions: Sequence[str], title: str) -> Path:
    text = PngInfo()
    text.add_itxt("Title", title)
    text.add_itxt("Captions", "\n".join(captions))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    sheet.save(partial, format="PNG", pnginfo=text)
    partial.replace(path)
    return path
