"""What one rank receives for one step: its rows of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.arrays import Array
from data.s3 import DataError
from data.samples import Sample


class Replacement(NamedTuple):
    """A sample that could not be decoded, and what stands in for it.

    row: of the global batch; offset: of its first member in the shard [bytes]; stand_in: key of the sample of the same
    shard that took its place; reason: why, naming shard and key.
    """

    row: int
    shard: str
    key: str
    offset: int
    stand_in: str
    reason: str


@dataclass(frozen=True)
class Embeddings:
    """Text embeddings of n captions: embeds [n, S, D], mask [n, S] bool (True at real tokens), pooled [n, P] or None."""

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Precomputed:
    """What encoders made of n samples, in the dtype that it is stored in.

    text: of the captions; latents: [n, C, h, w], None of captions alone; references: latents of the source images of
    edits, [n, C, h', w']; null: null condition of each row, edits alone.
    """

    text: Embeddings
    latents: Tensor | None = None
    references: Tensor | None = None
    null: Embeddings | None = None


@dataclass(frozen=True)
class Batch:
    """Rows [rank * n, (rank + 1) * n) of global step `step`.

    pixels: [n, C, H, W] float32 in [-1, 1], None where the data holds captions alone or is precomputed; source_pixels:
    [n, C, H', W'] the same of the source images of edits; precomputed: instead of both; captions, keys, shards: n
    strings; own_epochs: n passes through the stream completed before this sample; bucket: (height, width) of every
    image; rows: [n] int64 row in the global batch; replaced: rows whose own sample could not be decoded (keys then names
    the stand-in).
    """

    step: int
    bucket: tuple[int, int]
    rows: Tensor
    pixels: Tensor | None
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    shards: tuple[str, ...]
    own_epochs: tuple[int, ...]
    replaced: tuple[Replacement, ...] = ()
    source_pixels: Tensor | None = None
    precomputed: Precomputed | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_targets(self) -> bool:
        """Whether there are images or latents to train on."""
        return self.pixels is not None or (self.precomputed is not None and self.precomputed.latents is not None)

    @property
    def has_sources(self) -> bool:
        """Whether these are edits, of images or of latents."""
        return self.source_pixels is not None or (
            self.precomputed is not None and self.precomputed.references is not None
        )

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, apply: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with its images, latents and embeddings mapped; rows stay where they are."""

        def one(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else apply(tensor)

        def text(given: Embeddings) -> Embeddings:
            return Embeddings(apply(given.embeds), apply(given.mask), one(given.pooled))

        made = self.precomputed
        if made is not None:
            null = None if made.null is None else text(made.null)
            made = Precomputed(text(made.text), one(made.latents), one(made.references), null)
        return replace(self, pixels=one(self.pixels), source_pixels=one(self.source_pixels), precomputed=made)


def collate(
    step: int,
    bucket: tuple[int, int],
    rows: range,
    samples: Sequence[Sample],
    shards: Sequence[str],
    own_epochs: Sequence[int],
    replaced: Sequence[Replacement],
    dtype: str | None,
) -> Batch:
    """The batch of decoded samples. rows: of the global batch; dtype: of precomputed arrays, None of other samples."""
    return Batch(
        step=step,
        bucket=(bucket[0], bucket[1]),
        rows=torch.arange(rows.start, rows.stop),
        pixels=_stacked([sample.pixels for sample in samples]),
        source_pixels=_stacked([sample.source_pixels for sample in samples]),
        precomputed=None if dtype is None else _precomputed(samples, dtype),
        captions=tuple(sample.caption for sample in samples),
        keys=tuple(sample.key for sample in samples),
        shards=tuple(shards),
        own_epochs=tuple(own_epochs),
        replaced=tuple(sorted(replaced)),
    )


def _stacked(images: Sequence[Array | None]) -> Tensor | None:
    """[n, C, H, W] of n images of one size; None where there are none."""
    found = [image for image in images if image is not None]
    return torch.from_numpy(np.stack(found)) if found else None


def _precomputed(samples: Sequence[Sample], dtype: str) -> Precomputed:
    """Rows of arrays in the data set's dtype; shorter texts are padded at the end with masked zeros.

    Raises DataError where an array that the manifest does not describe (pooled) differs in shape between samples, or only
    some have it.
    """

    def stacked(name: str) -> Tensor | None:
        shapes = {sample.arrays[name].shape if name in sample.arrays else None: sample.key for sample in samples}
        if len(shapes) > 1:
            said = ", ".join(f"{shape or 'none'} in sample {key}" for shape, key in shapes.items())
            raise DataError(f"{name} differs between the samples of a batch ({said}); pack their shards again")
        if None in shapes:
            return None
        return to_tensor(np.stack([sample.arrays[name] for sample in samples]), dtype)

    def text(name: str, mask: str, pooled: str) -> Embeddings:
        longest = max(len(sample.arrays[name]) for sample in samples)
        texts = np.stack([_padded(sample.arrays[name], longest) for sample in samples])
        masks = np.stack([_padded(sample.arrays[mask], longest) for sample in samples])
        return Embeddings(to_tensor(texts, dtype), torch.from_numpy(masks), stacked(pooled))

    null = text("null", "null_mask", "null_pooled") if "null" in samples[0].arrays else None
    return Precomputed(text("text", "mask", "pooled"), stacked("latent"), stacked("reference"), null)


def to_tensor(array: Array, dtype: str) -> Tensor:
    """Stored numbers as a tensor of `dtype` (bfloat16 is stored as uint16)."""
    tensor = torch.from_numpy(np.array(array))  # a copy: what is read from a file may not be written to
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _padded(array: Array, length: int) -> Array:
    return np.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])
