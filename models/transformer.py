"""What the backbones over diffusers transformers have in common: folders, weights, shapes, units, checks."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from models import weights as weight_files
from models.backbone import Conditioning
from models.encoders.latents import LatentEncoder
from models.encoders.text import TextEncoder
from models.precision import keep_float64
from models.target_time import TargetTime

LATENT_KINDS = ("vae", "pixels")
TWIN = "TwinFlow"
"""Begins the class names of exported models (models/exported); the rest is the diffusers class."""


@dataclass
class TransformerOptions:
    path: str | None = None
    """Diffusers model folder with transformer/, vae/, and the folders of its text encoders and tokenizers."""
    latents: str = "vae"
    """vae | pixels: what the transformer generates; pixels are for small demonstration images only."""
    dtype: str = "float32"
    """float32 | float64: parameters and times; float64 is for exactness checks."""
    encoder_dtype: str = "float32"
    """float32 | bfloat16: computation of the frozen text encoder and VAE."""


@dataclass
class DispatchedOptions(TransformerOptions):
    attention: str = "auto"
    """auto | native | flash | flash3: PyTorch's attention, or flash-attn 2 or 3 with variable length (GPUs, bfloat16
    blocks). auto takes the fastest that runs here; the log says which and why."""


class TransformerBackbone(TargetTime):
    """Mixin of a diffusers transformer whose blocks are `transformer_blocks`, left of it among the bases; with the
    subclass it implements models.backbone.Backbone.

    config: the transformer's config.json. pixels_per_latent: edge of the square of pixels behind one latent (1: it
    generates pixels); None: that of the released models' VAE. On device "meta" nothing is allocated; materialise with
    `to_empty`, then `load`.
    """

    family: ClassVar[str]
    """Name of the model for messages."""
    class_name: ClassVar[str]
    """Of the diffusers class, as transformer/config.json has it."""
    text_class: ClassVar[type[TextEncoder]]
    latents_class: ClassVar[type[LatentEncoder]]
    masked_text: ClassVar[bool] = True
    takes_references: ClassVar[bool] = False
    lora_targets: ClassVar[tuple[str, ...]]
    unsupported: ClassVar[tuple[str, ...]] = ()
    """Keys of config.json that must be absent or false."""
    released_pixels_per_latent: ClassVar[int] = 8
    new_deviation: ClassVar[float] = 0.02
    """Of the weights of a new E2 (method 3, SD3 and SANA): r = t is the base model, and other r begin near it."""
    pixels_per_latent: int
    config: Any

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        pixels_per_latent: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        with torch.device(device):
            super().__init__(**self._arguments(config))
        self.pixels_per_latent = pixels_per_latent or self.released_pixels_per_latent
        self._adapt()
        self.add_target_time()
        keep_float64(self)  # type: ignore[arg-type]
        nn.Module.to(self, dtype)  # type: ignore[call-overload]  # diffusers' own warns about an empty list of modules

    def _adapt(self) -> None:
        """What a backbone changes in the module that diffusers has made."""

    @classmethod
    @abstractmethod
    def vae_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        """Channels of a latent and the edge of the square of pixels behind it, of vae/config.json."""

    @property
    @abstractmethod
    def latent_channels(self) -> int: ...

    @property
    def patch(self) -> int:
        """Edge of the square of latents behind one token."""
        return int(self.config.patch_size)

    @property
    @abstractmethod
    def text_width(self) -> int: ...

    @property
    def pooled_width(self) -> int | None:
        return None

    @classmethod
    def text_encoder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> TextEncoder:
        return cls.text_class.from_folder(path, device, dtype, max_tokens, null_prompt)

    @classmethod
    def latent_encoder(
        cls,
        path: str | Path,
        kind: str,
        device: torch.device | str,
        dtype: torch.dtype,
        latents: str = "mean",
        tiling: bool = False,
    ) -> LatentEncoder:
        return cls.latents_class.from_folder(path, kind, device, dtype, latents, tiling)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        latents: str = "vae",
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The architecture of a diffusers model folder, without its weights (see `load`).

        Raises:
            ValueError: a model of another family, or a VAE whose latents the transformer does not generate.
        """
        if latents not in LATENT_KINDS:
            raise ValueError(f"model.latents={latents!r} is unknown; choose one of {', '.join(LATENT_KINDS)}")
        config = cls._read_config(weight_files.component(path, "transformer"))
        found = config.get("_class_name", cls.class_name).removeprefix(TWIN)
        if found != cls.class_name:
            raise ValueError(
                f"{path} holds a {found}, but model.name={cls.__module__.rpartition('.')[2]} needs a {cls.class_name}; "
                f"set model.name to its backbone, or model.path to a diffusers {cls.family} model folder"
            )
        if latents == "pixels":
            return cls(config, pixels_per_latent=1, device=device, dtype=dtype)
        channels, pixels = cls.vae_shape(cls._read_config(Path(path) / "vae"))
        made = cls(config, pixels_per_latent=pixels, device=device, dtype=dtype)
        if made.latent_channels != channels:
            raise ValueError(
                f"the VAE in {path} makes latents of {channels} channels, its transformer generates "
                f"{made.latent_channels}; set model.path to a complete {cls.family} folder, or model.latents=pixels"
            )
        return made

    @classmethod
    def _read_config(cls, folder: Path) -> dict[str, Any]:
        file = folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; model.path must be a diffusers {cls.family} model folder")
        config: dict[str, Any] = json.loads(file.read_text())
        return config

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the diffusers class in a config.json. Raises ValueError for those not supported here."""
        refused = [key for key in cls.unsupported if config.get(key)]
        if refused:
            raise ValueError(f"{cls.family} transformers with {' and '.join(refused)} are not supported")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def _check(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> None:
        if cond.references and not self.takes_references:
            raise NotImplementedError(
                f"reference latents (image editing) are not supported by this {self.family} backbone"
            )
        rows, channels, height, width = x_t.shape
        if channels != self.latent_channels or height % self.patch or width % self.patch:
            raise ValueError(
                f"latents of shape {tuple(x_t.shape)} do not fit this transformer: it takes {self.latent_channels} "
                f"channels and a height and width divisible by {self.patch}"
            )
        if len(cond) != rows or t.shape != (rows,):
            raise ValueError(f"{rows} latents came with {len(cond)} conditions and times of shape {tuple(t.shape)}")
        widths = cond.embeds.shape[-1], None if cond.pooled is None else cond.pooled.shape[-1]
        if widths != (self.text_width, self.pooled_width):
            raise ValueError(
                f"conditions of width {widths[0]} (pooled: {widths[1]}) do not fit this transformer, which takes "
                f"{self.text_width} (pooled: {self.pooled_width}); encode the captions with the encoders of its folder"
            )

    def shard_units(self) -> Sequence[nn.Module]:
        return list(self.transformer_blocks)  # type: ignore[attr-defined]

    def checkpoint_units(self) -> Sequence[str]:
        return [f"transformer_blocks.{index}" for index in range(len(self.shard_units()))]

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """Image tokens of a latent [..., H, W]: one for each patch."""
        return latent_shape[-2] * latent_shape[-1] // self.patch**2

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        step = self.pixels_per_latent * self.patch
        if any(edge <= 0 or edge % step for edge in resolution):
            raise ValueError(f"resolution {resolution[0]}x{resolution[1]} [pixels] must be multiples of {step}")
        height, width = (edge // self.pixels_per_latent for edge in resolution)
        return self.latent_channels, height, width

    def backward_flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """Two products for each of the forward pass, but for those whose result nobody asks for. Attention counts as its
        four products; flash kernels compute the scores once more."""
        unasked = self._input_products(tokens, text_tokens)
        return 2 * self.flops(batch, tokens, text_tokens) - 2 * batch * unasked

    @abstractmethod
    def flops(self, batch: int, tokens: int, text_tokens: int) -> int: ...

    @abstractmethod
    def _input_products(self, tokens: int, text_tokens: int) -> int:
        """Multiplications of one row by numbers that get no gradient: the network's inputs, as far as they enter linear
        layers as they are."""

    def load(self, path: str, seed: int = 0) -> None:
        """Fill the parameters from a diffusers folder; `_new_parameters` says how E2 starts where a base checkpoint has
        none."""
        folder = weight_files.component(path, "transformer")
        target = f"{self.time_embedding}_2."
        weight_files.load(self, folder, {target: self._new_parameters(seed)})  # type: ignore[arg-type]

    def _new_parameters(self, seed: int) -> str | weight_files.Start:
        """How the parameters of E2 start: the prefix of those they are copies of, or what makes them."""
        return weight_files.normal_start(self.new_deviation, seed)

    def export(self, path: str, state: dict[str, Tensor]) -> None:
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        expected = {name for name, _ in weight_files.named_tensors(self)}  # type: ignore[arg-type]
        weight_files.export(path, state, self.class_name, config, expected)
