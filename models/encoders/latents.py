"""Frozen VAEs: pixels to latents and back. What differs between them lies in models/encoders/<backbone>.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from models.encoders.text import Shards, frozen, subfolder


class LatentEncoder(ABC):
    """Pixels [B, 3, H, W] in [-1, 1] to latents the transformer generates, float32, and back.

    Without a VAE (model.latents: pixels) pixels are the latents. samples: latents are drawn from the VAE's posterior,
    for which `encode` wants noise; else they are its mean. tiling: images larger than the VAE's tile are encoded and
    decoded in overlapping tiles.
    """

    vae_class: ClassVar[Any]
    """Class of vae/."""
    family: ClassVar[str]
    """Name of the model for messages."""

    def __init__(self, vae: Any | None, samples: bool = False, tiling: bool = False):
        self.vae = vae
        self.samples = samples and vae is not None
        if vae is not None:
            # Image by image: memory stays that of one image, and latents do not depend on the batch.
            vae.enable_slicing()
            if tiling:
                vae.enable_tiling()

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        kind: str,
        device: torch.device | str,
        dtype: torch.dtype,
        latents: str = "mean",
        tiling: bool = False,
    ) -> Self:
        """kind: "vae" loads vae/ of a diffusers model folder, "pixels" loads nothing; latents: mean | sample."""
        if latents not in ("mean", "sample"):
            raise ValueError(f"encoder.latents={latents!r} is unknown; choose mean or sample")
        if kind == "pixels":
            return cls(None)
        if kind != "vae":
            raise ValueError(f"model.latents={kind!r} is unknown; choose vae or pixels")
        vae = cls.vae_class.from_pretrained(
            subfolder(path, "vae", cls.family), torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
        return cls(frozen(vae, device), latents == "sample", tiling)

    def shards(self) -> list[Shards]:
        """As of TextEncoder; none without a VAE. It is one unit, so that a call gathers once and not once an image."""
        return [] if self.vae is None else [(self.vae, [], ("encode", "decode"))]

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w]: the posterior's mean, or mean + standard deviation x noise with standard normal noise of
        their shape."""
        if self.vae is None:
            return pixels
        mean, deviation = self._posterior(pixels.to(self.vae.dtype))
        if noise is None:
            return self._normalised(mean.float())
        return self._normalised(mean.float() + deviation.float() * noise.to(mean.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] clamped to [-1, 1], float32; pixel latents come back as they are."""
        if self.vae is None:
            return latents
        return self._pixels(self._raw(latents.float()).to(self.vae.dtype)).float().clamp(-1, 1)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's own latents [B, C, h, w]."""
        found = self.vae.encode(pixels).latent_dist  # type: ignore[union-attr]
        return found.mode(), found.std

    def _pixels(self, latents: Tensor) -> Tensor:
        """Pixels of the VAE's own latents."""
        decoded: Tensor = self.vae.decode(latents).sample  # type: ignore[union-attr]
        return decoded

    @abstractmethod
    def _normalised(self, latents: Tensor) -> Tensor:
        """The VAE's own latents as the transformer generates them, with the constants of its configuration."""

    @abstractmethod
    def _raw(self, latents: Tensor) -> Tensor:
        """Inverse of `_normalised`."""


class ShiftedLatents(LatentEncoder):
    """AutoencoderKL: latents are (raw - shift_factor) scaling_factor (SD3, Z-Image)."""

    vae_class = AutoencoderKL

    def _normalised(self, latents: Tensor) -> Tensor:
        config = self.vae.config  # type: ignore[union-attr]
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def _raw(self, latents: Tensor) -> Tensor:
        config = self.vae.config  # type: ignore[union-attr]
        return latents / config.scaling_factor + (config.shift_factor or 0.0)
