"""Encoders of Z-Image: the pipeline's prompts, cut captions, shifted latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline

from models import tiny
from models.backbones.z_image import ZImage
from models.encoders.z_image import ZImageLatents, ZImageText

CAPTIONS = ["a handwritten seven", "a handwritten two, in grey on a very dark wall"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z_image") / "tiny"
    assert tiny.write(path, "z_image", seed=0)
    return path


@pytest.fixture(scope="module")
def text(place: Path) -> Any:
    return ZImage.text_encoder(place, "cpu", torch.float32, 128, "")


def test_conditions_are_the_pipelines_without_its_padding(place: Path, text: ZImageText) -> None:
    pipeline = ZImagePipeline.from_pretrained(place, local_files_only=True)
    expected, _ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
    lengths: list[int] = []
    text.pipeline.text_encoder.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    cond = text.encode(CAPTIONS)
    assert lengths == [max(len(embeds) for embeds in expected)]
    assert cond.mask.sum(dim=1).tolist() == [len(embeds) for embeds in expected]
    assert cond.mask.dtype == torch.bool and not cond.mask.all()
    for row, embeds in enumerate(expected):
        torch.testing.assert_close(cond.embeds[row][cond.mask[row]], embeds, rtol=0, atol=1e-6)
    assert not torch.allclose(cond.embeds[0, 4:7], cond.embeds[1, 4:7], atol=1e-3)


def test_the_null_prompt_is_the_empty_one_in_the_template(place: Path, text: ZImageText) -> None:
    pipeline = ZImagePipeline.from_pretrained(place, local_files_only=True)
    (expected,), _ = pipeline.encode_prompt("", do_classifier_free_guidance=False)
    null = text.null()
    assert null.mask.all() and len(expected) > 1
    torch.testing.assert_close(null.embeds[0], expected, rtol=0, atol=1e-6)


def test_long_captions_are_cut_and_counted(text: ZImageText) -> None:
    whole = text.encode(CAPTIONS)
    most = int(whole.mask[0].sum())
    short = ZImageText(text.pipeline, most, "")
    cut = short.encode([*CAPTIONS, CAPTIONS[1]])
    assert short.truncated == 2
    assert cut.embeds.shape[1] == most and cut.mask.all()
    torch.testing.assert_close(cut.embeds[1], whole.embeds[1, :most], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"encoder\.max_text_tokens"):
        ZImageText(text.pipeline, 513, "")


@torch.no_grad()
def test_latents_are_shifted_and_scaled_as_the_pipeline_undoes_it(place: Path) -> None:
    latents = ZImage.latent_encoder(place, "vae", "cpu", torch.float32)
    assert isinstance(latents, ZImageLatents)
    vae: Any = latents.vae
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    encoded = latents.encode(pixels)
    assert encoded.shape == (2, 4, 4, 6)
    raw = vae.encode(pixels).latent_dist.mean
    torch.testing.assert_close(encoded / vae.config.scaling_factor + vae.config.shift_factor, raw, rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.decode(encoded), vae.decode(raw).sample.clamp(-1, 1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_plain_pipeline_step_is_the_backbones(place: Path, text: ZImageText) -> None:
    """One step of ZImagePipeline from noise is x = z - F(z, 1, 1): the sign and the direction of time agree."""
    pipeline = ZImagePipeline.from_pretrained(place, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    shown = pipeline(
        CAPTIONS[0], height=64, width=64, num_inference_steps=1, guidance_scale=0, latents=noise, output_type="latent"
    ).images
    model = ZImage.from_folder(place, device="cpu")
    model.load(str(place))
    ours = noise - model(noise, torch.ones(1), None, text.encode(CAPTIONS[:1]))
    torch.testing.assert_close(ours, shown, rtol=0, atol=1e-5)
    assert (shown - noise).abs().max() > 0.1
