import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.demo import CAPTIONS, digits
from data.index import Index
from data.loader import Loader
from data.manifest import Manifest, Shard, read_manifest
from data.order import Order
from data.s3 import DataError
from tests.data.conftest import ObjectStore

G = 120


@pytest.fixture(scope="module")
def manifest(digits_folder: Path) -> Manifest:
    return read_manifest(str(digits_folder / "train"))


@pytest.fixture(scope="module")
def order(manifest: Manifest) -> Order:
    return Order(manifest, seed=1, global_batch_size=G)


def same(a: Batch, b: Batch) -> bool:
    texts = ("step", "bucket", "captions", "keys", "shards", "own_epochs")
    tensors = ("pixels", "rows")
    return all(getattr(a, n) == getattr(b, n) for n in texts) and all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in tensors
    )


def test_batches_hold_the_digits_that_the_order_names(order: Order, manifest: Manifest) -> None:
    train_x, train_y, _, _ = digits()
    known = {pixels.round(3).tobytes(): label for pixels, label in zip(train_x, train_y, strict=True)}
    batches = list(Loader(order, manifest, steps=order.steps_through(0)))
    assert len(batches) == 1257 // G
    for batch in batches:
        assert batch.pixels.shape == (G, 1, 8, 8)
        assert batch.pixels.dtype == torch.float32
        assert batch.bucket == (8, 8)
        assert batch.rows.tolist() == list(range(G))
        exact = (np.rint((batch.pixels.numpy() + 1) * 8) / 8 - 1).astype(np.float32)
        for pixels, caption in zip(exact, batch.captions, strict=True):
            assert caption == CAPTIONS[known[pixels.round(3).tobytes()]]
    seen = Counter(key for batch in batches for key in batch.keys)
    assert len(seen) == len(batches) * G, "a key came twice in its own epoch"


def test_keys_follow_the_order(order: Order, manifest: Manifest, digits_folder: Path) -> None:
    (batch,) = Loader(order, manifest, start_step=17, steps=18)
    references = order.step(17)
    assert batch.shards == tuple(manifest.shards[n].name for n in references.shard.tolist())
    assert batch.own_epochs == tuple(references.own_epoch.tolist())
    assert set(batch.own_epochs) == {1}


