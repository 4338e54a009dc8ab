import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.cache import Object, ShardCache, stamp
from data.s3 import BudgetSpentError, DataError, open_folder
from tests.data.conftest import ObjectStore

READ_ALL = """
import sys
from data.cache import ShardCache
from data.s3 import open_folder
url, endpoint, directory = sys.argv[1:]
folder, cache = open_folder(url, endpoint), ShardCache(directory, 10**9)
for name, size in sorted(folder.sizes().items()):
    with cache.open(folder, name, size) as file:
        assert file.read() == folder.read(name), name
"""


@pytest.fixture
def objects(store: ObjectStore, tmp_path: Path) -> str:
    """Four objects of 100 bytes."""
    bucket = f"b{time.time_ns()}"
    store.client.create_bucket(Bucket=bucket)
    for name in "abcd":
        store.client.put_object(Bucket=bucket, Key=f"set/{name}", Body=name.encode() * 100)
    return f"s3://{bucket}/set"


def read(cache: ShardCache, store: ObjectStore, url: str, name: str, size: int = 100) -> bytes:
    with cache.open(open_folder(url, store.endpoint_url), name, size) as file:
        return file.read()


def gets(store: ObjectStore, url: str, name: str) -> int:
    return store.gets[f"/{url.removeprefix('s3://')}/{name}"]


