import numpy as np
import pytest

from data.order import Order
from data.reach import Reach, reach
from tests.data.memory import memory_set

G = 16


def of(
    samples: list[int], rows: range, cache_bytes: int, lanes: int | None = None, steps: int = 10**9, buckets: int = 1
) -> Reach:
    manifest, _ = memory_set(samples, buckets=buckets)
    order = Order(manifest, seed=1, global_batch_size=G, lanes=lanes)
    return reach(order, manifest, {"memory://set"}, rows, range(steps), cache_bytes)


def test_a_node_is_said_to_use_its_part_of_the_epoch() -> None:
    whole = of([64] * 8, range(G), 10**9, lanes=8)
    assert whole.touched == whole.fetched == 8 * (64 * 100 + 10)
    assert whole.used == pytest.approx(whole.touched, abs=8)
    assert (whole.shards, whole.side_by_side) == (8, whole.touched)
    assert not whole.ranged
    half = of([64] * 8, range(8), 10**9, lanes=8)
    assert half.used == pytest.approx(whole.used / 2, abs=8)
    assert half.shards == 4


def test_members_are_read_by_ranges_where_the_shards_side_by_side_do_not_fit() -> None:
    shard = 64 * 100 + 10
    assert of([64] * 40, range(G), 10 * shard, lanes=8).ranged is False  # one on its way, and one to spare
    assert of([64] * 40, range(G), 8 * shard, lanes=8).ranged is True
    assert of([64] * 8, range(G), 8 * shard, lanes=8).ranged is False, "all of the set fits"
    assert of([64] * 40, range(G), 10 * shard, lanes=8, buckets=5).ranged is True


def test_members_are_read_by_ranges_where_nodes_would_fetch_the_same_shards() -> None:
    """Four lanes of four rows: a node of one row would fetch four times what it uses."""
    alone, shared = (of([64] * 40, rows, 10**9, lanes=4) for rows in (range(4, 8), range(4, 5)))
    assert (alone.ranged, shared.ranged) == (False, True)
    assert shared.fetched > 3.9 * shared.used


def test_shards_that_two_lanes_cut_are_counted_twice_unless_the_cache_can_keep_them() -> None:
    samples, shard = [60] * 44, 60 * 100 + 10  # lanes of 5.5 shards
    kept = of(samples, range(G), 13 * shard, lanes=8)
    assert kept.kept and kept.fetched == kept.touched == 44 * shard
    lost = of(samples, range(G), 12 * shard, lanes=8)
    assert not lost.kept and lost.fetched == lost.touched + 4 * shard


def test_a_few_steps_of_a_large_set_are_read_by_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of([64] * 40, range(G), 10**9, steps=2).ranged is False, "a small set is worth no requests"
    monkeypatch.setattr("data.reach._SMALL", 1000)
    few = of([64] * 40, range(G), 10**9, steps=2)
    assert few.ranged
    assert few.used <= 10 * G * 100 < few.touched


def test_local_folders_count_nothing() -> None:
    manifest, _ = memory_set([64] * 8)
    order = Order(manifest, seed=1, global_batch_size=G)
    found = reach(order, manifest, set(), range(G), range(100), 0)
    assert (found.touched, found.side_by_side, found.shards, found.ranged) == (0, 0, 0, False)


def test_the_plan_is_said_in_gigabytes() -> None:
    text = str(of([10**6] * 40, range(8), 10**9, lanes=8))
    assert "rows 0 to 7 use 2 GB of " in text and "4 shards side by side of at most 0.4 GB" in text
    assert "shard cache 1 GB: whole shards, " in text
    assert np.isfinite(float(text.split("whole shards, ")[1].split(" GB")[0]))
