"""A folder of an object store on this machine: downloaded once by whoever comes first, complete or absent."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from data import mirror as mirrors
from data.mirror import mirror
from data.s3 import DataError
from tests.data.conftest import ObjectStore

FILES = {"config.json": b"{}", "text_encoder/model.safetensors": b"w" * 5000, "transformer/model.bin": b"pickle"}


@pytest.fixture
def bucket(store: ObjectStore, request: pytest.FixtureRequest) -> str:
    name = f"mirror-{abs(hash(request.node.name))}"
    store.client.create_bucket(Bucket=name)
    for key, body in FILES.items():
        store.client.put_object(Bucket=name, Key=f"m/{key}", Body=body)
    store.gets.clear()
    return name


def wanted(name: str) -> bool:
    return not name.endswith(".bin")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_wanted_is_there_and_not_fetched_again(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    first = mirror(f"s3://{bucket}/m", wanted, str(tmp_path), store.endpoint_url)
    assert contents(first) == {name: body for name, body in FILES.items() if wanted(name)}
    assert first.parent == tmp_path / "models"
    store.gets.clear()
    assert mirror(f"s3://{bucket}/m", wanted, str(tmp_path), store.endpoint_url) == first
    assert not any(name in path for path in store.gets for name in FILES)
    (first / "config.json").write_bytes(b"")  # a disk that lost it
    mirror(f"s3://{bucket}/m", wanted, str(tmp_path), store.endpoint_url)
    assert contents(first)["config.json"] == b"{}"
    store.client.put_object(Bucket=bucket, Key="m/config.json", Body=b"[]")
    changed = mirror(f"s3://{bucket}/m", wanted, str(tmp_path), store.endpoint_url)
    assert changed != first and contents(changed)["config.json"] == b"[]"


def test_an_interrupted_download_is_absent_and_goes_on(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = mirrors.S3Store.download

    def broken(self: mirrors.S3Store, name: str, *rest: object) -> int:
        if name.endswith(".safetensors"):
            raise DataError("the network is gone")
        return download(self, name, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(mirrors.S3Store, "download", broken)
        with pytest.raises(DataError, match="the network is gone"):
            mirror(f"s3://{bucket}/m", wanted, str(tmp_path), store.endpoint_url)
    assert [p.name.split(".")[1] for p in (tmp_path / "models").iterdir() if p.is_dir()] == ["partial"]
    store.gets.clear()
    found = mirror(f"s3://{bucket}/m", wanted, str(tmp_path), store.endpoint_url)
    assert contents(found).keys() == {"config.json", "text_encoder/model.safetensors"}
    assert not any("config.json" in path for path in store.gets)


def test_ranks_of_a_node_download_once(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    found: list[Path] = []
    arguments = (f"s3://{bucket}/m", wanted, str(tmp_path), store.endpoint_url)
    threads = [threading.Thread(target=lambda: found.append(mirror(*arguments))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    assert store.gets[f"/{bucket}/m/text_encoder/model.safetensors"] == 1


def test_what_cannot_be_mirrored_is_said(
    store: ObjectStore, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mirror(str(tmp_path), wanted, None, None) == tmp_path  # nothing to do
    with pytest.raises(DataError, match="no model files"):
        mirror(f"s3://{bucket}/elsewhere", wanted, str(tmp_path), store.endpoint_url)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"do not fit .*data\.cache_dir"):
        mirror(f"s3://{bucket}/m", wanted, str(tmp_path), store.endpoint_url)
