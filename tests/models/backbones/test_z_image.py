"""The Z-Image backbone, beyond what holds for every backbone."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from torch import Tensor

from configs.schema import Lora
from models import attention, lora, lora_files, tiny
from models.backbone import Conditioning
from models.backbones.z_image import ZImage
from tests.models.backbones.families import FAMILIES
from tests.models.varlen import reference
from trainer.engines.recompute import checkpoint_blocks

FAMILY = FAMILIES["z_image"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z_image") / "tiny"
    assert tiny.write(path, "z_image", seed=0)
    return path


@pytest.fixture
def model(place: Path) -> ZImage:
    loaded: ZImage = FAMILY.load(place)
    return loaded


@torch.no_grad()
def test_embedding_is_the_published_sum_of_diffusers_times_that_run_to_the_data(model: ZImage) -> None:
    """E1(1 - t) + (t - r) E2(t - r), with diffusers' sinusoid of 1000 times the time."""
    t, r = torch.tensor([1.0, 0.7, -0.7]), torch.tensor([0.0, 0.2, -0.7])
    model.t_embedder_2.mlp[2].weight.mul_(30)
    with model.times(t, r):
        found = model.t_embedder(torch.full((3,), torch.nan))  # what diffusers hands over does not matter

    def embedding(module: torch.nn.Module, times: Tensor) -> Tensor:
        plain = type(module).__mro__[1]  # diffusers' class
        features = plain.timestep_embedding(1000 * times, 256)  # type: ignore[attr-defined]
        result: Tensor = module.mlp(features)  # type: ignore[operator]
        return result

    first, second = embedding(model.t_embedder, 1 - t), embedding(model.t_embedder_2, t - r)
    torch.testing.assert_close(found, first + (t - r)[:, None] * second, rtol=0, atol=1e-5)
    assert (found[:2] - first[:2]).abs().max() > 0.01
    assert torch.equal(found[2], first[2])


def test_new_second_embedding_is_small_and_the_same_for_a_seed(place: Path, model: ZImage) -> None:
    def second(seed: int) -> dict[str, Tensor]:
        model.load(str(place), seed)
        return {name: p.detach().clone() for name, p in model.t_embedder_2.named_parameters()}

    state = torch.random.get_rng_state()
    found, other = second(0), second(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in found.items():
        assert torch.equal(parameter, second(0)[name])
        if parameter.ndim == 1:
            assert not parameter.any()
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.1)
            assert not torch.equal(parameter, other[name])


@pytest.mark.parametrize("group", [1, 2])
def test_flash_attention_and_groups_of_blocks_change_nothing(
    model: ZImage, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs a GPU; a reference with its signature stands in. A group ends where a list of blocks ends."""
    monkeypatch.setattr(attention, "load_kernel", lambda name: reference)
    x_t, t, r, cond = FAMILY.rows(model)

    def found(kernel: str) -> list[Tensor]:
        tried = copy.deepcopy(model).double()
        attention.use(tried, kernel)
        if kernel != "native":
            checkpoint_blocks(tried, every=1, group=group, keep="nothing")
        velocity = tried(x_t.double(), t.double(), r.double(), cond.to("cpu", torch.float64))
        return [velocity.detach(), *torch.autograd.grad(velocity.square().sum(), list(tried.parameters()))]

    for a, b in zip(found("flash"), found("native"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * (1 + float(b.abs().max())))


@torch.no_grad()
def test_plain_diffusers_draws_the_same_with_the_saved_adapters(place: Path, tmp_path: Path) -> None:
    """One step from t = 1, a sample of one evaluation at r = 0 where one time says both."""
    options = Lora(rank=3, alpha=2, variant="single_time")
    model = ZImage.from_folder(place)
    lora.add(model, options, "online")
    model.to_empty(device="cpu")
    model.load(str(place))
    lora.initialise(model, seed=1, scatter=True)
    pipeline = ZImagePipeline.from_pretrained(place, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    untrained = pipeline("a handwritten two", latents=noise, **call).images
    cond = ZImage.text_encoder(place, "cpu", torch.float32, 512, "").encode(["a handwritten two"])
    own = noise - model(noise, torch.ones(1), torch.zeros(1), cond)
    lora_files.save(tmp_path, model.state_dict(), options)
    pipeline.load_lora_weights(tmp_path)
    assert (pipeline("a handwritten two", latents=noise, **call).images - own).abs().max() <= 1e-5
    assert (untrained - own).abs().max() > 1e-2


def test_adapters_stand_on_attention_and_on_the_time_embeddings() -> None:
    model = ZImage({}, device="meta")
    lora.add(model, Lora(rank=64), "online")
    adapted = set(lora.layers(model))
    blocks = model.checkpoint_units()
    assert {f"{name}.attention.{layer}" for name in blocks for layer in ("to_q", "to_k", "to_v", "to_out.0")} | {
        f"{embedder}.mlp.{layer}" for embedder in ("t_embedder", "t_embedder_2") for layer in (0, 2)
    } == adapted


def test_misuse_is_named(model: ZImage) -> None:
    x_t, t, _, cond = FAMILY.rows(model)
    with pytest.raises(NotImplementedError, match="reference latents"):
        model(x_t, t, None, dataclasses.replace(cond, references=(x_t,)))
    with pytest.raises(ValueError, match="siglip_feat_dim"):
        ZImage({"siglip_feat_dim": 64}, device="meta")
    with pytest.raises(ValueError, match="several patch sizes"):
        ZImage({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, device="meta")
    most = Conditioning(torch.zeros(1, 224, 16), torch.ones(1, 224, dtype=torch.bool))
    assert model(x_t[:1], t[:1], None, most).isfinite().all()
    long = Conditioning(torch.zeros(1, 225, 16), torch.ones(1, 225, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"takes 1 to 224; set encoder\.max_text_tokens=224"):
        model(x_t[:1], t[:1], None, long)
    with pytest.raises(ValueError, match="positions end at 128x128 latents; use a lower resolution"):
        model(torch.zeros(1, 4, 130, 4), t[:1], None, cond[:1])
    assert model(torch.zeros(1, 4, 128, 4), t[:1], None, cond[:1]).isfinite().all()


@torch.no_grad()
def test_a_condition_without_a_token_is_its_padding_alone(model: ZImage) -> None:
    """As of a dummy row, or of a null condition that was cut to nothing."""
    x_t, t, r, cond = FAMILY.rows(model)
    none = Conditioning(cond.embeds, cond.mask & False)
    assert model(x_t, t, r, none).isfinite().all()
