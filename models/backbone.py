"""What the trainer asks of a backbone, and how conditions travel in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from models.encoders.latents import LatentEncoder
    from models.encoders.text import TextEncoder


@dataclass(frozen=True)
class Conditioning:
    """Conditions of B rows, row for row.

    embeds: text embeddings [B, S, D]; mask: True at real tokens [B, S]; pooled: pooled text [B, P] or None;
    references: reference latents of editing, each [B, C, H, W].
    """

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    references: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move all tensors; dtype applies to the floating-point ones."""
        return self._map(
            lambda x: x.to(device, dtype if dtype and x.is_floating_point() else x.dtype, non_blocking=True)
        )

    def expand(self, rows: int) -> Conditioning:
        """The single row of a constant condition (the null prompt), broadcast to `rows` rows without copying."""
        if len(self) != 1:
            raise ValueError(f"only a single row can be broadcast, this condition has {len(self)}")
        return self._map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def cat(self, *others: Conditioning) -> Conditioning:
        """Concatenate rows; shorter texts are padded at the end with masked zeros."""
        parts = (self, *others)
        longest = max(part.embeds.shape[1] for part in parts)
        padded = [part._pad_text(longest) for part in parts]
        return Conditioning(
            embeds=torch.cat([part.embeds for part in padded]),
            mask=torch.cat([part.mask for part in padded]),
            pooled=None if self.pooled is None else torch.cat([_present(part.pooled) for part in padded]),
            references=tuple(torch.cat(group) for group in zip(*(part.references for part in padded), strict=True)),
        )

    def _pad_text(self, length: int) -> Conditioning:
        missing = length - self.embeds.shape[1]
        if missing == 0:
            return self
        return replace(self, embeds=F.pad(self.embeds, (0, 0, 0, missing)), mask=F.pad(self.mask, (0, missing)))

    def _map(self, apply) -> Conditioning:  # type: ignore[no-untyped-def]
        def one(value):  # type: ignore[no-untyped-def]
            if isinstance(value, tuple):
                return tuple(apply(tensor) for tensor in value)
            return None if value is None else apply(value)

        return Conditioning(**{f.name: one(getattr(self, f.name)) for f in fields(self)})


def _present(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("conditions with and without pooled text cannot be concatenated")
    return tensor


class Backbone(Protocol):
    """A velocity network over a diffusers transformer; also an nn.Module, called as `backbone(x_t, t, r, cond)`.

    `forward(x_t, t, r, cond, weights=None)`: x_t [B, C, H, W] float32 (float64 in a float64 model), t and r [B] float32
    in [-1, 1], r=None means r=t; returns the velocity [B, C, H, W] in the dtype of x_t (architecture, contract
    Velocity).
    """

    masked_text: ClassVar[bool]
    """Whether texts differ in length and a mask hides their padding; else all are of one length and read as a whole."""
    takes_references: ClassVar[bool]
    """Whether conditions may carry reference latents (image editing)."""
    text_width: int
    """D of the conditions' embeds [B, S, D]."""
    pooled_width: int | None
    """P of their pooled text [B, P]; None: they have none."""
    patch: int
    """Edge of the square of latents behind one token."""
    pixels_per_latent: int

    @classmethod
    def text_encoder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> TextEncoder:
        """The text encoder that belongs to the backbone, from its model folder."""

    @classmethod
    def latent_encoder(
        cls, path: str | Path, kind: str, device: torch.device | str, dtype: torch.dtype, latents: str, tiling: bool
    ) -> LatentEncoder:
        """Its VAE (kind: vae), or none (pixels); latents: mean | sample of the posterior; tiling: of large images."""

    lora_targets: ClassVar[tuple[str, ...]]
    """Linear layers that get an adapter where the configuration names none, by the end of their names."""
    time_embedding: ClassVar[str]
    """Attribute that holds the time embedding; `<it>_2` holds that of the target time."""

    def shard_units(self) -> Sequence[nn.Module]:
        """Modules that a sharding engine gathers one after the other; they compute in the engine's block dtype."""

    def checkpoint_units(self) -> Sequence[str]:
        """Qualified names of the modules whose activations may be recomputed."""

    def chained_inputs(self) -> Sequence[str]:
        """Names of a checkpoint unit's inputs that its outputs, in this order, replace for the next unit; the other
        inputs are the same for all."""

    def idle_parameters(self) -> Sequence[str]:
        """Names of parameters that never receive a gradient; they are frozen before sharding."""

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Image tokens of a latent [..., H, W]."""

    def flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """Floating-point operations of one forward pass; tokens: of a row's image and references; text_tokens: padded
        length, padding costs the same."""

    def backward_flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """Floating-point operations of one backward pass, without recomputation."""

    def recompute_flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """What a backward pass costs more when the checkpoint units recompute their activations."""

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        """Latent [C, H, W] of an image of (height, width) pixels."""

    def load(self, path: str, seed: int = 0) -> None:
        """Fill the (possibly sharded) parameters from a diffusers model folder; seed: of those that a base model lacks."""

    def export(self, path: str, state: dict[str, Tensor]) -> None:
        """Write a diffusers model folder from a full state dict."""
