"""What the samples of a data set hold, and what is drawn anew in every own epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from data.permutation import keys, uniform, word

KINDS = ("images", "captions", "edits")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Latents and embeddings in place of images, from which encoders made them.

    dtype: of the numbers, float32 | float16 | bfloat16 (in .npy files as uint16). latent_kind: model.latents; latents,
    text: digests of the latent and of the text encoder, latents is "" where there are only captions.
    latent_channels, pixels_per_latent: a bucket of H x W pixels has latents [latent_channels, H / pixels_per_latent,
    W / pixels_per_latent]; text_width: of an embedding; max_text_tokens, null_prompt: section encoder.
    """

    dtype: str
    latent_kind: str
    latents: str
    text: str
    latent_channels: int
    pixels_per_latent: int
    text_width: int
    max_text_tokens: int
    null_prompt: str


@dataclass(frozen=True, slots=True)
class Contents:
    """kind: images (with captions), captions alone, or edits (source image, target image, instruction);
    channels: of the images, 1 or 3; encoded: None where images and texts are stored as such."""

    kind: str = "images"
    channels: int = 3
    encoded: Encoded | None = None

    @property
    def has_targets(self) -> bool:
        """Whether samples hold an image to train on, encoded or not."""
        return self.kind != "captions"


class Draw(NamedTuple):
    """What decides the random choices of reading: seed of the run, own epoch of the sample. flip: images may be
    mirrored. Any rank, worker and resumed run chooses the same."""

    seed: int = 0
    own_epoch: int = 0
    flip: bool = False

    def choose(self, purpose: str, sample: str, count: int) -> int:
        """A number below `count` for a sample, named with its source."""
        key = keys(self.seed, word(purpose), self.own_epoch, word(sample))
        return int(uniform(key)[0] * count)
