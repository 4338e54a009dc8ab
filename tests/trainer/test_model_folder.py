"""Models below s3://, and published TwinFlow checkpoints, through what a run loads them with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs import load as configuration
from configs.schema import Config
from models import tiny
from models.backbones.qwen_image import QwenImage
from tests.data.conftest import ObjectStore
from tests.data.conftest import store as store
from trainer import initial_weights
from trainer.build import text_encoder
from trainer.model_folder import with_local_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.write(path, "pipeline", seed=0)
    return path


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    keys = ("run.name", "data.manifest", "train.steps", "train.global_batch_size", "train.micro_batch_size")
    made = configuration.load([], [*(f"{key}=1" for key in keys), f"model.path={folder}"])
    made.data.cache_dir = str(tmp_path / "cache")
    return made


def test_a_model_on_s3_is_loaded_like_a_local_one(store: ObjectStore, folder: Path, config: Config) -> None:
    store.client.create_bucket(Bucket="models")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        store.client.put_object(Bucket="models", Key=f"base/{path.relative_to(folder)}", Body=path.read_bytes())
    store.client.put_object(Bucket="models", Key="base/transformer/evil.bin", Body=b"pickle")
    config.data.endpoint_url = store.endpoint_url
    there = with_local_model(replace(config, model={**config.model, "path": "s3://models/base"}))
    path = Path(there.model["path"])
    assert path.is_relative_to(str(config.data.cache_dir))
    assert {p.relative_to(path) for p in path.rglob("*") if p.is_file()} == {p.relative_to(folder) for p in files}
    here, mirrored = (QwenImage.from_folder(each, device="cpu") for each in (folder, path))
    here.load(str(folder), 0)
    mirrored.load(str(path), 0)
    for a, b in zip(here.parameters(), mirrored.parameters(), strict=True):
        assert torch.equal(a, b)
    captions = ["a handwritten two"]
    a, b = (text_encoder(each, torch.device("cpu")).encode(captions) for each in (config, there))
    assert torch.equal(a.embeds, b.embeds)
    assert with_local_model(config) == config


def test_a_published_checkpoints_keys_are_a_start(folder: Path, config: Config, tmp_path: Path) -> None:
    """A published TwinFlow Qwen-Image folder holds the base's keys and time_text_embed_2.*, trained."""
    published = QwenImage.from_folder(folder, device="cpu")
    published.load(str(folder), 0)
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.mul_(1.5)
        published.time_text_embed_2.timestep_embedder.linear_1.weight.mul_(-2)
    published.export(str(tmp_path / "published"), published.state_dict())
    config.init_from.path = str(tmp_path / "published")
    model = QwenImage.from_folder(folder, device="cpu")
    initial_weights.loader(config, resumes=False, teacher="online")(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, published.get_parameter(name)), name
