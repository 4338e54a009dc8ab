"""Z-Image and Z-Image-Turbo: the diffusers transformer as a velocity network with a target time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn

from models.attention import Dispatched
from models.backbone import Conditioning
from models.encoders.z_image import ZImageLatents, ZImageText
from models.target_time import SINUSOID
from models.transformer import DispatchedOptions, TransformerBackbone
from models.z_image_time import ZImageTargetTime

TIME_HIDDEN, TIME_WIDTH = 1024, 256  # of a time embedding: hidden layer, most outputs


@dataclass
class ZImageOptions(DispatchedOptions):
    pass


class ZImage(Dispatched, ZImageTargetTime, TransformerBackbone, ZImageTransformer2DModel):
    """Backbone over diffusers' ZImageTransformer2DModel; parameter names are its own plus `t_embedder_2.*`.

    diffusers' network gives x - z, the negative of a velocity, at a time of its own (models/z_image_time.py).

    A base model starts as its own velocity for every r: a copy of E1 as E2 would add to it at r = 0 an embedding as large
    as its own. (No published trainer says; the published patch leaves E2 as torch makes it.)
    """

    family, class_name = "Z-Image", "ZImageTransformer2DModel"
    text_class, latents_class = ZImageText, ZImageLatents
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("t_embedder.mlp.0", "t_embedder.mlp.2", "t_embedder_2.mlp.0", "t_embedder_2.mlp.2"),
    )

    unsupported = ("siglip_feat_dim",)

    def _adapt(self) -> None:
        if len(self.config.all_patch_size) != 1 or tuple(self.config.all_f_patch_size) != (1,):
            raise ValueError(
                "Z-Image transformers with several patch sizes, or with patches of several frames, are not supported: "
                f"all_patch_size={self.config.all_patch_size}, all_f_patch_size={self.config.all_f_patch_size}"
            )
        self._text_mask: Tensor | None = None

    @classmethod
    def vae_shape(cls, config: Mapping[str, Any]) -> tuple[int, int]:
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return int(self.config.in_channels)

    @property
    def patch(self) -> int:
        return int(self.config.all_patch_size[0])

    @property
    def text_width(self) -> int:
        return int(self.config.cap_feat_dim)

    @property
    def head_width(self) -> int:
        return int(self.dim // self.n_heads)

    def forward(
        self, x_t: Tensor, t: Tensor, r: Tensor | None, cond: Conditioning, weights: Tensor | None = None
    ) -> Tensor:
        """Mean velocity from t down to r (method 1), [B, C, H, W] in the dtype of x_t; r=None means r=t.

        x_t: latents [B, C, H, W]; t, r: [B] in [-1, 1], float32 or float64; cond: B rows, real tokens first. All rows
        share these parameters, so `weights` changes nothing here.
        """
        self._check(x_t, t, cond)
        dtype = self.x_pad_token.dtype
        # Padding is embedded before it is replaced: zeros, so that no gradient meets whatever stood there.
        captions = cond.embeds.to(dtype).masked_fill(~cond.mask[..., None], 0)
        self._text_mask = cond.mask
        try:
            with self.times(t, t if r is None else r):
                (clean_minus_noise,) = super().forward(
                    x=list(x_t.to(dtype).unsqueeze(2)),
                    t=t,
                    cap_feats=list(captions),
                    patch_size=self.patch,
                    return_dict=False,
                )
        finally:
            self._text_mask = None
        return -torch.stack(clean_minus_noise).squeeze(2).to(x_t.dtype)

    def patchify_and_embed(
        self, all_image: list[Tensor], all_cap_feats: list[Tensor], patch_size: int, f_patch_size: int
    ) -> tuple[Any, ...]:
        """As diffusers', for captions padded to one length whose own lengths are known to the device alone.

        diffusers follows a caption by cap_pad_token up to a multiple of 32, and begins the positions of the image behind
        that. What lies beyond, up to the longest caption, is masked (see the next two).
        """
        mask = self._text_mask
        assert mask is not None
        made = list(super().patchify_and_embed(all_image, all_cap_feats, patch_size, f_patch_size))
        image_positions, text_padding = torch.stack(made[3]), torch.stack(made[6])
        text_padding[:, : mask.shape[1]] = ~mask
        height, width = all_image[0].shape[-2:]
        patches = height * width // patch_size**2  # what follows them is padding, with positions of its own
        image_positions[:, :patches, 0] += (_padded(mask.sum(dim=1)) - text_padding.shape[1])[:, None]
        made[3], made[6] = list(image_positions), list(text_padding)
        return tuple(made)

    def _prepare_sequence(
        self, feats: Any, pos_ids: Any, inner_pad_mask: Any, pad_token: Any, *others: Any
    ) -> tuple[Any, ...]:
        """As diffusers', whose mask knows only sequences of different lengths."""
        tokens, frequencies, mask, *rest = super()._prepare_sequence(feats, pos_ids, inner_pad_mask, pad_token, *others)
        if pad_token is self.cap_pad_token:
            mask = self._attended(tokens.shape[1])
        return tokens, frequencies, mask, *rest

    def _build_unified_sequence(self, x: Tensor, *others: Any) -> tuple[Any, ...]:
        """As diffusers': image tokens, then text."""
        tokens, frequencies, _, *rest = super()._build_unified_sequence(x, *others)
        text = self._attended(tokens.shape[1] - x.shape[1])
        return tokens, frequencies, torch.cat([text.new_ones(x.shape[:2]), text], dim=1), *rest

    def _attended(self, length: int) -> Tensor:
        """Text tokens that others attend to [B, length]: real ones, and cap_pad_token up to a multiple of 32.

        It goes in even when it is all ones: a row must not depend on the captions of the other rows.
        """
        assert self._text_mask is not None
        real = self._text_mask.sum(dim=1)
        return torch.arange(length, device=real.device) < _padded(real)[:, None]

    def _check(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> None:
        super()._check(x_t, t, cond)
        # Positions beyond the tables are found here: on a GPU the lookup would abort the process.
        most, *edges = self.axes_lens
        longest = (most - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF
        if not 1 <= (text := cond.embeds.shape[1]) <= longest:
            raise ValueError(
                f"conditions of {text} text tokens do not fit this transformer, which takes 1 to {longest}; set "
                f"encoder.max_text_tokens={longest} or less"
            )
        largest = [edge * self.patch for edge in edges]
        if any(size > edge for size, edge in zip(x_t.shape[2:], largest, strict=True)):
            raise ValueError(
                f"latents of shape {tuple(x_t.shape)} do not fit this transformer, whose positions end at "
                f"{largest[0]}x{largest[1]} latents; use a lower resolution"
            )

    def _chains(self) -> dict[str, nn.ModuleList]:
        return {name: getattr(self, name) for name in ("noise_refiner", "context_refiner", "layers")}

    def shard_units(self) -> Sequence[nn.Module]:
        return [block for blocks in self._chains().values() for block in blocks]

    def checkpoint_units(self) -> Sequence[str]:
        return [f"{name}.{index}" for name, blocks in self._chains().items() for index in range(len(blocks))]

    def chained_inputs(self) -> Sequence[str]:
        return ("x",)

    def idle_parameters(self) -> Sequence[str]:
        """None: one stream, whose every token the last block's attention reads."""
        return []

    def flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """Matrix products and attention of one forward pass; tokens: image tokens (patches) of a row.

        Image and text are padded to multiples of 32 tokens, which costs the same as real ones.
        """
        image, text = _padded(tokens), _padded(text_tokens)
        ends = self._input_products(tokens, text_tokens) + text * self.config.cap_feat_dim * self.dim
        ends += 2 * TIME_HIDDEN * self._time_width  # both time embeddings' second layers
        ends += self._time_width * self.dim + (image + text) * self.dim * self._patch_width
        return self.recompute_flops(batch, tokens, text_tokens) + 2 * batch * ends

    def recompute_flops(self, batch: int, tokens: int, text_tokens: int) -> int:
        """The forward pass of the blocks, all of which are checkpoint units."""
        image, text = _padded(tokens), _padded(text_tokens)
        work = 0
        for name, length in (("noise_refiner", image), ("context_refiner", text), ("layers", image + text)):
            blocks = self._chains()[name]
            modulation = 0 if name == "context_refiner" else self._time_width * 4 * self.dim
            feed_forward = 3 * self.dim * int(self.dim / 3 * 8)
            work += len(blocks) * (modulation + length * (4 * self.dim**2 + feed_forward) + 2 * length**2 * self.dim)
        return 2 * batch * work

    def _input_products(self, tokens: int, text_tokens: int) -> int:
        return int(_padded(tokens) * self._patch_width * self.dim + 2 * SINUSOID * TIME_HIDDEN)

    @property
    def _time_width(self) -> int:
        return min(self.dim, TIME_WIDTH)

    @property
    def _patch_width(self) -> int:
        return self.patch**2 * self.in_channels


def _padded(tokens: Any) -> Any:
    """Length of a sequence (an int or a tensor of them) with diffusers' padding; an empty one is padding alone."""
    blocks = (tokens + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF
    return SEQ_MULTI_OF * (blocks.clamp(min=1) if isinstance(blocks, Tensor) else max(blocks, 1))
