"""Frozen text encoders: captions to conditions. Each backbone has one of its own (models/encoders/<backbone>.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from models.backbone import Conditioning

Shards = tuple[nn.Module, list[nn.Module], tuple[str, ...]]
"""A frozen network, the modules of it that run one after the other, once a call, and its methods beside forward."""


class TextEncoder(ABC):
    """Captions to Conditioning through the prompt code of the backbone's diffusers pipeline.

    truncated: captions longer than max_tokens seen so far, each occurrence counted.
    """

    longest: ClassVar[int]
    """Most tokens of a caption that the pipeline takes."""
    sees_images: ClassVar[bool] = False
    """Whether captions are instructions, encoded with the source images that they are about."""

    def __init__(self, max_tokens: int, null_prompt: str):
        if not 1 <= max_tokens <= self.longest:
            raise ValueError(f"encoder.max_text_tokens={max_tokens} must lie between 1 and {self.longest}")
        self.max_tokens = max_tokens
        self.null_prompt = null_prompt
        self.truncated = 0
        self._null: Conditioning | None = None

    @classmethod
    @abstractmethod
    def from_folder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> Self:
        """Load encoders and tokenizers of a diffusers model folder; nothing is fetched."""

    @abstractmethod
    def shards(self) -> list[Shards]:
        """The networks as an engine can spread them over ranks."""

    @torch.no_grad()
    def encode(self, captions: Sequence[str], sources: Sequence[Tensor] = ()) -> Conditioning:
        """Conditions of B captions, padded to the longest; equal captions are encoded once. embeds: encoder dtype.

        sources: source images of edits, which encoders that see none refuse.
        """
        if not captions:
            raise ValueError("no captions to encode")
        if sources:
            raise ValueError(
                "this model's text encoder sees no images: to train on edits, set model.path to a Qwen-Image-Edit folder"
            )
        unique = list(dict.fromkeys(captions))
        encoded, cut = self._encode(unique)
        position = {caption: index for index, caption in enumerate(unique)}
        rows = torch.tensor([position[caption] for caption in captions])
        self.truncated += int(cut.cpu()[rows].sum())
        return encoded[rows.to(encoded.embeds.device, non_blocking=True)]

    def null(self) -> Conditioning:
        """The condition of the null prompt, one row; encoded at the first call and kept."""
        if self._null is None:
            self._null = self._encode_null()
        return self._null

    @abstractmethod
    def _encode(self, captions: list[str]) -> tuple[Conditioning, Tensor]:
        """Conditions of different captions, and which of them were cut (bool [n])."""

    def _encode_null(self) -> Conditioning:
        return self.encode([self.null_prompt])


def frozen(model: nn.Module, device: torch.device | str) -> Any:
    """The network on the device, for inference alone."""
    return model.requires_grad_(False).eval().to(device)


def working(tokenizer: Any, path: str | Path) -> Any:
    """The tokenizer. Raises ValueError where it is none: transformers accepts vocabulary files that it does not
    understand, and such a tokenizer yields no tokens at all."""
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"the tokenizer in {path} turns text into no tokens; its files do not fit this transformers")
    return tokenizer


def subfolder(path: str | Path, name: str, family: str) -> Path:
    """path/name. Raises FileNotFoundError, naming the kind of model folder that is needed, where there is none."""
    folder = Path(path) / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; model.path must be a diffusers {family} model folder")
    return folder
