"""Qwen-Image and Qwen-Image-Edit: the diffusers transformer as a velocity network with a target time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers import transformer_qwenimage
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor, nn

from models import attention
from models.attention import Dispatched
from models.backbone import Conditioning
from models.encoders.qwen_image import QwenImageLatents, QwenImageText
from models.encoders.qwen_image_edit import QwenImageEditText, edit_pipeline
from models.encoders.text import TextEncoder
from models.target_time import SINUSOID
from models.transformer import DispatchedOptions, TransformerBackbone


@dataclass
class QwenImageOptions(DispatchedOptions):
    pass


class QwenImage(Dispatched, TransformerBackbone, QwenImageTransformer2DModel):
    """Backbone over diffusers' QwenImageTransformer2DModel; parameter names are its own plus `time_text_embed_2.*`."""

    family, class_name = "Qwen-Image", "QwenImageTransformer2DModel"
    text_class, latents_class = QwenImageText, QwenImageLatents
    takes_references = True
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        *("timestep_embedder.linear_1", "timestep_embedder.linear_2"),
    )

    unsupported = ("guidance_embeds", "use_additional_t_cond", "use_layer3d_rope")
    _packs = False

    def _adapt(self) -> None:
        # The rotary tables are plain attributes: to_empty() would not bring them back from the meta device.
        with torch.device("cpu"):
            self.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(self.config.axes_dims_rope), scale_rope=True)

    def _new_parameters(self, seed: int) -> str:
        """As copies of E1, as published."""
        return f"{self.time_embedding}."

    @classmethod
    def text_encoder(
        cls, path: str | Path, device: torch.device | str, dtype: torch.dtype, max_tokens: int, null_prompt: str
    ) -> TextEncoder:
        kind = QwenImageText if edit_pipeline(path) is None else QwenImageEditText
        return kind.from_folder(path, device, dtype, max_tokens, null_prompt)

    @property
    def time_rows(self) -> int:
        """Times of one row: with zero_cond_t (Qwen-Image-Edit-2511) references have one of their own, which is 0."""
        return 2 if self.config.zero_cond_t else 1

    @classmethod
    def vae_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["z_dim"], 2 ** len(config["temperal_downsample"])

    @property
    def latent_channels(self) -> int:
        return int(self.out_channels)

    @property
    def text_width(self) -> int:
        return int(self.config.joint_attention_dim)

    def forward(
        self, x_t: Tensor, t: Tensor, r: Tensor | None, cond: Conditioning, weights: Tensor | None = None
    ) -> Tensor:
        """Mean velocity from t down to r (method 1), [B, C, H, W] in the dtype of x_t; r=None means r=t.

        x_t: latents [B, C, H, W]; t, r: [B] in [-1, 1], float32 or float64; cond: B rows. All rows share these
        parameters, so `weights` changes nothing here.
        """
        self._check(x_t, t, cond)
        # Padding is masked, but not-a-number times zero would come through.
        embeds = cond.embeds.masked_fill(~cond.mask[..., None], 0)
        dtype, patch = self.img_in.weight.dtype, self.patch
        rows, _, height, width = x_t.shape
        # References follow the image as further tokens and frames; what comes out in their place is nobody's.
        images = (x_t, *cond.references)
        tokens = torch.cat([pack(image.to(dtype), patch) for image in images], dim=1)
        grids = [(1, image.shape[2] // patch, image.shape[3] // patch) for image in images]
        with self.times(*(self._with_zero(time) for time in (t, t if r is None else r))):
            # The mask goes in even when it is all ones: a row must not depend on the captions of the other rows.
            (out,) = super().forward(
                hidden_states=tokens,
                encoder_hidden_states=embeds.to(dtype),
                encoder_hidden_states_mask=cond.mask,
                timestep=t,
                img_shapes=[grids] * rows,
                attention_kwargs=self._packing(cond.mask, tokens.shape[1]),
                return_dict=False,
            )
        return unpack(out[:, : self.tokens(x_t.shape)], patch, height, width).to(x_t.dtype)

    def _with_zero(self, times: Tensor) -> Tensor:
        """The times of all rows, then those of their references, as diffusers orders them."""
        return times if self.time_rows == 1 else torch.cat([times, torch.zeros_like(times)])

    @property
    def head_width(self) -> int:
        return int(self.config.attention_head_dim)

    def use_attention(self, requested: str, device: torch.device, dtype: torch.dtype) -> attention.Choice:
        choice = super().use_attention(requested, device, dtype)
        self._packs = choice.name != "native"
        return choice

    def _packing(self, mask: Tensor, image_tokens: int) -> dict[str, attention.Packing] | None:
        """Of the joint sequence [text, image], made once for all blocks of a pass."""
        return (
            {"packing": attention.pack(nn.functional.pad(mask, (0, image_tokens), value=True))} if self._packs else None
        )

    def _check(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> None:
        super()._check(x_t, t, cond)
        for reference in cond.references:
            rows, channels, height, width = reference.shape
            if (rows, channels) != x_t.shape[:2] or height % self.patch or width % self.patch:
                raise ValueError(
                    f"reference latents of shape {tuple(reference.shape)} do not fit latents {tuple(x_t.shape)}: they need "
                    f"as many rows and channels, and a height and width divisible by {self.patch}"
                )

    def chained_inputs(self) -> Sequence[str]:
        return ("encoder_hidden_states", "hidden_states")

    def idle_parameters(self) -> Sequence[str]:
        """The last block's text output is discarded, and with it what only that output needs."""
        last = f"transformer_blocks.{len(self.transformer_blocks) - 1}."
        idle = (f"{last}attn.to_add_out.", f"{last}txt_mlp.")
        return [name for name, _ in self.named_parameters() if name.startswith(idle)]

    def flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """Matrix products and attention of one forward pass; tokens: patches of a row's image and references."""
        width, patch_width = self.inner_dim, self.config.patch_size**2 * self.out_channels
        ends = self._input_products(tokens, text_tokens) + text_tokens * self.config.joint_attention_dim * width
        ends += self.time_rows * 2 * width**2  # second layers of time and target-time embedding
        ends += 2 * width**2 + tokens * width * patch_width
        return self.recompute_flops(batch, tokens, text_tokens) + 2 * batch * ends

    def backward_flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """As for every backbone; besides, the last block's text output gives no gradient (see idle_parameters)."""
        idle = text_tokens * (1 + 8) * self.inner_dim**2  # output projection, feed-forward
        return super().backward_flops(batch, tokens, text_tokens) - 2 * 2 * batch * idle

    def _input_products(self, tokens: int, text_tokens: int) -> int:
        return int((tokens * self.config.in_channels + self.time_rows * 2 * SINUSOID) * self.inner_dim)

    def recompute_flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """The forward pass of the blocks, all of which are checkpoint units."""
        width, joint = self.inner_dim, tokens + text_tokens
        block = (self.time_rows + 1) * 6 * width**2  # modulation of image and text, once per row and time
        block += joint * (3 + 1 + 8) * width**2  # query, key, value; output; feed-forward of 4 x width
        block += 2 * joint**2 * width  # scores and weighted sum
        return 2 * batch * len(self.transformer_blocks) * block


def pack(latents: Tensor, patch: int) -> Tensor:
    """Latents [B, C, H, W] -> tokens [B, H W / patch^2, C patch^2], in the order of QwenImagePipeline._pack_latents."""
    rows, channels, height, width = latents.shape
    blocks = latents.reshape(rows, channels, height // patch, patch, width // patch, patch)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch**2)


def unpack(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Inverse of `pack`."""
    blocks = tokens.unflatten(1, (height // patch, width // patch)).unflatten(3, (-1, patch, patch))
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


def text_length(embeds: Tensor, mask: Tensor | None) -> tuple[int, None, Tensor | None]:
    """Padded length of texts [B, S, D], and their mask [B, S] as bool."""
    return embeds.shape[1], None, None if mask is None else mask.bool()


# In place of diffusers' own, which also finds the length of every text: nobody reads those, and for a number that it
# copies to the device on the way the host waits in every pass.
transformer_qwenimage.compute_text_seq_len_from_mask = text_length
