"""The exported twin of an editing transformer is the backbone, references at time 0 included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import tiny
from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage, pack, unpack
from models.exported.qwen_image import TwinFlowQwenImageTransformer2DModel


@pytest.mark.parametrize("preset", ["edit", "edit_plus"])
@torch.no_grad()
def test_it_gives_the_backbones_velocity(preset: str, tmp_path: Path) -> None:
    tiny.write(tmp_path / "model", preset, seed=0)
    backbone = QwenImage.from_folder(tmp_path / "model", device="cpu")
    backbone.load(str(tmp_path / "model"))
    backbone.time_text_embed_2.timestep_embedder.linear_2.weight.mul_(1.5)  # no copy of E1 any more
    config = {key: value for key, value in backbone.config.items() if not key.startswith("_")}
    assert config["zero_cond_t"] == (preset == "edit_plus")
    twin = TwinFlowQwenImageTransformer2DModel(**config)
    twin.load_state_dict(backbone.state_dict())
    generator = torch.Generator().manual_seed(3)
    x_t, source = (torch.randn(2, 4, *size, generator=generator) for size in ((4, 6), (4, 4)))
    cond = Conditioning(torch.randn(2, 5, 16, generator=generator), torch.ones(2, 5, dtype=torch.bool), None, (source,))
    t, r = torch.tensor([0.9, 0.4]), torch.tensor([0.0, 0.3])
    tokens = twin(
        hidden_states=torch.cat([pack(x_t, 2), pack(source, 2)], dim=1),
        timestep=t,
        target_time=r,
        encoder_hidden_states=cond.embeds,
        encoder_hidden_states_mask=cond.mask,
        img_shapes=[[(1, 2, 3), (1, 2, 2)]] * 2,
        return_dict=False,
    )[0]
    torch.testing.assert_close(unpack(tokens[:, :6], 2, 4, 6), backbone(x_t, t, r, cond), rtol=0, atol=1e-6)
