"""The Qwen-Image backbone, beyond what holds for every backbone."""

import dataclasses

import pytest
import torch
from diffusers import QwenImagePipeline

from models.backbones.qwen_image import QwenImage, pack, unpack
from tests.models.conftest import Rows


def test_packing_is_the_pipelines() -> None:
    latents = torch.randn(2, 4, 6, 8)
    tokens = pack(latents, 2)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(unpack(tokens, 2, 6, 8), latents)
    other = torch.randn(2, 3, 6, 12)
    assert torch.equal(unpack(pack(other, 3), 3, 6, 12), other)


def test_misuse_is_named(backbone: QwenImage, rows: Rows) -> None:
    x_t, t, _, cond = rows
    with pytest.raises(NotImplementedError, match="reference latents"):
        backbone(x_t, t, None, dataclasses.replace(cond, references=(x_t,)))
    with pytest.raises(ValueError, match="zero_cond_t"):
        QwenImage({"zero_cond_t": True}, device="meta")
