"""Data, checkpoints and tracking elsewhere: there, not there, not allowed. Real servers and dead endpoints."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import load
from configs.schema import Config
from tests.data import sets
from tests.data.conftest import ObjectStore, store  # noqa: F401 (a fixture)
from tests.data.rclone import KEY, SECRET, RcloneServer
from trainer.health import outside
from trainer.health.findings import GREEN, RED, YELLOW, Finding

SMOKE = str(Path(__file__).parents[3] / "configs" / "smoke.yaml")
DEAD = "http://127.0.0.1:9"


def config(*overrides: str) -> Config:
    return load.load([SMOKE], list(overrides))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.write_set(tmp_path_factory.mktemp("sets") / "noise", sets.raw_shards(2, 8, 200_000))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "BUDGET_S", 0.7)


def look(url: str, endpoint_url: str = "null", node: int = 0, size: int = 1 << 20) -> Finding:
    (found,) = outside.data_set(config(f"data.endpoint_url={endpoint_url}"), url, node, size)
    return found


def test_all_places_of_data_are_looked_at() -> None:
    assert outside.manifests(config("data.manifest=a", "data.held_out=b")) == ["a", "b"]
    several = config("data.manifest=null", "data.sources=[{manifest: a}, {manifest: s3://b}]", "data.held_out=null")
    assert outside.manifests(several) == ["a", "s3://b"]
    assert [outside.is_remote(place) for place in ("a", "/a", "file:///a", "s3://b", None)] == [False] * 3 + [
        True,
        False,
    ]


def test_data_on_s3_is_read_and_measured(
    store: ObjectStore,  # noqa: F811
    noise: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = store.upload(noise, "doctor", "noise")
    monkeypatch.setattr(outside, "_SLOW", 0.0)
    found = look(url, store.endpoint_url)
    assert found.level == GREEN and "2 shards, 16 samples" in found.value and "MB/s by one connection" in found.value
    monkeypatch.setattr(outside, "_SLOW", 1e15)
    assert look(url, store.endpoint_url).level == YELLOW
    before = store.gets["/doctor/noise/noise-1.tar"]
    look(url, store.endpoint_url, node=1)
    assert store.gets["/doctor/noise/noise-1.tar"] == before + 1  # nodes take different shards


def test_a_dead_endpoint_is_red_within_the_budget() -> None:
    began = time.monotonic()
    found = look("s3://bucket/set", DEAD)
    assert found.level == RED and "the server cannot be reached; check endpoint_url" in found.value
    assert time.monotonic() - began < 10


def test_a_missing_set_and_a_shard_that_is_gone_are_red(noise: Path, tmp_path: Path) -> None:
    assert look(str(tmp_path / "absent")).level == RED
    copy = shutil.copytree(noise, tmp_path / "copy")
    (copy / "noise-1.tar").write_bytes(b"short")
    assert look(str(copy), node=0).level in (GREEN, YELLOW)
    found = look(str(copy), node=1)
    assert found.level == RED and "5 bytes where" in found.value


@pytest.fixture
def rclone(noise: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RcloneServer]:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    with RcloneServer(noise.parent) as server:
        yield server


def test_wrong_credentials_are_red_and_not_shown(rclone: RcloneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    found = look("s3://noise", rclone.endpoint_url)
    assert found.level == RED and "check the credentials" in found.value
    assert "wrong-secret" not in found.value and SECRET not in found.value


def test_a_checkpoint_prefix_is_written_to_and_left_as_it_was(store: ObjectStore) -> None:  # noqa: F811
    store.client.create_bucket(Bucket="saves")
    (found,) = outside.checkpoints(
        config("checkpoint.dir=s3://saves/run", f"checkpoint.endpoint_url={store.endpoint_url}")
    )
    assert found.level == GREEN and "there and back" in found.value
    assert store.client.list_objects_v2(Bucket="saves")["KeyCount"] == 0
    (found,) = outside.checkpoints(config("checkpoint.dir=s3://gone/run", f"data.endpoint_url={store.endpoint_url}"))
    assert found.level == RED and "checkpoint.dir" in found.remedy


def test_a_dead_tracking_server_is_yellow_and_its_password_is_not_shown() -> None:
    (found,) = outside.tracking(config("tracking.uri=http://me:hunter2@127.0.0.1:9"))
    assert found.level == YELLOW and "hunter2" not in found.value and "127.0.0.1:9" in found.value


def test_a_new_tracking_database_is_not_made_by_looking(tmp_path: Path) -> None:
    (found,) = outside.tracking(config(f"tracking.uri=sqlite:///{tmp_path}/new/mlflow.db"))
    assert found.level == GREEN and list(tmp_path.iterdir()) == []
