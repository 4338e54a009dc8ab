"""The whole way of a user: captioned PNGs, shards on S3, the published recipe on two ranks, images by plain diffusers.

Every component of the pipeline takes part: tokenizer, text encoder, transformer, VAE, each as small as it can be.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

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

STEPS = 4
PACK = ("--resolution", "32", "--bucket-step", "16", "--min-bucket", "4", "--workers", "0", "--shard-mb", "0.05")


def twinflow(*arguments: object) -> str:
    """The output of a command that must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


@pytest.mark.slow
def test_captioned_pictures_become_a_generator_that_plain_diffusers_runs(
    store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.client.create_bucket(Bucket="pets")
    pictures, shards = photograph(tmp_path / "pictures", 24), "s3://pets/shards"
    assert pack_main([str(pictures), shards, *PACK, "--endpoint-url", store.endpoint_url]) == 0
    assert "packed 24 images; left out: nothing" in capsys.readouterr().out

    model, run = tmp_path / "model", tmp_path / "run"
    tiny.write(model, "pipeline", seed=0)
    given = {
        "run.dir": run,
        "model.path": model,
        "data.manifest": shards,
        "data.endpoint_url": store.endpoint_url,
        "data.cache_dir": tmp_path / "cache",
        "data.workers": 0,
        "train.steps": STEPS,
        "train.global_batch_size": 4,
        "checkpoint.every": 2,
        "sample.every": 0,
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "tracking.every": 1,
        "runtime.nproc": 2,
        "runtime.threads": 1,
    }
    twinflow("train", "configs/qwen_image/full.yaml", *(f"{key}={value}" for key, value in given.items()))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    found = metrics(run)
    assert len(found) == STEPS and all(math.isfinite(values["loss"]) for values in found)
    assert sum(store.gets[path] for path in store.gets if path.endswith(".tar")) > 0

    dest = tmp_path / "generator"
    twinflow("export", run, dest, "--dtype", "float32")
    trained, base = (load_file(folder / "transformer/diffusion_pytorch_model.safetensors") for folder in (dest, model))
    assert trained.keys() > base.keys()
    assert max(float((trained[name] - tensor).abs().max()) for name, tensor in base.items()) > 0

    images = drawn(dest, tmp_path / "elsewhere", ["a handwritten seven", "a handwritten two, and more words than that"])
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all() and images.std() > 0.01
    assert (images[0] - images[1]).abs().max() > 1e-4, "both prompts give one image"


def drawn(folder: Path, elsewhere: Path, prompts: list[str]) -> Tensor:
    """Images [n, 3, H, W] in [0, 1] of an exported folder at two evaluations, where this project is not installed."""
    elsewhere.mkdir()
    plain, out = Plain(elsewhere), elsewhere / "images"
    try:
        answer = plain.ask(
            folder=str(folder), prompts=prompts, seed=0, calls={"2nfe": {"preset": "2nfe"}}, out=str(out)
        )
    finally:
        plain.stop()
    assert answer["ours"] == []
    images: dict[str, Tensor] = torch.load(out, weights_only=True)
    return images["2nfe"]
