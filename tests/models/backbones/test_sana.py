"""The SANA backbone, beyond what holds for every backbone."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel

from models import tiny
from models.backbones.sana import Sana
from models.tiny_pipelines.sana import TRANSFORMER
from tests.models.backbones.families import FAMILIES

FAMILY = FAMILIES["sana"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sana") / "tiny"
    assert tiny.write(path, "sana", seed=0)
    return path


def test_the_small_one_has_its_size_on_meta() -> None:
    config = {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16}
    model = Sana({**config, "cross_attention_head_dim": 72, "cross_attention_dim": 1152}, device="meta")
    second = sum(p.numel() for p in model.time_embed_2.parameters())
    assert second == 9_593_856
    assert sum(p.numel() for p in model.parameters()) == 591_747_872 + second


@torch.no_grad()
def test_both_modulation_and_last_norm_see_the_target_time(place: Path) -> None:
    model = FAMILY.load(place)
    x_t, t, r, cond = FAMILY.rows(model)
    velocity = model(x_t, t, r, cond)
    for name in ("linear.weight", "emb.timestep_embedder.linear_2.weight"):
        changed = copy.deepcopy(model)
        changed.time_embed_2.get_parameter(name).zero_()
        assert (changed(x_t, t, r, cond) - velocity).abs().max() > 1e-6, name


@torch.no_grad()
def test_variants_with_positions_scaled_times_and_normed_queries_equal_diffusers() -> None:
    """As of SANA 2K and 4K (positions), 1.5 (query and key norm), Sprint (times); also from meta and in float64."""
    more = {"interpolation_scale": 1, "timestep_scale": 0.001, "qk_norm": "rms_norm_across_heads"}
    torch.manual_seed(0)
    plain = SanaTransformer2DModel(**TRANSFORMER, **more)
    model = Sana({**TRANSFORMER, **more}, device="meta").to_empty(device="cpu")
    state = plain.state_dict()
    state |= {key.replace("time_embed.", "time_embed_2."): value for key, value in state.items() if "time_embed" in key}
    model.load_state_dict(state)
    x_t, t, _, cond = FAMILY.rows(FAMILY.backbone(TRANSFORMER, pixels_per_latent=4))
    t = t.abs()
    (expected,) = plain(x_t, cond.embeds, t, encoder_attention_mask=cond.mask, return_dict=False)
    torch.testing.assert_close(model(x_t, t, t, cond), expected, rtol=0, atol=1e-6)
    double = copy.deepcopy(model).double()(x_t.double(), t.double(), None, cond.to("cpu", torch.float64))
    torch.testing.assert_close(double.float(), expected, rtol=0, atol=1e-4)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="guidance_embeds"):
        Sana({"guidance_embeds": True}, device="meta")
    with pytest.raises(ValueError, match="out_channels=64 for 32 latent channels"):
        Sana({"out_channels": 64}, device="meta")
