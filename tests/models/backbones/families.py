"""What the tests of every backbone need to know of one: its class, rows that try its masks, diffusers' own velocity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage
from models.backbones.sana import Sana
from models.backbones.sd3 import SD3
from models.backbones.z_image import ZImage

Rows = tuple[Tensor, Tensor, Tensor, Conditioning]


@dataclass(frozen=True)
class Family:
    """preset: of its tiny model; text: real text tokens of three rows; plain: the velocity at t of the diffusers model
    in a folder, as its pipeline calls it; block: one whose output has the dtype of the blocks; root: modules outside the
    blocks; idle: parameters without gradient; size, second: parameters of the published transformer without E2, and of
    E2; config: where it is not the diffusers class's default; latent: of an image of 1024 x 768 pixels; second_time:
    what E2 takes; references: height and width of the row's reference images [pixels]."""

    backbone: Any
    preset: str
    text: tuple[int, int, int]
    plain: Callable[[Path, Tensor, Tensor, Conditioning], Tensor]
    block: str
    root: tuple[str, ...]
    idle: int
    size: int
    second: int
    config: dict[str, Any] = field(default_factory=dict)
    latent: tuple[int, int, int] = (16, 128, 96)
    second_time: Callable[[Tensor, Tensor], Tensor] = lambda t, r: r
    references: tuple[tuple[int, int], ...] = ()

    def load(self, folder: Path) -> Any:
        model = self.backbone.from_folder(folder, device="cpu")
        model.load(str(folder))
        return model

    def rows(self, model: Any) -> Rows:
        """x_t, t, r and conditions of 3 rows; the first has the most text."""
        generator = torch.Generator().manual_seed(1)
        x_t = torch.randn(3, *model.latent_shape((48, 64)), generator=generator)
        t = torch.tensor([0.9, 0.5, -0.3])
        embeds = torch.randn(3, max(self.text), model.text_width, generator=generator)
        mask = torch.arange(max(self.text)) < torch.tensor(self.text)[:, None]
        pooled = None if model.pooled_width is None else torch.randn(3, model.pooled_width, generator=generator)
        return x_t, t, t * 0.25, Conditioning(embeds, mask, pooled, self.reference_latents(model, 3))

    def reference_latents(self, model: Any, rows: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(4)
        return tuple(torch.randn(rows, *model.latent_shape(size), generator=generator) for size in self.references)


def _qwen_image(folder: Path, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    base = QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    images = [QwenImagePipeline._pack_latents(x, *x.shape) for x in (x_t, *cond.references)]
    tokens = base(
        hidden_states=torch.cat(images, dim=1),
        encoder_hidden_states=cond.embeds,
        encoder_hidden_states_mask=cond.mask,
        timestep=t,
        img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2) for x in (x_t, *cond.references)]] * len(x_t),
        return_dict=False,
    )[0]
    tokens = tokens[:, : images[0].shape[1]]
    velocity: Tensor = QwenImagePipeline._unpack_latents(tokens, *x_t.shape[2:], 1)[:, :, 0]
    return velocity


def _sd3(folder: Path, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    base = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    velocity: Tensor = base(x_t, cond.embeds, cond.pooled, timestep=t * 1000, return_dict=False)[0]
    return velocity


def _sana(folder: Path, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    base = SanaTransformer2DModel.from_pretrained(folder / "transformer")
    time = t * 1000 * base.config.timestep_scale
    velocity: Tensor = base(x_t, cond.embeds, time, encoder_attention_mask=cond.mask, return_dict=False)[0]
    return velocity


def _z_image(folder: Path, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Captions are a list of tensors without padding, the time runs from noise to data, and the output is x - z."""
    base = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    texts = [embeds[mask] for embeds, mask in zip(cond.embeds, cond.mask, strict=True)]
    return -torch.stack(base(list(x_t.unsqueeze(2)), 1 - t, texts, return_dict=False)[0]).squeeze(2)


FAMILIES = {
    "qwen_image": Family(
        QwenImage,
        "pipeline",
        (5, 3, 1),
        _qwen_image,
        "transformer_blocks.0.img_mlp",
        ("time_text_embed", "time_text_embed_2", "img_in", "txt_in", "proj_out"),
        idle=6,
        size=20_430_401_088,
        second=10_229_760,
    ),
    # Two references at time 0, as of Qwen-Image-Edit-2511.
    "qwen_image_edit": Family(
        QwenImage,
        "edit_plus",
        (5, 3, 1),
        _qwen_image,
        "transformer_blocks.0.img_mlp",
        ("time_text_embed", "time_text_embed_2", "img_in", "txt_in", "proj_out"),
        idle=6,
        size=20_430_401_088,
        second=10_229_760,
        references=((32, 48), (64, 16)),
    ),
    # Texts are of one length, and there is no mask.
    "sd3": Family(
        SD3,
        "sd3",
        (5, 5, 5),
        _sd3,
        "transformer_blocks.0.ff",
        ("time_text_embed", "time_text_embed_2", "pos_embed", "context_embedder", "norm_out", "proj_out"),
        idle=0,
        size=2_243_171_520,
        second=8_263_680,
        config={
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        second_time=lambda t, r: r * 1000,
    ),
    "sana": Family(
        Sana,
        "sana",
        (5, 3, 1),
        _sana,
        "transformer_blocks.0.ff",
        ("time_embed", "time_embed_2", "patch_embed", "caption_projection", "norm_out", "proj_out"),
        idle=0,
        size=1_604_462_752,
        second=35_714_560,
        latent=(32, 32, 24),
        second_time=lambda t, r: r * 1000,
    ),
    # Text is padded to multiples of 32 tokens that all are attended to: masks begin beyond.
    "z_image": Family(
        ZImage,
        "z_image",
        (45, 33, 1),
        _z_image,
        "layers.0.feed_forward",
        ("t_embedder", "t_embedder_2", "all_x_embedder.2-1", "cap_embedder", "all_final_layer.2-1"),
        idle=0,
        size=6_154_908_736,
        second=525_568,
        second_time=lambda t, r: t - r,
    ),
}


def first(model: Any) -> nn.Module:
    """E1."""
    found: nn.Module = getattr(model, model.time_embedding)
    return found


def second(model: Any) -> nn.Module:
    """E2."""
    found: nn.Module = getattr(model, f"{model.time_embedding}_2")
    return found