def test_two_processes_fetch_every_object_once(store: ObjectStore, digits_folder: Path, tmp_path: Path) -> None:
    url = store.upload(digits_folder / "heldout", f"b{time.time_ns()}", "set")
    arguments = [sys.executable, "-c", READ_ALL, url, store.endpoint_url, str(tmp_path / "cache")]
    processes = [subprocess.Popen(arguments, cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    names = sorted(path.name for path in (digits_folder / "heldout").iterdir())
    # Each process read every object once without the cache to compare; the cache adds one for both.
    assert {name: gets(store, url, name) for name in names} == dict.fromkeys(names, 2 + 1)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_the_longest_unused_object_leaves_first(store: ObjectStore, objects: str, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 300)
    for name in "abc":
        read(cache, store, objects, name)
    read(cache, store, objects, "a")
    assert read(cache, store, objects, "d") == b"d" * 100
    assert sum(p.stat().st_size for p in tmp_path.glob("*.object")) == 300
    for name in "acd":
        read(cache, store, objects, name)
    assert [gets(store, objects, name) for name in "abcd"] == [1, 1, 1, 1]
    read(cache, store, objects, "b")
    assert gets(store, objects, "b") == 2


def test_an_open_object_survives_its_eviction(store: ObjectStore, objects: str, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 100)
    with cache.open(open_folder(objects, store.endpoint_url), "a", 100) as file:
        read(cache, store, objects, "b")
        assert len(list(tmp_path.glob("*.object"))) == 1
        assert os.pread(file.fileno(), 100, 0) == b"a" * 100


def test_a_fetch_that_died_is_cleared_away(store: ObjectStore, objects: str, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 100)
    dead = tmp_path / ("0" * 40 + ".part")
    dead.write_bytes(b"x" * 100)
    assert read(cache, store, objects, "a") == b"a" * 100
    assert not dead.exists()


def test_a_failed_fetch_leaves_nothing_and_the_next_succeeds(
    store: ObjectStore, objects: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, folder = ShardCache(str(tmp_path), 1000), open_folder(objects, store.endpoint_url)

    def broken(name: str, *rest: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "download", broken)
        with pytest.raises(
            DataError, match=r"No space left on device; free space, lower data.cache_gb or set data\.cache_dir"
        ):
            cache.open(folder, "a", 100)
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.object"))
    assert read(cache, store, objects, "a") == b"a" * 100


def test_a_fetch_under_way_in_another_process_is_left_alone(store: ObjectStore, objects: str, tmp_path: Path) -> None:
    cache, folder = ShardCache(str(tmp_path), 1000), open_folder(objects, store.endpoint_url)
    read(cache, store, objects, "a")
    partial = tmp_path / ("7" * 40 + ".part")
    partial.write_bytes(b"x" * 100)
    with cache._lock(cache._lock_of(partial)):  # as its fetcher holds it
        read(cache, store, objects, "b")
        assert partial.exists()
        assert cache._evict(250)
        assert partial.exists(), "it counts, but only finished files leave"
    with cache.open(folder, "c", 100):
        assert not partial.exists(), "without a holder it is abandoned"
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".object"}


def test_a_dead_fetch_under_the_lock_of_the_next_one_does_not_keep_it_waiting(
    store: ObjectStore, objects: str, tmp_path: Path
) -> None:
    cache = ShardCache(str(tmp_path), 100)
    lock = cache.path(Object(open_folder(objects, store.endpoint_url), "a", 100)).name[:8]
    dead = tmp_path / f"{lock}{'0' * 32}.part"
    dead.write_bytes(b"x" * 100)
    pool = ThreadPoolExecutor(1)
    try:
        assert pool.submit(read, cache, store, objects, "a").result(timeout=20) == b"a" * 100
    finally:
        dead.unlink(missing_ok=True)  # what still waits ends
        pool.shutdown()


def test_a_spent_budget_is_not_spent_again_by_those_who_waited(
    store: ObjectStore, objects: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tries = open_folder(objects, store.endpoint_url), []

    def in_vain(name: str, *rest: object) -> int:
        tries.append(name)
        time.sleep(0.5)
        raise BudgetSpentError(f"{name} gave up")

    def fetch(number: int) -> str:
        with pytest.raises(DataError) as error:
            ShardCache(str(tmp_path), 1000).open(folder, "a", 100)
        return str(error.value)

    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(folder, "download", in_vain)
        assert list(pool.map(fetch, range(4))) == ["a gave up"] * 4
        assert tries == ["a"]
        assert fetch(0) == "a gave up"
        assert tries == ["a", "a"], "who comes later tries for itself"
    assert read(ShardCache(str(tmp_path), 1000), store, objects, "a") == b"a" * 100
    assert not list(tmp_path.glob("*.failed"))


def test_wrong_sizes_are_refused(store: ObjectStore, objects: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/a: 100 bytes where the manifest says 90"):
        read(ShardCache(str(tmp_path), 1000), store, objects, "a", size=90)
    with pytest.raises(DataError, match=r"100 bytes exceed the shard cache of 99 bytes; raise data\.cache_gb"):
        read(ShardCache(str(tmp_path), 99), store, objects, "a")
    assert not list(tmp_path.glob("*.object"))


def test_fetching_ahead_makes_room_only_by_what_is_wanted_less(
    store: ObjectStore, objects: str, tmp_path: Path
) -> None:
    cache, folder = ShardCache(str(tmp_path), 300), open_folder(objects, store.endpoint_url)
    a, b, c, d = (Object(folder, name, 100) for name in "abcd")
    assert all(cache.fetch(item, wanted_ns, spare_ns=0) for item, wanted_ns in ((a, 3000), (b, 1000), (c, 2000)))
    assert not cache.fetch(d, wanted_ns=1500, spare_ns=999)
    assert gets(store, objects, "d") == 0
    assert cache.files() == {cache.path(item).name for item in (a, b, c)}
    assert cache.fetch(d, wanted_ns=1500, spare_ns=1000)
    assert cache.fetch(d, wanted_ns=1500, spare_ns=0), "it lies there"
    assert cache.files() == {cache.path(item).name for item in (a, c, d)}
    stamp(cache.path(a), 0)
    read(cache, store, objects, "b")  # who waits for an object takes the room of the least wanted
    assert cache.files() == {cache.path(item).name for item in (b, c, d)}


def test_local_files_pass_straight_through(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"local")
    cache = ShardCache(str(tmp_path / "cache"), 0)
    with cache.open(open_folder(str(tmp_path)), "x", 5) as file:
        assert Path(file.name) == tmp_path / "x"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="x: 5 bytes where the manifest says 6; copy the shard again"):
        cache.open(open_folder(str(tmp_path)), "x", 6)
