import hashlib
import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.manifest import read_manifest
from data.s3 import BudgetSpentError, DataError, LocalFolder, S3Folder, open_folder
from tests.data.conftest import ObjectStore
from tests.data.rclone import KEY, SECRET, RcloneServer


def test_disk_and_s3_give_the_same_bytes(store: ObjectStore, digits_folder: Path, digits_on_s3: str) -> None:
    here, there = open_folder(str(digits_folder / "train")), open_folder(digits_on_s3, store.endpoint_url)
    assert isinstance(here, LocalFolder)
    assert isinstance(there, S3Folder)
    assert here.sizes() == there.sizes()
    assert (
        here.sizes("digits-000003").keys()
        == there.sizes("digits-000003").keys()
        == {f"digits-000003.{s}" for s in ("tar", "idx")}
    )
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


def test_the_folders_that_consoles_make_are_no_objects(store: ObjectStore) -> None:
    store.client.create_bucket(Bucket="console")
    for key in ("set/", "set/deeper/", "set/x"):
        store.client.put_object(Bucket="console", Key=key, Body=b"")
    assert open_folder("s3://console/set", store.endpoint_url).sizes() == {"x": 0}


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


def test_an_unreachable_server_names_the_endpoint(store: ObjectStore) -> None:
    began = time.monotonic()
    with pytest.raises(
        BudgetSpentError,
        match=r"at http://127.0.0.1:9: the server cannot be reached; check endpoint_url.*failed attempts",
    ):
        open_folder("s3://bucket/x", "http://127.0.0.1:9", 0.6).read("x")
    assert time.monotonic() - began < 5


def test_wrong_credentials_are_refused_at_once_with_the_remedy(
    rclone: RcloneServer, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    folder = open_folder("s3://digits/train", rclone.endpoint_url, 61.0)  # its clients are its own
    with pytest.raises(DataError, match=r"s3://digits/train at .*check the credentials .AWS_ACCESS_KEY_ID") as error:
        folder.sizes()
    assert not isinstance(error.value, BudgetSpentError)


def test_an_independent_server_gives_the_same_bytes(
    rclone: RcloneServer, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    here, there = open_folder(str(digits_folder / "train")), open_folder("s3://digits/train", rclone.endpoint_url, 62.0)
    assert here.sizes() == there.sizes()
    name = "digits-000003.tar"
    assert here.read(name) == there.read(name)
    assert here.read(name, 512, 100) == there.read(name, 512, 100)
    assert here.read(name, 1000) == there.read(name, 1000)
    etag = hashlib.md5(here.read(name)).hexdigest()
    assert there.download(name, io.BytesIO(), etag) == here.sizes()[name]
    with pytest.raises(DataError, match=r"changed .*restore the object"):  # it ignores If-Match
        there.download(name, io.BytesIO(), "0" * 32)


def test_a_store_that_ignores_ranges_is_read_correctly(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_range(params: dict[str, object], **context: object) -> None:
        params.pop("Range", None)

    body = bytes(range(256)) * 8
    store.client.create_bucket(Bucket="whole")
    store.client.put_object(Bucket="whole", Key="x", Body=body)
    folder = open_folder("s3://whole", store.endpoint_url)
    assert isinstance(folder, S3Folder)
    event = "provide-client-params.s3.GetObject"
    folder._client.meta.events.register(event, without_range)
    try:
        assert folder.read("x", 300, 100) == body[300:400]
        assert folder.read("x", 300) == body[300:]
    finally:
        folder._client.meta.events.unregister(event, without_range)


@pytest.fixture(scope="module")
def rclone(digits_folder: Path) -> Iterator[RcloneServer]:
    folder = digits_folder.parent / "served"
    folder.mkdir()
    shutil.copytree(digits_folder, folder / "digits")
    with RcloneServer(folder) as server:
        yield server
