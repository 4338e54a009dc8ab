"""From a batch to what the objective works on: latents, conditions, null conditions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from data.batch import Batch, Embeddings, Precomputed
from models.backbone import Conditioning
from models.encoders.latents import LatentEncoder
from models.encoders.text import TextEncoder
from trainer.objectives.random_streams import normals, purpose_id


@dataclass
class Encoding:
    """The frozen encoders of a run, loaded when they are first needed: precomputed data may never need them.

    needs_null: whether the objective evaluates the null condition; latent_shape: [C, H, W] of the latents of a bucket;
    stored_null: null condition that lies beside precomputed data, one row; keeps_text: whether the text encoder stays
    after `keep_prompts`, because batches hold captions; seed: of latents drawn from the VAE's posterior (law 2).
    """

    load_text: Callable[[], TextEncoder]
    load_latents: Callable[[], LatentEncoder]
    device: torch.device
    needs_null: bool
    latent_shape: Callable[[tuple[int, int]], tuple[int, int, int]]
    stored_null: Conditioning | None = None
    keeps_text: bool = True
    seed: int = 0
    _kept: dict[str, Conditioning] = field(default_factory=dict)

    @cached_property
    def text(self) -> TextEncoder:
        return self.load_text()

    @cached_property
    def latents(self) -> LatentEncoder:
        return self.load_latents()

    def load(self, *, text: bool, latents: bool) -> None:
        """Load the encoders that will be needed now."""
        if text:
            _ = self.text
        if latents:
            _ = self.latents

    @property
    def truncated(self) -> int:
        """Captions cut by the tokenizer so far; those of precomputed data were counted when it was packed."""
        return self.text.truncated if "text" in self.__dict__ else 0

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning, Conditioning | None]:
        """Latents [n, C, H, W] float32, the rows' conditions, and as many rows of the null condition (None if unused).

        Latents of captions alone are zeros: image-free objectives put samples of the network in their place. The
        conditions of edits, null ones too, carry the latents of the row's own source image, which the text encoder sees.
        """
        sources = () if batch.source_pixels is None else (batch.source_pixels,)
        batch = batch.to(self.device)
        if batch.precomputed is not None:
            x, references, cond, null = self._stored(batch.precomputed)
        else:
            x = None if batch.pixels is None else self.latents.encode(batch.pixels, self._noise(batch))
            references = () if batch.source_pixels is None else (self.latents.encode(batch.source_pixels),)
            cond, null = self._encoded(batch.captions, sources), None
            if self.needs_null and sources:
                null = self._encoded([self.text.null_prompt] * len(batch), sources)
        if x is None:
            x = torch.zeros(len(batch), *self.latent_shape(batch.bucket), device=self.device)
        if self.needs_null and null is None:
            null = self._null().to(self.device, torch.float32).expand(len(batch))
        rows_null = replace(null, references=references) if self.needs_null and null is not None else None
        return x, replace(cond, references=references), rows_null

    def prompts(self, captions: Sequence[str]) -> Conditioning:
        """Conditions of B captions, float32 on the device."""
        if self._kept.keys() >= set(captions):
            first, *others = (self._kept[caption] for caption in captions)
            return first.cat(*others).to(self.device)
        return self._encoded(captions)

    def keep_prompts(self, captions: Sequence[str]) -> None:
        """Encode captions that will be asked for again; the text encoder goes where it has nothing else to do."""
        if self.keeps_text or not captions:
            return
        unique = list(dict.fromkeys(captions))
        for caption in unique:
            self._kept[caption] = self._encoded([caption]).to("cpu")
        self.__dict__.pop("text", None)

    def _noise(self, batch: Batch) -> Tensor | None:
        """Noise of the posterior's samples, a function of seed, step and row; None where latents are its mean."""
        if not self.latents.samples:
            return None
        shape = self.latent_shape(batch.bucket)
        return normals(self.seed, batch.step, purpose_id("latents"), batch.rows, shape, self.device)

    def _encoded(self, captions: Sequence[str], sources: Sequence[Tensor] = ()) -> Conditioning:
        return self.text.encode(captions, sources).to(self.device, torch.float32)

    def _null(self) -> Conditioning:
        return self.text.null() if self.stored_null is None else self.stored_null

    def _stored(self, made: Precomputed) -> tuple[Tensor | None, tuple[Tensor, ...], Conditioning, Conditioning | None]:
        """Latents, references, conditions and null conditions of precomputed data, in float32."""
        x = None if made.latents is None else made.latents.float()
        references = () if made.references is None else (made.references.float(),)
        null = None if made.null is None else conditioning(made.null).to(self.device, torch.float32)
        return x, references, conditioning(made.text).to(self.device, torch.float32), null


def conditioning(text: Embeddings) -> Conditioning:
    return Conditioning(text.embeds, text.mask, text.pooled)
