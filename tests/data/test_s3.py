import hashlib
import io
from pathlib import Path

import pytest

from data.manifest import read_manifest
from data.s3 import DataError, LocalFolder, S3Folder, open_folder
from tests.data.conftest import ObjectStore


def test_disk_and_s3_give_the_same_bytes(store: ObjectStore, digits_folder: Path, digits_on_s3: str) -> None:
    here, there = open_folder(str(digits_folder / "train")), open_folder(digits_on_s3, store.endpoint_url)
    assert isinstance(here, LocalFolder)
    assert isinstance(there, S3Folder)
    assert here.sizes() == there.sizes()
    name = "digits-000003.tar"
    assert here.read(name) == there.read(name)
    assert here.read(name, 512, 100) == there.read(name, 512, 100) == here.read(name)[512:612]
    assert here.read(name, 1000) == there.read(name, 1000)
    assert there.read(name, 10, 0) == b""
    for folder in (here, there):
        target = io.BytesIO()
        assert folder.download(name, target) == here.sizes()[name]
        assert target.getvalue() == here.read(name)
    assert here.local_path(name) == digits_folder / "train" / name
    assert there.local_path(name) is None
    assert read_manifest(digits_on_s3, store.endpoint_url).digest == read_manifest(here.url).digest


def test_file_urls_are_plain_paths(digits_folder: Path) -> None:
    assert open_folder(f"file://{digits_folder}").url == str(digits_folder)


def test_listing_goes_past_one_page(store: ObjectStore) -> None:
    def two_a_page(params: dict[str, object], **context: object) -> None:
        params["MaxKeys"] = 2

    folder = open_folder("s3://pages/p", store.endpoint_url)
    assert isinstance(folder, S3Folder)
    store.client.create_bucket(Bucket="pages")
    for number in range(5):
        store.client.put_object(Bucket="pages", Key=f"p/{number}", Body=b"x")
    event = "provide-client-params.s3.ListObjectsV2"
    folder._client.meta.events.register(event, two_a_page)
    store.gets.clear()
    try:
        assert folder.sizes() == dict.fromkeys("01234", 1)
    finally:
        folder._client.meta.events.unregister(event, two_a_page)
    assert store.gets["/pages"] == 3


def test_a_changed_object_names_both_etags(store: ObjectStore) -> None:
    store.client.create_bucket(Bucket="changing")
    store.client.put_object(Bucket="changing", Key="x", Body=b"new")
    folder = open_folder("s3://changing", store.endpoint_url)
    present, old = hashlib.md5(b"new").hexdigest(), hashlib.md5(b"old").hexdigest()
    assert isinstance(folder, S3Folder)

    def without_condition(params: dict[str, object], **context: object) -> None:
        params.pop("IfMatch", None)

    changed = f"s3://changing/x: changed .*{present}.*{old}.*restore the object"
    with pytest.raises(DataError, match=changed) as error:
        folder.download("x", io.BytesIO(), old)
    assert error.value.__cause__ is not None, "the store itself refuses, before it sends the body"
    assert folder.download("x", io.BytesIO(), present) == 3
    # Some stores ignore If-Match.
    event = "provide-client-params.s3.GetObject"
    folder._client.meta.events.register(event, without_condition)
    try:
        with pytest.raises(DataError, match=changed):
            folder.download("x", io.BytesIO(), old)
    finally:
        folder._client.meta.events.unregister(event, without_condition)


def test_missing_things_name_url_and_remedy(store: ObjectStore, digits_on_s3: str, tmp_path: Path) -> None:
    folder = open_folder(digits_on_s3, store.endpoint_url)
    with pytest.raises(DataError, match=rf"{digits_on_s3}/x at {store.endpoint_url}: no such object; check"):
        folder.read("x")
    with pytest.raises(DataError, match=r"s3://no-such-bucket.*no such bucket"):
        open_folder("s3://no-such-bucket/x", store.endpoint_url).sizes()
    with pytest.raises(DataError, match="1 bytes from 2 where 5 were asked"):
        store.client.create_bucket(Bucket="short")
        store.client.put_object(Bucket="short", Key="x", Body=b"abc")
        open_folder("s3://short", store.endpoint_url).read("x", 2, 5)
    with pytest.raises(DataError, match="no such folder"):
        open_folder(str(tmp_path / "nowhere")).sizes()
    with pytest.raises(DataError, match="gs:// is not supported"):
        open_folder("gs://bucket/x")
    with pytest.raises(DataError, match="without a bucket name"):
        open_folder("s3://")


def test_an_unreachable_server_names_the_endpoint(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # botocore waits between its attempts
    with pytest.raises(
        DataError, match=r"at http://127.0.0.1:9: the server cannot be reached; check data.endpoint_url"
    ):
        open_folder("s3://bucket/x", "http://127.0.0.1:9").read("x")


def test_wrong_credentials_are_refused_with_the_remedy(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder("s3://bucket/x", store.endpoint_url)
    error = RuntimeError()
    error.response = {"Error": {"Code": "InvalidAccessKeyId"}, "ResponseMetadata": {"HTTPStatusCode": 403}}  # type: ignore[attr-defined]
    assert isinstance(folder, S3Folder)
    assert "check the credentials" in str(folder._explained(error, "s3://bucket/x/y"))
