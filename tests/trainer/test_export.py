"""From training to images of plain diffusers, for every backbone: the exported folder draws what the trainer draws."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from configs.schema import Config, InitFrom, Lora
from data.pack import main as pack_main
from models import tiny
from models.backbones.qwen_image import unpack
from models.weights import CheckpointError
from tests.ranks import run_ranks
from tests.trainer.plain_diffusers import Plain
from tests.trainer.precomputing import PACK, SMOKE, settings, write_pictures
from tests.trainer.small_runs import trained_loss
from trainer import export, initial_weights, origin
from trainer.generate import network
from trainer.generate.sampler import preset
from trainer.run import Run

PROMPTS = ["a handwritten zero", "a handwritten three, and a second one that is larger"]
PRESETS = ("1nfe", "2nfe", "4nfe", "any2", "multi3")
SEED = 5
ADAPTED = {"lora.rank": 16, "optimizer.learning_rate": 0.02}
CASES: dict[str, dict[str, Any]] = {name: {"model.name": name} for name in sorted(tiny.SMALLEST)} | {
    "lora": {"model.name": "qwen_image", **ADAPTED},
    "lora_single_time": {"model.name": "qwen_image", "lora.variant": "single_time", **ADAPTED},
}
TOKENS = 64


@dataclass
class Trained:
    """A run of 20 steps on 2 ranks. images: of its own sampler, by weights and preset; more: its overrides."""

    folder: Path
    before: float
    after: float
    images: dict[str, dict[str, Tensor]]
    more: dict[str, Any]

    @property
    def run(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    path = tmp_path_factory.mktemp(request.param)
    tiny.write(path / "model", tiny.SMALLEST[CASES[request.param]["model.name"]], seed=0)
    write_pictures(path / "pictures", 16)
    assert pack_main([str(path / "pictures"), str(path / "data"), *PACK]) == 0
    given: dict[str, Any] = {
        "data.held_out": path / "data",
        "objective.enhanced_ratio": 0.0,
        "objective.distance": "l2",
        "objective.rectification_weight": 0.1,
        "objective.time_step": 0.25,
        "objective.time_mean": 2.0,
        "optimizer.learning_rate": 1e-2,
        "schedule.name": "constant",
        "train.steps": 20,
        "train.global_batch_size": 16,
        "sample.prompts": json.dumps(PROMPTS),
        "sample.presets": "[2nfe]",
        "encoder.max_text_tokens": TOKENS,
    } | CASES[request.param]
    overrides = settings(path / "model", path / "data", path / "run", **given)
    before, after, images = run_ranks(trained_loss, 2, [str(SMOKE)], overrides, own_images, timeout=240.0)[0]
    return Trained(path, before, after, images, given)


def own_images(run: Run) -> dict[str, dict[str, Tensor]]:
    """Images in [0, 1] by the trainer's own sampler and engine, with the noise that a pipeline draws; and its grids."""
    cond = run.encoding.prompts(PROMPTS)
    images: dict[str, dict[str, Tensor]] = {}
    for which in ("online", "ema"):
        with torch.no_grad(), run.nets.aside(), run.engine.weights(which):
            latents = {name: own_latents(run, cond, name) for name in PRESETS}
        images[which] = {
            name: (run.encoding.latents.decode(x) / 2 + 0.5).clamp(0, 1).cpu() for name, x in latents.items()
        }
    run.showcase.grids(run)
    return images


