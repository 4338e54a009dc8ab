"""SANA (0.6B, 1.6B): the diffusers transformer as a velocity network with a target time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import SanaTransformer2DModel
from torch import Tensor

from models.backbone import Conditioning
from models.encoders.sana import SanaLatents, SanaText
from models.target_time import SINUSOID
from models.transformer import TransformerBackbone, TransformerOptions

TRAINING_TIMES = 1000  # the time 1 in the steps of SANA's scheduler


@dataclass
class SanaOptions(TransformerOptions):
    pass


class Sana(TransformerBackbone, SanaTransformer2DModel):
    """Backbone over diffusers' SanaTransformer2DModel; parameter names are its own plus `time_embed_2.*`.

    Both outputs of the time embedding, the modulation of all blocks and the embedded time of the last norm, get a
    second part.
    """

    family, class_name = "SANA", "SanaTransformer2DModel"
    text_class, latents_class = SanaText, SanaLatents
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2", "time_embed.linear", "time_embed_2.linear"),
    )
    time_embedding = "time_embed"
    unsupported = ("guidance_embeds", "dropout")
    released_pixels_per_latent = 32

    def _adapt(self) -> None:
        if self.config.out_channels not in (None, self.config.in_channels):
            raise ValueError(
                f"SANA transformers with out_channels={self.config.out_channels} for {self.config.in_channels} latent "
                "channels (learned variances) are not supported"
            )
        # A table of positions is in no checkpoint and would not come back from the meta device: it is made in each pass.
        self.patch_embed.height = self.patch_embed.width = None
        self.time_scale = TRAINING_TIMES * self.config.timestep_scale

    @classmethod
    def vae_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return int(self.config.in_channels)

    @property
    def text_width(self) -> int:
        return int(self.config.caption_channels)

    def forward(
        self, x_t: Tensor, t: Tensor, r: Tensor | None, cond: Conditioning, weights: Tensor | None = None
    ) -> Tensor:
        """Mean velocity from t down to r (method 1), [B, C, H, W] in the dtype of x_t; r=None means r=t.

        x_t: latents [B, C, H, W]; t, r: [B] in [-1, 1], float32 or float64; cond: B rows. All rows share these
        parameters, so `weights` changes nothing here.
        """
        self._check(x_t, t, cond)
        dtype = self.proj_out.weight.dtype
        # Padding is masked, but not-a-number times zero would come through.
        embeds = cond.embeds.masked_fill(~cond.mask[..., None], 0)
        with self.times(t, t if r is None else r):
            # The mask goes in even when it is all ones: a row must not depend on the captions of the other rows.
            (velocity,) = super().forward(
                hidden_states=x_t.to(dtype),
                encoder_hidden_states=embeds.to(dtype),
                encoder_attention_mask=cond.mask,
                timestep=t,
                return_dict=False,
            )
        return velocity.to(x_t.dtype).contiguous()  # a view of the tokens would be no place for an engine's hooks

    def chained_inputs(self) -> Sequence[str]:
        return ("hidden_states",)

    def idle_parameters(self) -> Sequence[str]:
        """None: texts are read by every block and written by none."""
        return ()

    @property
    def _width(self) -> int:
        return int(self.config.num_attention_heads * self.config.attention_head_dim)

    def flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """Matrix products, convolutions and attention of one forward pass; tokens: image tokens of a row."""
        width = self._width
        ends = self._input_products(tokens, text_tokens)
        ends += 2 * (1 + 6) * width**2  # second layer and modulation, in both time embeddings
        ends += text_tokens * width**2 + tokens * width * self.patch**2 * self.latent_channels
        return self.recompute_flops(batch, tokens, text_tokens) + 2 * batch * ends

    def _input_products(self, tokens: int, text_tokens: int) -> int:
        latents = tokens * self.patch**2 * self.latent_channels
        return (latents + text_tokens * self.text_width + 2 * SINUSOID) * self._width

    def recompute_flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """The forward pass of the blocks, all of which are checkpoint units."""
        config, width = self.config, self._width
        cross = config.num_cross_attention_heads * config.cross_attention_head_dim
        hidden = int(config.mlp_ratio * width)
        block = 4 * tokens * width**2  # query, key, value, output of the linear attention to the image
        block += 2 * tokens * width * (config.attention_head_dim + 1)  # its state, with the normaliser, and its reading
        block += 2 * (tokens * width + text_tokens * config.cross_attention_dim) * cross  # attention to the text
        block += 2 * tokens * text_tokens * cross  # its scores and weighted sum
        block += tokens * (3 * width + 2 * 9) * hidden  # feed-forward: inverted, depthwise (3 x 3), point convolution
        return 2 * batch * len(self.transformer_blocks) * block
