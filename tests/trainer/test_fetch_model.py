"""`twinflow model fetch` against a server that speaks the hub's interface: folder, S3, interruptions, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import load as configuration
from data.store import open_store
from models.hub import wanted
from models.weights import CheckpointError
from tests.data.conftest import ObjectStore
from tests.data.conftest import store as store
from tests.trainer.hub_server import Hub
from trainer.fetch_model import _scratch
from trainer.model_folder import local_folder

INDEX = json.dumps({"_class_name": "P", "transformer": ["diffusers", "T"], "tokenizer": ["transformers", "Q"]}).encode()
MODEL = {
    "model_index.json": INDEX,
    "README.md": b"card",
    "LICENSE": b"licence",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": b"a" * 300_000,
    "transformer/diffusion_pytorch_model.safetensors.index.json": b"{}",
    "tokenizer/merges.txt": b"a b",
}
REST = {
    "transformer/diffusion_pytorch_model.bin": b"pickle",
    "transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors": b"twin",
    "tokenizer/code.py": b"raise SystemExit",
    "single_file.safetensors": b"twin",
    "images/poster.png": b"png",
    "other/config.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub(MODEL | REST)
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.stop()


def fetch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads HF_ENDPOINT when it is imported."""
    command = [sys.executable, "-m", "trainer.fetch_model", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_holds_what_a_model_is_loaded_from(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_veryverysecret"
    dest = tmp_path / "model"
    refused = fetch("org/model", dest)
    assert refused.returncode == 1 and not dest.exists()
    assert "HF_TOKEN" in refused.stderr and "Traceback" not in refused.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        done = fetch("org/model", dest)
        again = fetch("org/model", dest)
        hub.files["README.md"] = b"another card"
        moved = fetch("org/model", dest)
    assert done.returncode == 0, done.stderr
    assert "Downloading" in done.stderr or "Fetching" in done.stderr  # the progress bar
    found = contents(dest)
    marker = json.loads(found.pop("fetched.json"))
    assert found == MODEL
    assert marker["repo"] == "org/model" and len(marker["commit"]) == 40
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert again.returncode == 0 and "already complete" in again.stdout
    assert moved.returncode == 1 and "choose another DEST" in moved.stderr
    for said in (refused, done, again, moved):
        assert hub.token not in said.stdout + said.stderr


def test_an_interrupted_fetch_is_absent_and_goes_on(hub: Hub, tmp_path: Path) -> None:
    weights, words = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "tokenizer/merges.txt"
    dest = tmp_path / "model"
    hub.away.add(weights)
    first = fetch("org/model", dest)
    assert first.returncode == 1 and "the same command goes on" in first.stderr
    assert not dest.exists()
    hub.away.clear()
    hub.cut[weights] = 100_000  # and once the connection breaks
    second = fetch("org/model", dest)
    assert second.returncode == 0, second.stderr
    assert contents(dest).keys() - {"fetched.json"} == MODEL.keys()
    assert contents(dest)[weights] == MODEL[weights]
    assert hub.requests[f"GET /org/model/resolve/{hub.commit}/{words}"] == 1


def test_into_an_object_store(hub: Hub, store: ObjectStore, tmp_path: Path) -> None:
    store.client.create_bucket(Bucket="fetched")
    where = ("org/model", "s3://fetched/base", "--endpoint-url", store.endpoint_url)
    weights = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    done = fetch(*where)
    assert done.returncode == 0, done.stderr

    def objects() -> dict[str, bytes]:
        listed = store.client.list_objects_v2(Bucket="fetched", Prefix="base/")["Contents"]
        keys = sorted(listed, key=lambda entry: entry["LastModified"])
        return {
            entry["Key"].removeprefix("base/"): store.client.get_object(Bucket="fetched", Key=entry["Key"])[
                "Body"
            ].read()
            for entry in keys
        }

    found = objects()
    found.pop("fetched.json")
    assert found == MODEL
    assert not list(tmp_path.glob("twinflow-fetch-*"))
    for lost in ("model_index.json", weights):  # as if it had been killed before
        store.client.delete_object(Bucket="fetched", Key=f"base/{lost}")
    hub.requests.clear()
    assert "complete" in fetch(*where).stdout
    assert objects().keys() - {"fetched.json"} == MODEL.keys()
    assert not any("merges.txt" in path for path in hub.requests)
    assert "already complete" in fetch(*where).stdout
    store.client.put_object(Bucket="fetched", Key="other/x", Body=b"")
    assert "no fetched model" in fetch("org/model", "s3://fetched/other", *where[2:]).stderr


def test_damaged_weights_are_noticed_and_fetched_again(hub: Hub, tmp_path: Path) -> None:
    weights, dest = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", tmp_path / "model"
    hub.damaged.add(weights)
    first = fetch("org/model", dest)
    assert first.returncode == 1 and f"not what the hub lists (sha256), first {weights}" in first.stderr
    assert not dest.exists()
    hub.damaged.clear()
    assert fetch("org/model", dest).returncode == 0
    assert contents(dest)[weights] == MODEL[weights]


def test_scratch_is_ours_alone(hub: Hub, store: ObjectStore, tmp_path: Path) -> None:
    store.client.create_bucket(Bucket="scratched")
    scratch, elsewhere = tmp_path / "scratch", tmp_path / "elsewhere"
    (elsewhere / "kept").mkdir(parents=True)
    scratch.mkdir()
    (scratch / "thesis.txt").write_bytes(b"years of work")
    where = ("org/model", "s3://scratched/base", "--endpoint-url", store.endpoint_url, "--scratch", scratch)
    ours = _scratch(scratch, open_store("s3://scratched/base", store.endpoint_url).identity)
    ours.symlink_to(elsewhere)
    linked = fetch(*where)
    ours.unlink()
    ours.mkdir()
    ours.chmod(0o777)
    open_to_all = fetch(*where)
    ours.rmdir()
    for refused in (linked, open_to_all):
        assert refused.returncode == 1 and "set --scratch to a folder of yours" in refused.stderr
    assert "Contents" not in store.client.list_objects_v2(Bucket="scratched")
    done = fetch(*where)
    assert done.returncode == 0, done.stderr
    assert contents(scratch) == {"thesis.txt": b"years of work"} and (elsewhere / "kept").is_dir()
    assert list(scratch.iterdir()) == [scratch / "thesis.txt"]


def test_an_interrupted_upload_of_a_single_component_is_no_model(hub: Hub, store: ObjectStore, tmp_path: Path) -> None:
    store.client.create_bucket(Bucket="parts")
    url = "s3://parts/transformer"
    where = ("org/model", url, "--endpoint-url", store.endpoint_url, "--subfolder", "transformer")
    hub.away.add("transformer/diffusion_pytorch_model-00001-of-00002.safetensors")
    assert fetch(*where).returncode == 1
    keys = ("run.name", "data.manifest", "train.steps", "train.global_batch_size", "train.micro_batch_size")
    config = configuration.load([], [f"{key}=1" for key in keys])
    config.data.cache_dir, config.data.endpoint_url = str(tmp_path / "cache"), store.endpoint_url
    with pytest.raises(CheckpointError, match="its upload has not ended"):
        local_folder(config, url)
    hub.away.clear()
    assert fetch(*where).returncode == 0
    assert (Path(local_folder(config, url)) / "config.json").is_file()


def test_what_cannot_be_fetched_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dest = tmp_path / "model"
    assert "check name and revision" in fetch("org/model", dest, "--revision", "v9").stderr
    assert "no weights as safetensors" in fetch("org/model", dest, "--subfolder", "images").stderr
    assert "check the name" in fetch("org/other", dest).stderr
    dest.mkdir()
    assert "exists and is no fetched model" in fetch("org/model", dest).stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in fetch("org/model", dest).stderr


def test_a_folder_of_a_repository() -> None:
    assert set(wanted({**MODEL, **REST}, {"transformer", "tokenizer"})) == set(MODEL)
    assert wanted(["config.json", "diffusion_pytorch_model.safetensors", "a.ckpt", "x.pt"], None) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
