"""The SD3 backbone, beyond what holds for every backbone."""

from pathlib import Path

import pytest

from models import tiny
from models.backbones.sd3 import SD3
from tests.models.backbones.families import FAMILIES

FAMILY = FAMILIES["sd3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd3") / "tiny"
    assert tiny.write(path, "sd3", seed=0)
    return path


def test_large_has_its_size_on_meta() -> None:
    config = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
    model = SD3({**config, "pos_embed_max_size": 192}, device="meta")
    second = sum(p.numel() for p in model.time_text_embed_2.parameters())
    assert second == 17_442_304
    assert sum(p.numel() for p in model.parameters()) == 8_056_627_520 + second


def test_new_second_embedding_is_small_and_its_biases_are_zero(place: Path) -> None:
    model = FAMILY.load(place)
    for name, parameter in model.time_text_embed_2.named_parameters():
        if parameter.ndim == 1:
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


def test_pooled_texts_reach_both_embeddings(place: Path) -> None:
    model = FAMILY.load(place)
    model(*FAMILY.rows(model)).square().sum().backward()
    for name in ("time_text_embed", "time_text_embed_2"):
        gradient = model.get_submodule(name).text_embedder.linear_1.weight.grad
        assert gradient is not None and gradient.norm() > 0, name


def test_images_beyond_the_positions_are_refused(place: Path) -> None:
    model = FAMILY.load(place)
    assert model.latent_shape((512, 512)) == (4, 64, 64)
    with pytest.raises(ValueError, match="positions, which end at 512; pack smaller images"):
        model.latent_shape((512, 528))