@pytest.mark.parametrize("prefetch", [2, 24])  # one and three steps to a hand-over
def test_resumed_and_worker_fed_loaders_give_the_same_batches(order: Order, manifest: Manifest, prefetch: int) -> None:
    whole = list(Loader(order, manifest, steps=14))
    resumed = list(Loader(order, manifest, start_step=9, steps=14))
    assert all(same(a, b) for a, b in zip(whole[9:], resumed, strict=True))
    fed = list(Loader(order, manifest, start_step=9, steps=14, workers=2, prefetch=prefetch))
    assert all(same(a, b) for a, b in zip(resumed, fed, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_hold_contiguous_parts_of_the_global_batch(order: Order, manifest: Manifest, world_size: int) -> None:
    (whole,) = Loader(order, manifest, start_step=3, steps=4)
    parts = [
        next(iter(Loader(order, manifest, start_step=3, steps=4, rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
    assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)
    assert sum((part.keys for part in parts), ()) == whole.keys


def test_batches_from_s3_equal_those_from_disk(
    order: Order, manifest: Manifest, store: ObjectStore, digits_on_s3: str, tmp_path: Path
) -> None:
    remote = read_manifest(digits_on_s3, store.endpoint_url)
    places: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "endpoint_url": store.endpoint_url}
    store.gets.clear()
    loader = Loader(Order(remote, seed=1, global_batch_size=G), remote, steps=3, **places)
    assert all(same(a, b) for a, b in zip(loader, Loader(order, manifest, steps=3), strict=True))
    assert all(count == 1 for path, count in store.gets.items() if path.endswith((".tar", ".idx")))


@pytest.fixture
def todays_credentials(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader processes with this process's environment: their server may have started before the store."""
    monkeypatch.setattr("data.loader.worker_context", lambda: multiprocessing.get_context("spawn"))


@pytest.mark.slow
@pytest.mark.usefixtures("todays_credentials")
def test_look_ahead_brings_every_shard_of_a_node_once_and_ends_with_the_iteration(
    order: Order, manifest: Manifest, store: ObjectStore, digits_on_s3: str, tmp_path: Path
) -> None:
    remote = read_manifest(digits_on_s3, store.endpoint_url)
    remote_order = Order(remote, seed=1, global_batch_size=G)
    store.gets.clear()
    places: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "endpoint_url": store.endpoint_url}
    ranks = [
        Loader(remote_order, remote, steps=14, rank=rank, world_size=2, local_world_size=2, workers=1, **places)
        for rank in range(2)
    ]
    before = set(multiprocessing.active_children())
    batches = [iter(loader) for loader in ranks]
    companions = [p for p in multiprocessing.active_children() if p not in before]
    assert len(companions) == 3, "a loader process for each rank, and one look-ahead for the node"
    for step, parts in enumerate(zip(*batches, strict=True)):
        assert sum((part.keys for part in parts), ()) == tuple(keys_of(order, manifest, step))
    assert all(count == 1 for path, count in store.gets.items() if path.endswith((".tar", ".idx")))
    assert sum(path.endswith(".tar") for path in store.gets) == 10
    assert not [process for process in companions if process.is_alive()]


def keys_of(order: Order, manifest: Manifest, step: int) -> tuple[str, ...]:
    (batch,) = Loader(order, manifest, start_step=step, steps=step + 1)
    return batch.keys


@pytest.mark.slow
@pytest.mark.usefixtures("todays_credentials")
def test_a_run_goes_on_without_its_look_ahead(
    store: ObjectStore, digits_on_s3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = read_manifest(digits_on_s3, store.endpoint_url)
    remote_order = Order(remote, seed=1, global_batch_size=G)
    before = set(multiprocessing.active_children())
    loader = Loader(
        remote_order, remote, steps=8, workers=1, cache_dir=str(tmp_path), endpoint_url=store.endpoint_url, prefetch=1
    )
    look_ahead: list[Any] = []
    starting = loader._look_ahead
    loader._look_ahead = lambda context: look_ahead.append(starting(context)) or look_ahead[0]  # type: ignore[method-assign,func-returns-value]
    batches = iter(loader)
    look_ahead[0]._process.kill()
    look_ahead[0]._process.join()
    with caplog.at_level("WARNING"):
        assert len(list(batches)) == 8
    assert "the look-ahead process died; shards are fetched when they are needed" in caplog.text
    assert set(multiprocessing.active_children()) <= before


def test_raw_rows_are_what_was_made_of_them_with_their_keys(order: Order, manifest: Manifest) -> None:
    (batch,) = Loader(order, manifest, start_step=3, steps=4)
    for workers in (0, 1):
        (raw,) = Loader(order, manifest, start_step=3, steps=4, workers=workers).raw(read_text)
        assert (raw.step, list(raw.rows), raw.keys) == (3, list(range(G)), batch.keys)
        assert raw.made == batch.captions


def read_text(file: int, shard: Shard, index: Index, sample: int) -> str:
    offset, size = index.members(sample)["txt"][0:2]
    return os.pread(file, size, offset).decode()


def test_prefetched_batches_are_bounded_in_bytes(order: Order, manifest: Manifest) -> None:
    batch = G * 8 * 8 * 4
    for gigabytes, expected in ((1.0, 7), (3.5 * 2 * batch / 1e9, 3), (2.01 * batch / 1e9, 1)):
        assert Loader(order, manifest, steps=1, workers=2, prefetch=7, prefetch_gb=gigabytes).prefetch == expected
    with pytest.raises(ValueError, match=r"2 loader processes with a batch of .* exceed\s+data\.prefetch_gb=.*lower"):
        Loader(order, manifest, steps=1, workers=2, prefetch_gb=1.9 * batch / 1e9)


def copy(manifest_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(manifest_folder / "train", tmp_path / "set"))


def test_missing_and_cut_shards_are_refused_at_construction(digits_folder: Path, tmp_path: Path) -> None:
    folder = copy(digits_folder, tmp_path)
    manifest = read_manifest(str(folder))
    order = Order(manifest, seed=0, global_batch_size=8)
    os.truncate(folder / "digits-000002.tar", 1000)
    with pytest.raises(DataError, match=r"digits-000002\.tar: 1000 bytes where the manifest says \d+ .*copy it again"):
        Loader(order, manifest, steps=1)
    (folder / "digits-000004.tar").unlink()
    (folder / "digits-000005.idx").unlink()
    with pytest.raises(DataError, match=r"digits-000004\.tar: missing, with 1 more of 20 files"):
        Loader(order, manifest, steps=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_reading_names_rank_step_shard_and_key(
    digits_folder: Path, tmp_path: Path, workers: int
) -> None:
    folder = copy(digits_folder, tmp_path)
    manifest = read_manifest(str(folder))
    shard = folder / "digits-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    loader = Loader(Order(manifest, seed=0, global_batch_size=G), manifest, steps=10, workers=workers)
    with pytest.raises(DataError) as error:
        list(loader)
    assert re.match(r"rank 0, step \d: ", str(error.value))
    assert f"{shard}, sample " in str(error.value)
    assert "Traceback" not in str(error.value)


def test_impossible_cuts_are_refused(order: Order, manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"rank 0 of 7 cannot take an equal part of train.global_batch_size=120"):
        Loader(order, manifest, steps=1, world_size=7)
    with pytest.raises(ValueError, match="from another manifest"):
        Loader(order, Manifest(manifest.shards[:5], 1), steps=1)


@pytest.mark.slow
def test_a_loader_process_that_dies_names_step_and_shard(digits_folder: Path, tmp_path: Path) -> None:
    script = """
import multiprocessing, os, signal, subprocess, sys
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
if __name__ == "__main__":
    manifest = read_manifest(sys.argv[1])
    loader = Loader(Order(manifest, seed=0, global_batch_size=120), manifest, steps=4, workers=1)
    batches = iter(loader)
    # A signal to the group is for the rank alone.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
        subprocess.run(["kill", f"-{number.name}", "--", f"-{os.getpgrp()}"], check=True)
    next(batches)
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    print(worker.pid, flush=True)
    for batch in batches:
        pass
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(path), str(digits_folder / "train")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert "DataError: rank 0: a loader process died while step" in last
    assert f"process {done.stdout.strip()} at step" in last
    assert "/digits-0000" in last


@pytest.mark.slow
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise KeyError"])
def test_loader_processes_end_with_a_rank_that_is_killed_or_fails(
    digits_folder: Path, tmp_path: Path, end: str
) -> None:
    script = f"""
import multiprocessing, os, signal, sys
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
if __name__ == "__main__":
    manifest = read_manifest(sys.argv[1])
    batches = iter(Loader(Order(manifest, seed=0, global_batch_size=120), manifest, steps=1000, workers=1))
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    {end}
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    arguments = [sys.executable, str(path), str(digits_folder / "train")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        worker = int(rank.stdout.readline())
        assert rank.wait(timeout=60) != 0
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")
