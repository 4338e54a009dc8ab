"""Stable Diffusion 3.5 (medium, large): the diffusers transformer as a velocity network with a target time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from models.backbone import Conditioning
from models.encoders.sd3 import SD3Latents, SD3Text
from models.target_time import SINUSOID
from models.transformer import TransformerBackbone, TransformerOptions


@dataclass
class SD3Options(TransformerOptions):
    pass


class SD3(TransformerBackbone, SD3Transformer2DModel):
    """Backbone over diffusers' SD3Transformer2DModel; parameter names are its own plus `time_text_embed_2.*`.

    Conditions are of one length and have no mask: padding is read, as in pretraining. They carry pooled texts, which
    both time embeddings take in.
    """

    family, class_name = "Stable Diffusion 3", "SD3Transformer2DModel"
    text_class, latents_class = SD3Text, SD3Latents
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
    )
    masked_text = False
    time_scale = 1000.0

    @classmethod
    def vae_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return int(self.config.in_channels)

    @property
    def text_width(self) -> int:
        return int(self.config.joint_attention_dim)

    @property
    def pooled_width(self) -> int:
        return int(self.config.pooled_projection_dim)

    def latent_shape(self, resolution: tuple[int, int]) -> tuple[int, int, int]:
        shape = super().latent_shape(resolution)
        most = self.config.pos_embed_max_size * self.patch * self.pixels_per_latent
        if max(resolution) > most:
            raise ValueError(
                f"resolution {resolution[0]}x{resolution[1]} [pixels] is beyond this transformer's positions, which end "
                f"at {most}; pack smaller images"
            )
        return shape

    def forward(
        self, x_t: Tensor, t: Tensor, r: Tensor | None, cond: Conditioning, weights: Tensor | None = None
    ) -> Tensor:
        """Mean velocity from t down to r (method 1), [B, C, H, W] in the dtype of x_t; r=None means r=t.

        x_t: latents [B, C, H, W]; t, r: [B] in [-1, 1], float32 or float64; cond: B rows, all of one length. All rows
        share these parameters, so `weights` changes nothing here.
        """
        self._check(x_t, t, cond)
        dtype = self.context_embedder.weight.dtype
        with self.times(t, t if r is None else r):
            (velocity,) = super().forward(
                hidden_states=x_t.to(dtype),
                encoder_hidden_states=cond.embeds.to(dtype),
                pooled_projections=cond.pooled.to(dtype),  # type: ignore[union-attr]
                timestep=t,
                return_dict=False,
            )
        return velocity.to(x_t.dtype)

    def _check(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> None:
        super()._check(x_t, t, cond)
        # On a GPU without waiting for it.
        torch._assert_async(cond.mask.all(), "SD3 reads every text token: its conditions must not be padded")

    def chained_inputs(self) -> Sequence[str]:
        return ("encoder_hidden_states", "hidden_states")

    def idle_parameters(self) -> Sequence[str]:
        """None: the last block has no text output that could be discarded."""
        return ()

    def flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """Matrix products and attention of one forward pass; tokens: image tokens (patches) of a row."""
        width, patch_width = self.inner_dim, self.patch**2 * self.out_channels
        ends = self._input_products(tokens, text_tokens)
        ends += 2 * 2 * width**2  # second layers of times and pooled texts, in both embeddings
        ends += 2 * width**2 + tokens * width * patch_width
        return self.recompute_flops(batch, tokens, text_tokens) + 2 * batch * ends

    def _input_products(self, tokens: int, text_tokens: int) -> int:
        latents = tokens * self.patch**2 * self.latent_channels
        texts = text_tokens * self.text_width
        return (latents + texts + 2 * (SINUSOID + self.pooled_width)) * int(self.inner_dim)

    def recompute_flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """The forward pass of the blocks, all of which are checkpoint units."""
        width, joint = self.inner_dim, tokens + text_tokens
        blocks, dual = len(self.transformer_blocks), len(self.config.dual_attention_layers)
        block = 2 * 6 * width**2  # modulation of both streams, once per row
        block += joint * (3 + 1 + 8) * width**2  # query, key, value; output; feed-forward of 4 x width
        block += 2 * joint**2 * width  # scores and weighted sum
        second = 3 * width**2 + tokens * (3 + 1) * width**2 + 2 * tokens**2 * width  # of the image tokens alone
        absent = 4 * width**2 + text_tokens * (1 + 8) * width**2  # the last block's text output
        return 2 * batch * (blocks * block + dual * second - absent)
