"""Tiny folders: reproducible, complete or refused, with captions that differ."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from models import tiny
from models.backbones.qwen_image import QwenImage
from models.encoders.qwen_image import QwenImageText
from models.tiny_pipelines.prompts import CAPTIONS
from models.tiny_pipelines.qwen_image import tokenizer


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "digits"
    assert tiny.main([str(path)]) == 0
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    tiny.write(tmp_path / "again", "pipeline", seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = contents(tmp_path / "again")
    assert again == contents(folder)
    tiny.write(tmp_path / "other", "pipeline", seed=1)
    weight = "transformer/diffusion_pytorch_model.safetensors"
    assert contents(tmp_path / "other")[weight] != again[weight]


def test_existing_folder_is_kept_or_refused(digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = contents(digits)
    assert tiny.main([str(digits)]) == 0
    assert "already complete" in capsys.readouterr().out
    assert tiny.main([str(digits), "--seed", "1"]) == 1
    assert "choose another folder" in capsys.readouterr().err
    assert contents(digits) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    assert tiny.main([str(tmp_path / "mine")]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_digit_captions_are_few_tokens_far_apart(digits: Path) -> None:
    encoder = QwenImageText.from_folder(digits, "cpu", torch.float32, 512, "Generate an image.")
    cond = encoder.encode(CAPTIONS)
    assert cond.mask.all()
    assert cond.embeds.shape == (10, 8, 64)
    flat = cond.embeds.flatten(1)
    distance = torch.cdist(flat, flat) / flat.norm(dim=1).mean()
    assert distance[~torch.eye(10, dtype=torch.bool)].min() > 0.25
    assert cond.embeds[:, :2].std(dim=0).max() < 1e-4  # "a handwritten": the whole template before it was dropped


def test_digits_transformer_takes_small_grey_pixels(digits: Path) -> None:
    model = QwenImage.from_folder(digits, latents="pixels")
    assert model.latent_shape((8, 8)) == (1, 8, 8)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6


def test_tokenizer_reads_text_it_was_not_trained_on() -> None:
    words = tokenizer()
    sentence = "Zürich, 8 km: ¡olé! \n 数字"
    assert words.decode(words(sentence)["input_ids"]) == sentence


def test_diffusers_generates_from_the_folder(folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a handwritten one", height=32, width=32, num_inference_steps=1, true_cfg_scale=1.0).images
    assert images[0].size == (32, 32)
