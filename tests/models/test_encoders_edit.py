"""The text encoder of Qwen-Image-Edit: the pipelines' own prompt code, row by row with the row's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import tiny
from models.backbones.qwen_image import QwenImage
from models.encoders.qwen_image_edit import QwenImageEditText

EDGE = 64
CAPTIONS = ["a handwritten two", "Edit this image.", "a handwritten nine"]
EDITED = "a handwritten three"


@pytest.fixture(scope="module", params=["edit", "edit_plus"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / request.param
    tiny.write(path, request.param, seed=0)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> QwenImageEditText:
    made = QwenImage.text_encoder(folder, "cpu", torch.float32, 8, "Edit this image.")
    assert isinstance(made, QwenImageEditText)
    made.seen_edge = EDGE
    return made


def pictures(count: int, height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    """Images of whole levels, as decoded ones are."""
    levels = np.random.default_rng(seed).integers(0, 256, (count, 3, height, width))
    return torch.from_numpy(levels.astype(np.float32)) / 127.5 - 1


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


def test_it_is_the_pipelines_own_prompt(encoder: QwenImageEditText, folder: Path) -> None:
    """Of one row at a time: QwenImageEditPlusPipeline takes no more. An image is resized to the area of EDGE x EDGE."""
    sources = (pictures(3),) if "Plus" not in type(encoder.pipeline).__name__ else (pictures(3), pictures(3, 80, 32, 1))
    sizes = ((64, 64), (32, 96))
    found = encoder.encode(CAPTIONS, sources)
    assert found.mask.sum(dim=1).tolist() == [int(found.mask.shape[1]) - short for short in (1, 0, 1)]
    pipeline = encoder.pipeline
    for row, caption in enumerate(CAPTIONS):
        images = [
            pipeline.image_processor.resize(as_pil(source[row]), height, width)
            for source, (width, height) in zip(sources, sizes, strict=False)
        ]
        embeds, mask = pipeline.encode_prompt(caption, image=[[image] for image in images], device="cpu")
        assert mask is None
        torch.testing.assert_close(found.embeds[row][found.mask[row]], embeds[0], rtol=0, atol=2e-6)


def test_a_row_sees_its_own_image_and_no_other(encoder: QwenImageEditText) -> None:
    source = pictures(2)
    same = [EDITED, EDITED]
    found, turned = encoder.encode(same, (source,)), encoder.encode(same, (source.flip(0),))
    torch.testing.assert_close(found.embeds, turned.embeds.flip(0), rtol=0, atol=2e-6)
    apart = (found.embeds[0] - found.embeds[1]).abs().amax(dim=1)
    assert apart.max() > 0.1 and apart[-1] > 1e-4  # the image's tokens, and the words after them


def test_tokens_of_an_image_have_places_in_two_dimensions(encoder: QwenImageEditText) -> None:
    """As the published models were trained; without a hint transformers 5 numbers them like words."""
    seen = list[Tensor]()
    model: Any = encoder.pipeline.text_encoder
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    encoder.encode([EDITED], (pictures(1),))
    hook.remove()
    (places,) = seen
    _, rows, columns = places[-3:, 0]
    assert not torch.equal(rows, columns)
    assert (columns.diff() < 0).any()  # a new row of the image begins


def test_only_the_instruction_is_cut_and_counted(encoder: QwenImageEditText) -> None:
    encoder.truncated = 0
    words = "a handwritten one two three four five six seven eight nine"
    kept = "a handwritten one two three four five six"
    source = pictures(1)
    long, short = encoder.encode([words], (source,)), encoder.encode([kept], (source,))
    assert encoder.truncated == 1
    assert torch.equal(long.embeds, short.embeds)  # the template's end is still there
    assert not torch.equal(encoder.encode([words[:-1]], (source,)).embeds[:, :1], torch.zeros(1, 1, 16))


def test_misuse_is_named(encoder: QwenImageEditText, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wants a source image with every instruction"):
        encoder.encode(CAPTIONS)
    with pytest.raises(ValueError, match="3 instructions came with"):
        encoder.encode(CAPTIONS, (pictures(2),))
    if "Plus" not in type(encoder.pipeline).__name__:
        with pytest.raises(ValueError, match="takes one source image, not 2"):
            encoder.encode(CAPTIONS, (pictures(3), pictures(3)))
    with pytest.raises(ValueError, match="is no editing model"):
        QwenImageEditText.from_folder(tmp_path, "cpu", torch.float32, 8, "x")


def test_a_model_of_text_alone_refuses_images(tmp_path: Path) -> None:
    tiny.write(tmp_path / "model", "pipeline", seed=0)
    encoder = QwenImage.text_encoder(tmp_path / "model", "cpu", torch.float32, 8, "x")
    assert not encoder.sees_images
    with pytest.raises(ValueError, match=r"set model\.path to a Qwen-Image-Edit folder"):
        encoder.encode(CAPTIONS, (pictures(3),))
