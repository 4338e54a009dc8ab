"""The whole way of a user: captioned PNGs, shards on S3, the published recipe on two ranks, images by plain diffusers.

Every component of the pipeline takes part: tokenizer, text encoder, transformer, VAE, each as small as it can be.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.pack import main as pack_main
from models import tiny
from tests.data.conftest import ObjectStore
from tests.data.conftest import store as store
from tests.data.pictures import ROOT, body, picture
from tests.trainer.plain_diffusers import Plain
from trainer import export

STEPS = 4
PACK = ("--resolution", "32", "--bucket-step", "16", "--min-bucket", "4", "--workers", "0", "--shard-mb", "0.05")


def twinflow(*arguments: object) -> None:
    """A command that must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def photograph(folder: Path, count: int) -> Path:
    """PNGs of several shapes, a caption of 2 to 40 words beside each."""
    folder.mkdir()
    for n in range(count):
        size = ((40, 40), (40, 90))[n % 2]
        (folder / f"{n:02d}.png").write_bytes(body(picture(*size, n)))
        words = ["a", "handwritten", *["seven"] * (n * 7 % 39)]
        (folder / f"{n:02d}.txt").write_text(" ".join(words))
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    return [line["values"] for line in lines if line["kind"] == "metrics" and "loss" in line["values"]]


def photograph_edits(folder: Path, count: int) -> Path:
    """Sources, what they become, and the instruction, all 40 x 40 pixels."""
    folder.mkdir()
    for n in range(count):
        (folder / f"{n:02d}.source.png").write_bytes(body(picture(40, 40, n)))
        (folder / f"{n:02d}.png").write_bytes(body(picture(40, 40, n + 100)))
        (folder / f"{n:02d}.txt").write_text(" ".join(["Edit", "this", "image.", *["seven"] * (n * 7 % 39)]))
    return folder


def trained(store: ObjectStore, place: Path, shards: str, preset: str, *more: str) -> Path:
    """The export of a run of the published recipe, STEPS steps on two ranks, from a tiny model of `preset`."""
    model, run, dest = place / "model", place / "run", place / "generator"
    tiny.write(model, preset, seed=0)
    given = {
        "run.dir": run,
        "model.path": model,
        "data.manifest": shards,
        "data.endpoint_url": store.endpoint_url,
        "data.cache_dir": place / "cache",
        "data.workers": 0,
        "train.steps": STEPS,
        "train.global_batch_size": 4,
        "checkpoint.every": 2,
        "sample.every": 0,
        "tracking.uri": f"sqlite:///{place}/mlflow.db",
        "tracking.every": 1,
        "runtime.nproc": 2,
        "runtime.threads": 1,
    }
    twinflow("train", "configs/qwen_image/full.yaml", *(f"{key}={value}" for key, value in given.items()), *more)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    found = metrics(run)
    assert len(found) == STEPS and all(math.isfinite(values["loss"]) for values in found)
    assert sum(count for path, count in store.gets.items() if path.endswith(".tar")) > 0
    assert export.main([str(run), str(dest), "--dtype", "float32"]) == 0
    after, base = (load_file(folder / "transformer/diffusion_pytorch_model.safetensors") for folder in (dest, model))
    assert after.keys() > base.keys()
    assert max(float((after[name] - tensor).abs().max()) for name, tensor in base.items()) > 0
    return dest


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plain]:
    """An interpreter in which this project is not installed."""
    process = Plain(tmp_path_factory.mktemp("elsewhere"))
    yield process
    process.stop()


def drawn(plain: Plain, folder: Path, prompts: list[str], *calls: dict[str, Any]) -> list[Tensor]:
    """Images [n, 3, H, W] in [0, 1] of an exported folder at two evaluations, of each of the calls."""
    out = folder.with_suffix(".images")
    named = {str(number): {"preset": "2nfe", **call} for number, call in enumerate(calls)}
    answer = plain.ask(folder=str(folder), prompts=prompts, seed=0, calls=named, out=str(out))
    assert answer["ours"] == []
    images: dict[str, Tensor] = torch.load(out, weights_only=True)
    return list(images.values())


@pytest.mark.slow
def test_captioned_pictures_become_a_generator_that_plain_diffusers_runs(
    store: ObjectStore, tmp_path: Path, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    store.client.create_bucket(Bucket="pets")
    pictures, shards = photograph(tmp_path / "pictures", 24), "s3://pets/shards"
    assert pack_main([str(pictures), shards, *PACK, "--endpoint-url", store.endpoint_url]) == 0
    assert "packed 24 images; left out: nothing" in capsys.readouterr().out
    dest = trained(store, tmp_path, shards, "pipeline")
    prompts = ["a handwritten seven", "a handwritten two, and more words than that"]
    (images,) = drawn(plain, dest, prompts, {})
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all() and images.std() > 0.01
    assert (images[0] - images[1]).abs().max() > 1e-4, "both prompts give one image"


@pytest.mark.slow
def test_pairs_of_pictures_become_an_editor_that_plain_diffusers_runs(
    store: ObjectStore, tmp_path: Path, plain: Plain, capsys: pytest.CaptureFixture[str]
) -> None:
    store.client.create_bucket(Bucket="edits")
    pairs, shards = photograph_edits(tmp_path / "pairs", 12), "s3://edits/shards"
    assert pack_main([str(pairs), shards, *PACK, "--kind", "edits", "--endpoint-url", store.endpoint_url]) == 0
    assert "packed 12" in capsys.readouterr().out
    editing = ("encoder.null_prompt=Edit this image.", "encoder.seen_edge=64", "sample.prompts=[]")
    dest = trained(store, tmp_path, shards, "edit_plus", *editing)
    one, other = ({"image": [str(pairs / f"{n:02d}.source.png")]} for n in (0, 1))
    images = drawn(plain, dest, ["Edit this image."], one, other)
    for edited in images:
        assert edited.shape == (1, 3, 32, 32)
        assert edited.isfinite().all() and edited.std() > 0.01
    assert (images[0] - images[1]).abs().max() > 1e-4, "both sources give one image"
