"""`twinflow sample`: the same images from a run, a bare checkpoint and an export, on any number of ranks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image

from data.pack import main as pack_main
from models import lora_files, tiny
from models.weights import CheckpointError
from tests.data.conftest import ObjectStore, store  # noqa: F401 (a fixture)
from tests.ranks import run_ranks
from tests.trainer.precomputing import PACK, SMOKE, settings, write_pictures
from tests.trainer.small_runs import trained_loss
from trainer import export, export_tensors
from trainer.engines.distributed import World
from trainer.generate import draw

PROMPTS = ["a handwritten zero", 'Number "three", in a hat!', "a handwritten five"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, prompts.txt, run (2 steps), bare (its checkpoint alone), exported, raw (a run without averages),
    adapted (a LoRA run)."""
    path = tmp_path_factory.mktemp("draw")
    tiny.write(path / "model", "pipeline", seed=0)
    write_pictures(path / "pictures", 16)
    assert pack_main([str(path / "pictures"), str(path / "data"), *PACK]) == 0
    (path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    common = {"train.steps": 2, "data.held_out": path / "data", "optimizer.learning_rate": 0.03}
    for run, more in (
        ("run", dict[str, object]()),
        ("raw", {"ema.decay": 0, "sample.weights": "online", "train.steps": 1}),
    ):
        overrides = settings(path / "model", path / "data", path / run, **(common | more))
        run_ranks(trained_loss, 2, [str(SMOKE)], overrides)
    adapted = {"lora.rank": 4, "ema.decay": 0, "sample.weights": "online"}
    overrides = settings(path / "model", path / "data", path / "adapted", **(common | adapted))
    run_ranks(trained_loss, 2, [str(SMOKE)], overrides)
    shutil.copytree(path / "run/checkpoints/step_00000002", path / "bare/step_00000002")
    assert export.main([str(path / "run"), str(path / "exported"), "--dtype", "float32"]) == 0
    return path


def drawing(arguments: list[str]) -> None:
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    draw.draw(draw.parser().parse_args(arguments), world)


def images(folder: Path, checkpoint: str, out: Path, *more: Any, ranks: int = 1) -> dict[str, NDArray[np.int64]]:
    given = [str(folder / checkpoint), "--prompts", str(folder / "prompts.txt"), "--out", str(out), *map(str, more)]
    run_ranks(drawing, ranks, given)
    return {file.name: np.array(Image.open(file)).astype(int) for file in sorted(out.glob("0*.png"))}


def distance(first: dict[str, NDArray[np.int64]], second: dict[str, NDArray[np.int64]]) -> int:
    assert first.keys() == second.keys()
    return max(int(np.abs(first[name] - second[name]).max()) for name in first)


def test_images_do_not_depend_on_ranks_batch_or_the_form_of_the_weights(folder: Path, tmp_path: Path) -> None:
    one = images(folder, "run", tmp_path / "one", "--preset", "4nfe", "--per-prompt", 2)
    assert list(one) == [
        *("00000-0_a-handwritten-zero.png", "00000-1_a-handwritten-zero.png"),
        *("00001-0_number-three-in-a-hat.png", "00001-1_number-three-in-a-hat.png"),
        *("00002-0_a-handwritten-five.png", "00002-1_a-handwritten-five.png"),
    ]
    more = ("--preset", "4nfe", "--per-prompt", 2)
    two = images(folder, "run/checkpoints/step_00000002", tmp_path / "two", *more, "--batch", 1, ranks=2)
    bare = images(folder, "bare/step_00000002", tmp_path / "bare", *more, "--batch", 4)
    exported = images(folder, "exported", tmp_path / "exported", *more)
    assert max(distance(other, one) for other in (two, bare, exported)) <= 1  # rounding of a float to 8 bits
    assert {image.shape for image in one.values()} == {(32, 32, 3)}
    with Image.open(tmp_path / "two/00001-1_number-three-in-a-hat.png") as image:
        assert image.text == {"Prompt": PROMPTS[1], "Preset": "4nfe", "Seed": "0"}  # type: ignore[attr-defined]
    with Image.open(tmp_path / "two/sheet.png") as sheet:
        assert sheet.text["Captions"].splitlines() == PROMPTS  # type: ignore[attr-defined]
        assert "step 2, 4nfe, ema weights" in sheet.text["Title"]  # type: ignore[attr-defined]


def test_what_was_asked_shows_in_the_images(folder: Path, tmp_path: Path) -> None:
    given = {
        "plain": (),
        "seed": ("--seed", 1),
        "weights": ("--weights", "online"),
        "preset": ("--preset", "1nfe"),
    }
    drawn = {name: images(folder, "run", tmp_path / name, *more) for name, more in given.items()}
    assert all(distance(drawn[name], drawn["plain"]) > 1 for name in drawn if name != "plain")
    wide = images(folder, "run", tmp_path / "wide", "--resolution", "32x64")
    assert {image.shape for image in wide.values()} == {(32, 64, 3)}


def test_adapters_are_drawn_with_merged_and_saved_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged, alone = folder / "adapted", tmp_path / "merged", tmp_path / "alone"
    assert export.main([str(run), str(merged), "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert export.main([str(run), str(alone), "--dtype", "float32", "--adapters"]) == 0
    warning = capsys.readouterr().err
    assert "pipe.load_lora_weights leaves out" in warning and "export without --adapters" in warning
    own = images(folder, "adapted", tmp_path / "own", "--preset", "2nfe", ranks=2)
    assert distance(images(folder, str(merged), tmp_path / "of-merged", "--preset", "2nfe"), own) <= 1
    saved = lora_files.read(alone)
    assert saved.options.rank == 4 and any(bool((tensor != 0).any()) for tensor in saved.tensors.values())
    assert [file.name for file in alone.iterdir()] == [lora_files.FILE]


@contextlib.contextmanager
def on_a_rank(*_: object) -> Iterator[None]:
    """A process group of this process alone, that goes also after an error."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_adapters_on_another_base_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    tiny.write(other, "pipeline", seed=1)
    monkeypatch.setattr(export_tensors, "process_group", on_a_rank)
    assert export.main([str(folder / "adapted"), str(tmp_path / "out"), "--base", str(other)]) == 1
    assert "are not those that this run was started with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export.main([str(folder / "run"), str(tmp_path / "out"), "--adapters"]) == 1
    assert "holds no adapters: lora.rank was null" in capsys.readouterr().err


def test_a_run_starts_from_adapters_on_their_own_base_alone(folder: Path, tmp_path: Path) -> None:
    assert export.main([str(folder / "adapted"), str(tmp_path / "alone"), "--dtype", "float32", "--adapters"]) == 0
    other = tmp_path / "other"
    tiny.write(other, "pipeline", seed=1)

    def start(source: Path, model: Path) -> None:
        more = {"lora.rank": 4, "init_from.path": source, "init_from.weights": "online", "run.seed": 7}
        more |= {"train.steps": 1, "data.held_out": folder / "data"}
        run = tmp_path / f"from-{source.name}-on-{model.name}"
        with on_a_rank():
            trained_loss([SMOKE], settings(model, folder / "data", run, **more))

    for source in (folder / "adapted/checkpoints", tmp_path / "alone"):
        start(source, folder / "model")
        with pytest.raises(CheckpointError, match=rf"adapters in {source} .* other weights than those in {other} "):
            start(source, other)


def test_a_checkpoint_on_s3_says_itself_what_it_is(folder: Path, tmp_path: Path, store: ObjectStore) -> None:  # noqa: F811
    checkpoint = store.upload(folder / "bare/step_00000002", "draw", "of/a/run/step_00000002")
    for where in (checkpoint, checkpoint.rpartition("/")[0]):
        out = tmp_path / where.rpartition("/")[2]
        more = ("--dtype", "float32", "--endpoint-url", store.endpoint_url)
        assert export.main([where, str(out), *more]) == 0
        file = "transformer/diffusion_pytorch_model.safetensors"
        assert (out / file).read_bytes() == (folder / "exported" / file).read_bytes()


@pytest.mark.usefixtures("alone")
def test_an_editing_model_wants_more_than_prompts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write(tmp_path / "edit", "edit", seed=0)
    given = ("--prompts", str(folder / "prompts.txt"), "--resolution", "32", "--out", str(tmp_path / "out"))
    assert draw.main([str(tmp_path / "edit"), *given]) == 1
    assert "is an editing model, and prompts alone are no edits" in capsys.readouterr().err


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun around this process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_a_base_model_draws_with_multi(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for preset, speaks in (("multi3", False), ("2nfe", True)):
        given = (
            "--prompts",
            folder / "prompts.txt",
            "--resolution",
            32,
            "--out",
            tmp_path / preset,
            "--preset",
            preset,
        )
        assert draw.main([str(folder / "model"), *map(str, given)]) == 0
        assert ("knows no target time" in capsys.readouterr().out) == speaks
        assert len(list((tmp_path / preset).glob("0*.png"))) == 3


@pytest.mark.parametrize(
    ("checkpoint", "more", "message"),
    [
        ("run", ("--prompts", "gap.txt"), "line 2 is empty; write one prompt a line"),
        ("run", ("--prompts", "none.txt"), "cannot be read"),
        ("run", ("--prompts", "empty.txt"), "is empty; write one prompt a line"),
        ("run", ("--preset", "quick"), "unknown sampler 'quick'; choose 1nfe"),
        ("run", ("--resolution", "30"), "must be multiples of 16"),
        ("run", ("--resolution", "big"), "neither N nor HEIGHTxWIDTH"),
        ("run", ("--out", "model"), "is not empty; name a new folder"),
        ("run", ("--base", "nowhere"), "is not on this machine; name it with --base"),
        ("raw", ("--weights", "ema"), "holds no averaged weights .*take online"),
        ("exported", ("--weights", "ema"), "holds no averaged weights"),
        ("model", (), "does not say how large its images are; give --resolution"),
        ("nothing", (), "does not exist; name a run's folder"),
        ("data", (), "holds no complete checkpoint"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_what_cannot_be_drawn_is_refused(
    checkpoint: str,
    more: tuple[str, ...],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "gap.txt").write_text("a cat\n\na dog\n")
    (folder / "empty.txt").write_text("")
    given = {"--prompts": "prompts.txt", "--out": str(tmp_path / "out")} | dict(zip(more[::2], more[1::2], strict=True))
    monkeypatch.chdir(folder)
    assert draw.main([checkpoint, *(part for pair in given.items() for part in pair)]) == 1
    assert_matches(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("out/*"))


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)