def own_latents(run: Run, cond: Any, name: str) -> Tensor:
    shape = (len(PROMPTS), *run.showcase.latent_shape)
    generator = torch.Generator().manual_seed(SEED)

    def velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return run.nets.velocity(x.float(), t.float(), r.float(), cond)

    def eps(step: int) -> Tensor:
        if run.config.model["name"] != "qwen_image":
            return torch.randn(shape, generator=generator)
        _, channels, height, width = shape  # its pipeline samples packed tokens
        return unpack(torch.randn(shape[0], height * width // 4, channels * 4, generator=generator), 2, height, width)

    return preset(name).sample(velocity, torch.randn(shape, generator=generator), eps)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    process = Plain(tmp_path_factory.mktemp("elsewhere"))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def exported(trained: Trained) -> Path:
    dest = trained.folder / "exported"
    more = ("--dtype", "float32", "--license", "apache-2.0", "--base-model", "someone/base")
    assert export.main([str(trained.run), str(dest), *more]) == 0
    return dest


def drawn(plain: Plain, folder: Path, calls: dict[str, dict[str, Any]], **more: Any) -> dict[str, Tensor]:
    out = folder.with_suffix(".images")
    answer = plain.ask(folder=str(folder), prompts=PROMPTS, seed=SEED, calls=calls, out=str(out), **more)
    assert answer["ours"] == []
    images: dict[str, Tensor] = torch.load(out, weights_only=True)
    return images


def distance(images: Tensor, expected: Tensor) -> float:
    assert images.shape == expected.shape
    return float((images - expected).abs().max())


def test_training_lowers_the_loss_of_a_fixed_batch(trained: Trained) -> None:
    assert trained.after <= 0.8 * trained.before


def test_plain_diffusers_draws_what_the_trainer_draws(trained: Trained, exported: Path, plain: Plain) -> None:
    calls: dict[str, dict[str, Any]] = {name: {"preset": name} for name in PRESETS}
    calls |= {"default": {}, "steps": {"num_inference_steps": 4}}
    images, expected = drawn(plain, exported, calls), trained.images["ema"]
    for name in PRESETS:
        assert distance(images[name], expected[name]) <= 1e-5, name
    assert torch.equal(images["default"], images["2nfe"]) and torch.equal(images["steps"], images["4nfe"])
    assert distance(images["2nfe"], expected["4nfe"]) > 1e-2
    assert distance(trained.images["online"]["1nfe"], expected["1nfe"]) > 1e-3


def test_online_weights_leave_by_the_same_way(trained: Trained, plain: Plain) -> None:
    dest = trained.folder / "online"
    checkpoint = trained.run / "checkpoints/step_00000020"
    assert export.main([str(checkpoint), str(dest), "--weights", "online", "--dtype", "float32"]) == 0
    images = drawn(plain, dest, {"4nfe": {"preset": "4nfe"}})
    assert distance(images["4nfe"], trained.images["online"]["4nfe"]) <= 1e-5


def test_a_run_starts_from_an_export(trained: Trained, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    assert export.main([str(trained.run), str(exported), "--weights", "online", "--dtype", "float32"]) == 0
    given = trained.more | {"init_from.path": exported, "train.steps": 1}
    overrides = settings(trained.folder / "model", trained.folder / "data", tmp_path / "run", **given)
    before, _, _ = run_ranks(trained_loss, 2, [str(SMOKE)], overrides, timeout=240.0)[0]
    assert before == pytest.approx(trained.after, rel=1e-5)  # adapters are merged in float32


def test_an_export_that_is_asked_at_one_time_is_no_start_for_two(trained: Trained, exported: Path) -> None:
    for rank, variant in ((None, "single_time"), (4, "second_embedding"), (4, "single_time")):
        config = Config(lora=Lora(rank=rank, variant=variant), init_from=InitFrom(path=str(exported)))
        refused = "single_time" in trained.more.values() and (rank, variant) != (4, "single_time")
        with pytest.raises(CheckpointError, match="could not learn") if refused else contextlib.nullcontext():
            initial_weights.loader(config, resumes=False, teacher="online")


def velocities(exported: str) -> dict[str, Tensor]:
    """Of an export: as `twinflow sample` asks for them at (t, r), and those at (t, r) and at t - r/2."""
    found, device = origin.find(exported, None, None), torch.device("cpu")
    plain = network.filled(found, "online", network.architecture(found), device)
    x_t, cond, _ = tiny.example(plain, 3)
    t, r = torch.tensor([0.9, 0.5, -0.3]), torch.tensor([0.4, 0.5, -0.7])
    with torch.no_grad():
        asked = network.load(found, "online", network.architecture(found), device).velocity(x_t, t, r, cond)
        return {"asked": asked, "two": plain(x_t, t, r, cond), "one": plain(x_t, t - r / 2, t - r / 2, cond)}


def test_an_export_is_sampled_at_the_times_that_its_pipeline_asks(trained: Trained, exported: Path) -> None:
    found = run_ranks(velocities, 1, str(exported))[0]
    wanted = "one" if trained.more.get("lora.variant") == "single_time" else "two"
    assert distance(found["asked"], found[wanted]) <= 1e-6 < distance(found["one"], found["two"])


def test_the_stock_pipeline_class_draws_with_few_presets(trained: Trained, exported: Path, plain: Plain) -> None:
    off: dict[str, dict[str, Any]] = {
        "qwen_image": {},
        "sd3": {"guidance_scale": 1.0},
        "sana": {"guidance_scale": 1.0, "use_resolution_binning": False},
        "z_image": {"guidance_scale": 0.0},
    }
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": TOKENS}
    images = drawn(plain, exported, {"one": call | off[trained.more["model.name"]]}, stock=True)
    assert distance(images["one"], trained.images["ema"]["1nfe"]) <= 1e-5


def test_the_folder_holds_no_pickles_no_links_and_no_secrets(trained: Trained, exported: Path) -> None:
    files = [file for file in exported.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {
        ".safetensors",
        ".json",
        ".txt",
        ".model",
        ".py",
        ".md",
        ".png",
        ".jinja",
    }
    assert not any(file.is_symlink() for file in files)
    card = (exported / "README.md").read_text()
    assert str(trained.folder) not in card and str(Path.home()) not in card
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert "license: apache-2.0" in head and "base_model: someone/base" in head and "library_name: diffusers" in head
    assert "![2nfe](samples/2nfe.png)" in text and (exported / "samples/2nfe.png").exists()
    assert "learning_rate: 0.0" in text and "distance: l2" in text and "someone/base" in text
    assert "licence was not given" not in text


def test_parameters_can_leave_in_bfloat16(trained: Trained, exported: Path) -> None:
    dest = trained.folder / "half"
    assert export.main([str(trained.run), str(dest)]) == 0
    file = "transformer/diffusion_pytorch_model.safetensors"
    with safe_open(dest / file, "pt") as half, safe_open(exported / file, "pt") as whole:
        for name in whole.keys():  # noqa: SIM118
            found, expected = half.get_tensor(name), whole.get_tensor(name)
            assert found.dtype == (torch.float32 if name.startswith("pos_embed.pos") else torch.bfloat16)
            assert torch.equal(found, expected.to(found.dtype))
    assert "licence was not given" in (dest / "README.md").read_text()


def test_what_cannot_be_exported_is_refused(
    trained: Trained, exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        assert export.main([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    assert "exists; choose another folder" in refused(trained.run, exported)
    assert "is a diffusers folder already" in refused(exported, tmp_path / "again")
    assert "unknown sampler 'quick'; choose" in refused(trained.run, tmp_path / "x", "--preset", "quick")
    assert "does not exist; name a run's folder" in refused(tmp_path / "none", tmp_path / "x")
    broken = tmp_path / "broken"
    shutil.copytree(trained.folder / "model", broken)
    shutil.rmtree(broken / "vae")
    assert "vae" in refused(trained.run, tmp_path / "x", "--base", broken)
    assert "is not on this machine; name it with --base" in refused(trained.run, tmp_path / "x", "--base", "none")
    assert not (tmp_path / "x").exists() and list(tmp_path.glob(".x*")) == []


def test_an_export_that_fails_leaves_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(export, "write_card", full)
    assert export.main([str(trained.run), str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []
