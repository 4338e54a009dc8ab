"""Reading through broken connections, and stand-ins for samples that cannot be decoded."""

import io
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.batch import Batch
from data.loader import Loader
from data.manifest import read_manifest
from data.order import Order
from data.retry import Budget, longest_silence_s
from data.s3 import BudgetSpentError, DataError, open_folder
from tests.data.conftest import ObjectStore
from tests.data.fault_proxy import Fault, FaultProxy
from tests.data.sets import noise_shards, write_set

BUDGET_S = 2.0
BODY = os.urandom(3_000_000)
FOREVER = 10**9


@pytest.fixture(scope="module")
def proxy(store: ObjectStore) -> Iterator[FaultProxy]:
    store.client.create_bucket(Bucket="faulty")
    store.client.put_object(Bucket="faulty", Key="set/x.tar", Body=BODY)
    with FaultProxy(int(store.endpoint_url.rsplit(":", 1)[1])) as proxy:
        open_folder("s3://faulty/set", proxy.endpoint_url, BUDGET_S).sizes()
        yield proxy
        proxy.inject(None)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", after=700_000, times=3),
        Fault("truncate", after=1_000_000, times=2),
        Fault("stall", after=5000),
        Fault("drip", after=5000, seconds=0.02),
        Fault("delay", seconds=1.0),
        Fault("refuse", times=2),
        Fault("answer", status=503, code="SlowDown", times=2),
        Fault("answer", status=500, code="InternalError", times=2),
        Fault("answer", status=400, code="RequestTimeout", times=2),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_what_passes_is_survived_byte_by_byte(proxy: FaultProxy, fault: Fault) -> None:
    proxy.inject(fault)
    target = io.BytesIO()
    assert open_folder("s3://faulty/set", proxy.endpoint_url, BUDGET_S).download("x.tar", target) == len(BODY)
    assert target.getvalue() == BODY
    assert fault.times == 0, "the fault never happened"


def test_a_broken_body_goes_on_where_it_stopped(proxy: FaultProxy, store: ObjectStore) -> None:
    ranges: list[str] = []
    folder = open_folder("s3://faulty/set", proxy.endpoint_url, BUDGET_S)

    def seen(params: dict[str, str], **context: object) -> None:
        ranges.append(params.get("Range", ""))
        assert params.get("IfMatch") or len(ranges) == 1, "what goes on must be the same object"

    events = folder._client.meta.events  # type: ignore[attr-defined]
    events.register("provide-client-params.s3.GetObject", seen)
    try:
        proxy.inject(Fault("truncate", after=2_000_000, times=1))
        assert folder.read("x.tar", 0, 2_500_000) == BODY[:2_500_000]
    finally:
        events.unregister("provide-client-params.s3.GetObject", seen)
    assert len(ranges) == 2
    first, last = ranges[1].removeprefix("bytes=").split("-")
    assert 1_990_000 < int(first) <= 2_000_000
    assert last == "2499999"


@pytest.mark.parametrize("fault", [Fault("stall", after=5000, times=FOREVER), Fault("answer", times=FOREVER)])
def test_a_spent_budget_names_url_attempts_and_time(proxy: FaultProxy, fault: Fault) -> None:
    proxy.inject(fault)
    began = time.monotonic()
    with pytest.raises(
        BudgetSpentError, match=r"s3://faulty/set/x.tar at http.*gave up after \d+ failed .*of data.read"
    ):
        open_folder("s3://faulty/set", proxy.endpoint_url, BUDGET_S).read("x.tar")
    assert 1.0 < time.monotonic() - began < BUDGET_S + 1


def test_an_object_replaced_midway_is_refused(proxy: FaultProxy, store: ObjectStore) -> None:
    def replace() -> None:
        store.client.put_object(Bucket="faulty", Key="set/y.tar", Body=bytes(len(BODY)))

    store.client.put_object(Bucket="faulty", Key="set/y.tar", Body=BODY)
    proxy.inject(Fault("reset", after=1_000_000, match="y.tar", action=replace))
    with pytest.raises(DataError, match=r"y\.tar: changed .*ETag .*expected .*restore the object"):
        open_folder("s3://faulty/set", proxy.endpoint_url, BUDGET_S).read("y.tar")


def test_a_healthy_transfer_costs_no_budget_however_long() -> None:
    budget = Budget(BUDGET_S)
    for _ in range(1000):
        budget.received(1 << 20, 1.0)
    assert budget.lost_s == 0
    with pytest.raises(TimeoutError, match="more slowly than"):
        budget.received(1, longest_silence_s(BUDGET_S) + 0.01)


def bad_set(folder: Path) -> Path:
    """Shard 0: samples 2, 3 and 7 (the last) cannot be decoded; shard 1 is whole."""
    shards = noise_shards(2, 8)
    shards[0]["0-2.png"] = b"no image"
    del shards[0]["0-3.txt"]
    shards[0]["0-7.png"] = shards[0]["0-7.png"][:100]
    return write_set(folder, shards)


def batches(folder: Path, start_step: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0) -> list[Batch]:
    manifest = read_manifest(str(folder))
    order = Order(manifest, seed=3, global_batch_size=4)
    options = {"steps": 8, "start_step": start_step, "rank": rank, "world_size": world_size, "workers": workers}
    return list(Loader(order, manifest, **options))  # type: ignore[arg-type]


def test_the_next_decodable_sample_of_the_shard_stands_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = bad_set(tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        found = batches(folder)[:4]  # an epoch
    replaced = {bad.key: bad for batch in found for bad in batch.replaced}
    assert {key: bad.stand_in for key, bad in replaced.items()} == {"0-2": "0-4", "0-3": "0-4", "0-7": "0-0"}
    keys = sorted(key for batch in found for key in batch.keys)
    bad, whole = {"0-2", "0-3", "0-7"}, {f"{shard}-{n}" for shard in range(2) for n in range(8)}
    assert keys == sorted([*(whole - bad), "0-4", "0-4", "0-0"])
    tar = (folder / "noise-0.tar").read_bytes()
    assert tar[replaced["0-2"].offset :].startswith(b"no image")
    for batch in found:
        for each in batch.replaced:
            assert batch.keys[batch.rows.tolist().index(each.row)] == each.stand_in
            assert f"{folder}/noise-0.tar, sample {each.key}" in caplog.text
            assert f"step {batch.step}, row {each.row}, byte {each.offset} of the shard" in caplog.text
    assert len(caplog.records) >= 3


def test_stand_ins_are_the_same_on_resume_on_any_ranks_and_from_workers(tmp_path: Path) -> None:
    folder = bad_set(tmp_path / "set")
    whole = batches(folder)
    for other in (batches(folder, start_step=5), batches(folder, start_step=5, workers=1)):
        for a, b in zip(whole[5:], other, strict=True):
            assert torch.equal(a.pixels, b.pixels)
            assert a.replaced == b.replaced
    for step, parts in enumerate(zip(*(batches(folder, rank=rank, world_size=2) for rank in range(2)), strict=True)):
        assert torch.equal(torch.cat([part.pixels for part in parts]), whole[step].pixels)
        assert sum((part.replaced for part in parts), ()) == whole[step].replaced


def test_a_shard_without_any_decodable_sample_is_an_error(tmp_path: Path) -> None:
    shards = noise_shards(1, 4)
    shards[0] |= {f"0-{number}.png": b"no image" for number in range(4)}
    folder = write_set(tmp_path / "set", shards)
    with pytest.raises(
        DataError, match=r"none of the 4 samples of .*noise-0\.tar can be decoded; the first tried: .*0-\d"
    ):
        batches(folder)
    shutil.rmtree(folder)
