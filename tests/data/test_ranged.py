import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from data.parts import PART, download_parts
from data.ranged import RangedShard, coalesced
from data.s3 import DataError, open_folder
from data.samples import SampleError
from tests.data.conftest import ObjectStore
from tests.data.memory import index, memory_set
from tests.data.sets import noise_shards, write_set

BODY = os.urandom(20_000)
SPANS = [[(512, 600), (2048, 30)], [(3000, 50)], [(9000, 1000)], []]


def test_members_and_samples_a_header_apart_share_a_range() -> None:
    assert coalesced(index(SPANS), [0]) == [([0], 512, 1566)]
    assert coalesced(index(SPANS), [1, 0, 1]) == [([0, 1], 512, 2538)]
    assert coalesced(index(SPANS), [2, 0]) == [([0], 512, 1566), ([2], 9000, 1000)]
    assert coalesced(index(SPANS), [3]) == []


def test_only_what_is_asked_for_is_fetched_and_stand_ins_when_they_are_needed() -> None:
    manifest, folder = memory_set([200])
    folder.objects["0.tar"] = BODY
    with ThreadPoolExecutor(2) as pool:
        with RangedShard(folder, manifest.shards[0], index(SPANS), [0, 2], pool) as shard:
            assert os.pread(shard.descriptor(0), 600, 512) == BODY[512:1112]
            assert os.pread(shard.descriptor(2), 1000, 9000) == BODY[9000:10000]
            assert sorted(folder.reads) == [("0.tar", 512, 1566), ("0.tar", 9000, 1000)]
            assert os.pread(shard.descriptor(1), 50, 3000) == BODY[3000:3050]
            assert folder.reads[2:] == [("0.tar", 3000, 50)]
            file = shard.descriptor(3)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_a_failed_fetch_is_raised_where_its_sample_is_wanted() -> None:
    manifest, folder = memory_set([200])
    folder.objects.clear()
    with (
        ThreadPoolExecutor(2) as pool,
        RangedShard(folder, manifest.shards[0], index(SPANS), [0], pool) as shard,
        pytest.raises(DataError, match=r"memory://set/0\.tar: no such object"),
    ):
        shard.descriptor(0)


def test_a_sample_that_claims_too_much_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.ranged._MOST", 1500)
    manifest, folder = memory_set([200])
    with (
        ThreadPoolExecutor(1) as pool,
        RangedShard(folder, manifest.shards[0], index(SPANS), [0], pool) as shard,
        pytest.raises(SampleError, match="sample k0: its members span 1566 bytes where at most 1500"),
    ):
        shard.descriptor(0)
    assert folder.reads == []


def test_a_small_cache_gives_the_same_batches_and_stand_ins(store: ObjectStore, tmp_path: Path) -> None:
    shards = noise_shards(6, 8)
    shards[0]["0-2.png"] = b"no image"
    folder = write_set(tmp_path / "set", shards)
    remote = read_manifest(store.upload(folder, "by-ranges", "set"), store.endpoint_url)
    expected = list(
        Loader(Order(read_manifest(str(folder)), seed=3, global_batch_size=8), read_manifest(str(folder)), steps=6)
    )
    store.gets.clear()
    options = {"cache_dir": str(tmp_path / "cache"), "endpoint_url": store.endpoint_url}
    loader = Loader(Order(remote, seed=3, global_batch_size=8), remote, steps=6, cache_gb=1e-4, **options)  # type: ignore[arg-type]
    assert loader.reach.ranged
    for a, b in zip(loader, expected, strict=True):
        assert a.pixels is not None and b.pixels is not None
        assert torch.equal(a.pixels, b.pixels)
        assert (a.keys, a.captions) == (b.keys, b.captions)
        assert [bad.key for bad in a.replaced] == [bad.key for bad in b.replaced]
    assert not [path for path in (tmp_path / "cache").glob("*.object") if path.stat().st_size > 10_000], "no tar"
    assert sum(count for path, count in store.gets.items() if path.endswith(".tar")) <= 48 + 1


def bodies(body: bytes, fail_at: int = -1) -> object:
    def read(start: int, length: int | None) -> Iterator[bytes]:
        end = len(body) if length is None else start + length
        for position in range(start, end, 1 << 20):
            if start <= fail_at < end:
                raise DataError("part failed")
            yield body[position : min(end, position + (1 << 20))]

    return read


def test_an_object_comes_together_from_its_parts(tmp_path: Path) -> None:
    body = os.urandom(2 * PART + 12345)
    with open(tmp_path / "x", "w+b") as file, ThreadPoolExecutor(3) as pool:
        assert download_parts(bodies(body), file.fileno(), len(body), pool) == len(body)  # type: ignore[arg-type]
        assert (tmp_path / "x").read_bytes() == body
        grown = body + b"more"
        assert download_parts(bodies(grown), file.fileno(), len(body), pool) == len(grown)  # type: ignore[arg-type]


def test_a_part_that_fails_ends_the_others_before_it_is_raised(tmp_path: Path) -> None:
    body, running, ended = bytes(4 * PART), threading.Event(), []

    def read(start: int, length: int | None) -> Iterator[bytes]:
        if start == 0:
            assert running.wait(10)
            raise DataError("part failed")
        running.set()
        yield body[:100]
        ended.append(start)

    with open(tmp_path / "x", "w+b") as file, ThreadPoolExecutor(2) as pool:
        with pytest.raises(DataError, match="part failed"):
            download_parts(read, file.fileno(), len(body), pool)
        before = list(ended)
    assert before == ended, "a part was written after the failure was raised"


def test_large_objects_are_fetched_by_parts_of_one_version(store: ObjectStore) -> None:
    body = os.urandom(PART + 1000)
    store.client.create_bucket(Bucket="parts")
    etag = store.client.put_object(Bucket="parts", Key="x", Body=body)["ETag"]
    folder = open_folder("s3://parts", store.endpoint_url)
    for given, requests in ((etag, 2), (None, 1)):
        store.gets.clear()
        with open(os.memfd_create("x"), "w+b") as file:
            assert folder.download("x", file, given, len(body), 2) == len(body)
            file.seek(0)
            assert file.read() == body
        assert store.gets["/parts/x"] == requests, "without an ETag nothing holds parts together"
    with open(os.memfd_create("x"), "w+b") as file, pytest.raises(DataError, match="changed since"):
        folder.download("x", file, "0" * 32, len(body), 2)
