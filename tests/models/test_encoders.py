"""Encoders: the pipeline's prompts, the constant null condition, normalised latents."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline

from models.backbone import Conditioning
from models.backbones.qwen_image import QwenImage
from models.encoders.latents import LatentEncoder
from models.encoders.qwen_image import QwenImageLatents, QwenImageText

NULL = "Generate an image."


@pytest.fixture(scope="module")
def text(folder: Path) -> QwenImageText:
    return QwenImageText.from_folder(folder, "cpu", torch.float32, 64, NULL)


@pytest.fixture(scope="module")
def latents(folder: Path) -> LatentEncoder:
    return QwenImageLatents.from_folder(folder, "vae", "cpu", torch.float32)


@torch.no_grad()
def test_conditions_are_the_pipelines(folder: Path, text: QwenImageText) -> None:
    pipeline = QwenImagePipeline.from_pretrained(folder, local_files_only=True)
    captions = ["a handwritten seven", "a handwritten two, in grey on a very dark wall"]
    embeds, mask = pipeline.encode_prompt(captions, device="cpu")
    cond = text.encode(captions)
    assert torch.equal(cond.embeds, embeds)
    assert torch.equal(cond.mask, mask.bool())
    assert not cond.mask.all()


def test_mask_is_boolean_even_without_padding(text: QwenImageText) -> None:
    cond = text.encode(["a handwritten one"])
    assert cond.mask.dtype == torch.bool
    assert cond.mask.all()


def test_equal_captions_are_encoded_once(text: QwenImageText, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    encode = text.pipeline.encode_prompt
    monkeypatch.setattr(text.pipeline, "encode_prompt", lambda p, **kw: (asked.append(p), encode(p, **kw))[1])
    cond = text.encode(["a handwritten two", "a handwritten nine", "a handwritten two"])
    assert asked == [["a handwritten two", "a handwritten nine"]]
    assert torch.equal(cond.embeds[0], cond.embeds[2])
    assert not torch.equal(cond.embeds[0], cond.embeds[1])


def test_null_condition_is_encoded_once_and_joins_captions(
    text: QwenImageText, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = text.null()
    monkeypatch.setattr(text.pipeline, "encode_prompt", None)
    assert text.null() is first
    monkeypatch.undo()
    assert torch.equal(text.encode([NULL]).embeds, first.embeds)
    joined = text.encode(["a handwritten one"]).cat(first.expand(2))
    assert len(joined) == 3
    assert joined.mask.sum(dim=1).tolist() == [8, 9, 9]


def test_long_captions_are_cut_and_counted(folder: Path, text: QwenImageText) -> None:
    short = QwenImageText(text.pipeline, 8, NULL)
    try:
        cond = short.encode(["a handwritten one", "a handwritten one , one", "a handwritten one , one"])
        assert cond.embeds.shape[1] == 8
        assert short.truncated == 2
        whole = QwenImageText(text.pipeline, 64, NULL).encode(["a handwritten one , one"])
        torch.testing.assert_close(cond.embeds[1], whole.embeds[0, :8], rtol=0, atol=1e-5)
    finally:
        text.pipeline.tokenizer_max_length = text.max_tokens + 1
    with pytest.raises(ValueError, match=r"encoder\.max_text_tokens"):
        QwenImageText(text.pipeline, 2000, NULL)


def test_encoders_are_frozen(text: QwenImageText, latents: LatentEncoder) -> None:
    for model in (text.pipeline.text_encoder, latents.vae):
        assert model is not None
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_latents_are_the_posterior_mean_normalised_per_channel(latents: LatentEncoder) -> None:
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    encoded = latents.encode(pixels)
    assert encoded.shape == (2, 4, 4, 6)
    assert encoded.dtype == torch.float32
    vae = latents.vae
    assert vae is not None
    mean = vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
    for channel, (center, spread) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        torch.testing.assert_close(encoded[:, channel], (mean[:, channel] - center) / spread)
    decoded = latents.decode(encoded)
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(decoded, vae.decode(mean[:, :, None]).sample[:, :, 0], rtol=0, atol=1e-5)
    assert torch.equal(latents.encode(pixels[1:]), encoded[1:])


@torch.no_grad()
def test_latents_can_be_drawn_from_the_posterior(folder: Path, latents: LatentEncoder) -> None:
    drawn = QwenImageLatents.from_folder(folder, "vae", "cpu", torch.float32, latents="sample")
    assert drawn.samples and not latents.samples
    pixels, noise = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 4, 6)
    vae: Any = drawn.vae
    deviation = vae.encode(pixels[:, :, None]).latent_dist.std[:, :, 0]
    scale = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
    expected = latents.encode(pixels) + deviation * noise / scale
    torch.testing.assert_close(drawn.encode(pixels, noise), expected, rtol=0, atol=1e-5)
    assert (expected - latents.encode(pixels)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="choose mean or sample"):
        QwenImageLatents.from_folder(folder, "vae", "cpu", torch.float32, latents="median")


@torch.no_grad()
def test_large_images_can_go_through_the_vae_in_tiles(folder: Path, latents: LatentEncoder) -> None:
    tiled = QwenImageLatents.from_folder(folder, "vae", "cpu", torch.float32, tiling=True)
    vae: Any = tiled.vae
    vae.enable_tiling(32, 32, 24, 24)
    seen: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[-1]))
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    encoded = tiled.encode(pixels)
    assert encoded.shape == latents.encode(pixels).shape and max(seen) == 32
    assert tiled.decode(encoded).shape == pixels.shape


def test_pixel_latents_are_the_pixels(folder: Path) -> None:
    encoder = QwenImageLatents.from_folder(folder, "pixels", "cpu", torch.float32)
    pixels = torch.randn(2, 1, 8, 8)
    assert torch.equal(encoder.decode(encoder.encode(pixels)), pixels)
    with pytest.raises(ValueError, match="choose vae or pixels"):
        QwenImageLatents.from_folder(folder, "wavelets", "cpu", torch.float32)


@torch.no_grad()
def test_whole_chain_from_caption_and_pixels_to_a_one_step_image(
    folder: Path, text: QwenImageText, latents: LatentEncoder, backbone: QwenImage
) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    x = latents.encode(pixels)
    assert tuple(x.shape[1:]) == backbone.latent_shape((32, 32))
    cond: Conditioning = text.encode(["a handwritten one", NULL])
    noise, one = torch.randn_like(x), torch.ones(2)
    sample = noise - backbone(noise, one, one * 0, cond)
    images = latents.decode(sample)
    assert images.shape == pixels.shape
    assert images.isfinite().all()
    assert images.abs().max() <= 1


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer.*model\.path"):
        QwenImageText.from_folder(tmp_path, "cpu", torch.float32, 8, NULL)
    with pytest.raises(FileNotFoundError, match=r"vae.*model\.path"):
        QwenImageLatents.from_folder(tmp_path, "vae", "cpu", torch.float32)
