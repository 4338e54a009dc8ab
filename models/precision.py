"""Float64 where diffusers casts to float32, so that a float64 model is exact throughout (law 3).

Everything here is inert for other dtypes: the diffusers code runs unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from torch import Tensor, nn

from models import attention


class RMSNormKeepingFloat64(RMSNorm):
    """diffusers' RMSNorm, whose variance is float32 for every input dtype but float64."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float64:
            return super().forward(hidden_states)
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.eps)
        normed = hidden_states * scale
        return normed if self.weight is None else normed * self.weight


class JointAttentionKeepingFloat64(QwenDoubleStreamAttnProcessor2_0):
    """diffusers' joint attention of Qwen-Image, which rotates queries and keys in float32 unless they are float64.

    packing: of the joint sequence, for a flash kernel; it comes as an argument of the block, so that recomputation has
    it too.
    """

    # diffusers' Attention drops every keyword that this signature does not name, the mask included.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        packing: attention.Packing | None = None,
    ) -> tuple[Tensor, Tensor]:
        view = attn
        if hidden_states.dtype == torch.float64 and image_rotary_emb is not None:
            view, image_rotary_emb = _RotatingNorms(attn, *image_rotary_emb), None
        with attention.given(packing):
            result: tuple[Tensor, Tensor] = super().__call__(
                view, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask, image_rotary_emb
            )
        return result


class SingleStreamAttentionKeepingFloat64(ZSingleStreamAttnProcessor):
    """diffusers' attention of Z-Image, likewise."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        view = attn
        if hidden_states.dtype == torch.float64 and freqs_cis is not None:
            view, freqs_cis = _RotatingNorms(attn, freqs_cis), None
        result: Tensor = super().__call__(view, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        return result


class LinearAttentionKeepingFloat64(SanaLinearAttnProcessor2_0):
    """diffusers' linear attention of SANA, which is float32 for every input dtype but float64."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if hidden_states.dtype != torch.float64:
            result: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
            return result
        projected = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        query, key = (norm(x) if norm else x for norm, x in zip((attn.norm_q, attn.norm_k), projected, strict=False))
        query, key = query.relu(), key.relu()
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, projected[2]))
        state = key.mT @ torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
        read = query @ state
        out: Tensor = attn.to_out[0]((read[..., :-1] / (read[..., -1:] + 1e-15)).transpose(1, 2).flatten(2))
        return out


class _RotatingNorms:
    """View of an attention module whose query and key norms also apply the rotary embedding, in float64."""

    def __init__(self, attn: Any, image_frequencies: Tensor, text_frequencies: Tensor | None = None):
        self._attn = attn
        self.norm_q = lambda query: rotate(attn.norm_q(query), image_frequencies)
        self.norm_k = lambda key: rotate(attn.norm_k(key), image_frequencies)
        if text_frequencies is not None:
            self.norm_added_q = lambda query: rotate(attn.norm_added_q(query), text_frequencies)
            self.norm_added_k = lambda key: rotate(attn.norm_added_k(key), text_frequencies)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary embedding in the dtype of x: pairs of x [B, S, H, D] times unit complex numbers [S, D / 2] of all rows, or
    [B, S, D / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * frequencies.unsqueeze(-2)).flatten(3)


def keep_float64(model: nn.Module) -> None:
    """Install the float64 twins in a diffusers transformer; parameter names stay."""
    for module in model.modules():
        if type(module) is RMSNorm:
            module.__class__ = RMSNormKeepingFloat64
        if isinstance(module, Attention) and type(module.processor) is QwenDoubleStreamAttnProcessor2_0:
            module.set_processor(JointAttentionKeepingFloat64())
        if isinstance(module, Attention) and type(module.processor) is SanaLinearAttnProcessor2_0:
            module.set_processor(LinearAttentionKeepingFloat64())
        if isinstance(module, Attention) and type(module.processor) is ZSingleStreamAttnProcessor:
            module.set_processor(SingleStreamAttentionKeepingFloat64())
