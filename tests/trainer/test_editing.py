"""Editing end to end: triples of source, target and instruction train a tiny Qwen-Image-Edit on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs import load
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from data.pack import main as pack_main
from models import tiny
from models.tiny_pipelines.prompts import CAPTIONS
from tests.data.pictures import body, picture
from tests.ranks import run_ranks
from tests.trainer.precomputing import PACK, SMOKE, settings, train_here
from trainer.build import latent_encoder, text_encoder
from trainer.encoding import Encoding
from trainer.training_data import refuse_other_kind

CPU = torch.device("cpu")
STEPS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of both kinds, and edits: a picture becomes another, smaller sources than targets."""
    path = tmp_path_factory.mktemp("editing")
    for preset in ("edit", "edit_plus", "pipeline"):
        tiny.write(path / preset, preset, seed=0)
    source = path / "pairs"
    source.mkdir()
    for n in range(8):
        (source / f"{n}.png").write_bytes(body(picture(32, 32, n)))
        (source / f"{n}.source.png").write_bytes(body(picture(16, 32, 50 + n)))
        (source / f"{n}.txt").write_text(CAPTIONS[n % 10])
    assert pack_main([str(source), str(path / "edits"), *PACK, "--kind", "edits"]) == 0
    return path


def overrides(place: Path, model: str, run: Path, **more: Any) -> list[str]:
    given = {
        "data__held_out": place / "edits",
        "encoder__seen_edge": 64,
        "encoder__null_prompt": "Edit this image.",
        "objective__enhanced_ratio": 0.2,
        "objective__distance": "l2",
        "optimizer__learning_rate": 5e-3,
        "optimizer__max_grad_norm": 0,
        "schedule__name": "constant",
        "sample__presets": "[2nfe]",
        "train__steps": STEPS,
    }
    return settings(place / model, place / "edits", run, **(given | more))


def final_loss(run: Path) -> float:
    """Of the set itself, with fixed draws."""
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    (loss,) = [line["values"]["held_out/loss"] for line in lines if "held_out/loss" in line.get("values", {})]
    return float(loss)


@pytest.mark.slow
def test_twenty_steps_on_two_ranks_learn_to_edit(place: Path, tmp_path: Path) -> None:
    still = {"train__steps": 1, "optimizer__learning_rate": 1e-12}
    for run, more in (("before", still), ("after", {})):
        settled = overrides(place, "edit_plus", tmp_path / run, **more)
        results = run_ranks(train_here, 2, settled, timeout=120)
        assert [code for code, _, _ in results] == [0, 0], results
    assert final_loss(tmp_path / "after") < 0.8 * final_loss(tmp_path / "before")
    sheet = Image.open(tmp_path / "after" / "pictures" / f"edits_2nfe_step{STEPS:08d}.png")
    assert sheet.text["Captions"].splitlines()[0] in CAPTIONS  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["edit", "edit_plus"])
def test_the_null_condition_is_the_null_instruction_on_the_rows_own_image(
    place: Path, model: str, tmp_path: Path
) -> None:
    config = load.load([SMOKE], overrides(place, model, tmp_path / "run"))
    text, latents = text_encoder(config, CPU), latent_encoder(config, CPU)
    shape = lambda bucket: (4, bucket[0] // 8, bucket[1] // 8)  # noqa: E731
    encoding = Encoding(lambda: text, lambda: latents, CPU, needs_null=True, latent_shape=shape)
    manifest = read_manifest(str(place / "edits"))
    batch = next(iter(Loader(Order(manifest, seed=0, global_batch_size=4), manifest, steps=1)))
    assert batch.source_pixels is not None
    x, cond, null = encoding.encode(batch)
    assert null is not None and x.shape == (4, 4, 4, 4)
    (reference,), (of_null,) = cond.references, null.references
    assert torch.equal(reference, of_null) and torch.equal(reference, latents.encode(batch.source_pixels))
    for row in range(4):
        source = batch.source_pixels[row : row + 1]
        alone = text.encode(["Edit this image."], (source,))
        found = null.embeds[row][null.mask[row]]
        torch.testing.assert_close(found, alone.embeds[0], rtol=0, atol=2e-6)
        assert row == 0 or (found - null.embeds[0][null.mask[0]]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("model", "more", "remedy"),
    [
        ("pipeline", {}, "set model.path to a Qwen-Image-Edit folder"),
        ("edit", {"sample__prompts": "[a red fox]"}, "sample.prompts have no source images; leave it empty"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_step(
    place: Path, tmp_path: Path, model: str, more: dict[str, Any], remedy: str
) -> None:
    code, losses, message = run_ranks(train_here, 1, overrides(place, model, tmp_path / "run", **more))[0]
    assert code == 1 and not losses
    assert remedy in message


def test_an_editing_model_is_not_trained_without_sources() -> None:
    with pytest.raises(ValueError, match=r"set model\.path to a text-to-image model"):
        refuse_other_kind("images", sees_images=True)
    refuse_other_kind("images", sees_images=False)
    refuse_other_kind("edits", sees_images=True)
