"""Encoders of SD3 and SANA: the pipelines' conditions and latents, the null condition, what is cut and counted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from models import tiny
from models.encoders.latents import LatentEncoder
from models.encoders.text import TextEncoder
from models.transformer import TransformerBackbone
from trainer.plugins import plugin

LONG = "a handwritten two , one , three , four , five , six , seven , eight , nine , zero , one , two"
CAPTIONS = ["a handwritten seven", "A handwritten two, in grey on a very dark wall", "a handwritten seven"]


@dataclass
class Pair:
    """A backbone's encoders, and the diffusers pipeline of the same folder."""

    name: str
    folder: Path
    cls: type[TransformerBackbone]
    pipeline: Any
    text: TextEncoder
    latents: LatentEncoder

    def encode_prompt(self, captions: list[str], **more: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Embeddings, mask and pooled texts by the pipeline itself."""
        common = {"device": "cpu", "do_classifier_free_guidance": False, "max_sequence_length": 32}
        if self.name == "sd3":
            embeds, _, pooled, _ = self.pipeline.encode_prompt(captions, None, None, **common)
            return embeds, None, pooled
        embeds, mask, _, _ = self.pipeline.encode_prompt(captions, **common, **more)
        return embeds, mask.bool(), None


@pytest.fixture(scope="module", params=["sd3", "sana"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("encoders") / request.param
    tiny.write(path, request.param, seed=0)
    cls = plugin("model", {"name": request.param, "path": str(path)})[0]
    text = cls.text_encoder(path, "cpu", torch.float32, 32, "")
    latents = cls.latent_encoder(path, "vae", "cpu", torch.float32)
    pipeline = DiffusionPipeline.from_pretrained(path, local_files_only=True)
    return Pair(request.param, path, cls, pipeline, text, latents)


@torch.no_grad()
def test_conditions_are_the_pipelines(pair: Pair) -> None:
    from models.encoders.sana import INSTRUCTION

    more = {"complex_human_instruction": INSTRUCTION} if pair.name == "sana" else {}
    embeds, mask, pooled = pair.encode_prompt(CAPTIONS, **more)
    cond = pair.text.encode(CAPTIONS)
    model: Any = pair.cls.from_folder(pair.folder)
    assert cond.embeds.shape[-1] == model.text_width
    length = cond.embeds.shape[1]
    # Equal captions are encoded once, so that the batch has other rows than the pipeline's.
    torch.testing.assert_close(cond.embeds, embeds[:, :length], rtol=0, atol=1e-5)
    assert (cond.embeds[0] - cond.embeds[1]).abs().max() > 0.1
    if mask is None:
        assert pooled is not None and cond.pooled is not None
        assert cond.mask.all() and length == embeds.shape[1] == 77 + 32
        torch.testing.assert_close(cond.pooled, pooled, rtol=0, atol=1e-5)
        assert cond.pooled.shape[-1] == model.pooled_width
    else:
        assert torch.equal(cond.mask, mask[:, :length]) and not mask[:, length:].any()
        assert not cond.mask.all() and cond.mask.any(dim=0).all()
        assert cond.pooled is None


@torch.no_grad()
def test_null_condition_is_the_pipelines_negative_one(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    null = pair.text.null()
    embeds, _, pooled = pair.encode_prompt([""])  # without an instruction, as SanaPipeline has it
    torch.testing.assert_close(null.embeds, embeds[:, : null.embeds.shape[1]], rtol=0, atol=1e-6)
    assert (null.pooled is None) == (pooled is None)
    monkeypatch.setattr(pair.text, "pipeline", None)
    assert pair.text.null() is null
    joined = null.expand(2).cat(null)
    assert len(joined) == 3


def test_long_captions_are_cut_and_counted(pair: Pair) -> None:
    short = pair.cls.text_encoder(pair.folder, "cpu", torch.float32, 12, "")
    cond = short.encode(["a handwritten one", LONG, LONG])
    assert short.truncated == 2
    assert cond.embeds.shape[1] == (77 + 12 if pair.name == "sd3" else 12)
    with pytest.raises(ValueError, match=r"encoder\.max_text_tokens"):
        pair.cls.text_encoder(pair.folder, "cpu", torch.float32, 2000, "")


@torch.no_grad()
def test_latents_are_the_pipelines_and_come_back(pair: Pair) -> None:
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    latents, vae = pair.latents.encode(pixels), pair.pipeline.vae
    model: Any = pair.cls.from_folder(pair.folder)
    assert tuple(latents.shape[1:]) == model.latent_shape((32, 64))
    if pair.name == "sd3":
        raw = latents / vae.config.scaling_factor + vae.config.shift_factor  # StableDiffusion3Pipeline, last lines
        mean = vae.encode(pixels).latent_dist.mean
    else:
        raw, mean = latents / vae.config.scaling_factor, vae.encode(pixels).latent
    torch.testing.assert_close(raw, mean, rtol=0, atol=1e-5)
    decoded = pair.latents.decode(latents)
    torch.testing.assert_close(decoded, vae.decode(raw).sample.clamp(-1, 1), rtol=0, atol=1e-5)
    assert torch.equal(pair.latents.encode(pixels[1:]), latents[1:])


@torch.no_grad()
def test_drawing_latents_needs_a_posterior(pair: Pair) -> None:
    def drawn() -> LatentEncoder:
        return pair.cls.latent_encoder(pair.folder, "vae", "cpu", torch.float32, latents="sample")

    if pair.name == "sana":
        with pytest.raises(ValueError, match=r"no posterior; set encoder\.latents=mean"):
            drawn()
        return
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean = pair.latents.encode(pixels)
    noise = torch.randn(mean.shape)
    config = pair.pipeline.vae.config
    expected = mean + pair.pipeline.vae.encode(pixels).latent_dist.std * noise * config.scaling_factor
    torch.testing.assert_close(drawn().encode(pixels, noise), expected, rtol=0, atol=1e-5)


def test_missing_folders_are_named(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer.*model\.path"):
        pair.cls.text_encoder(tmp_path, "cpu", torch.float32, 8, "")
    with pytest.raises(FileNotFoundError, match=r"vae.*model\.path"):
        pair.cls.latent_encoder(tmp_path, "vae", "cpu", torch.float32)
    (tmp_path / "part").mkdir()
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder"):
        if (pair.folder / name).is_dir() and not (pair.name == "sana" and name == "text_encoder"):
            (tmp_path / "part" / name).symlink_to(pair.folder / name)
    missing = "text_encoder" if pair.name == "sana" else "text_encoder_2"
    with pytest.raises(FileNotFoundError, match=rf"{missing} does not exist; model\.path"):
        pair.cls.text_encoder(tmp_path / "part", "cpu", torch.float32, 8, "")
