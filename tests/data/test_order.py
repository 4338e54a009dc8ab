import pickle
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Order, Stream


@dataclass(frozen=True)
class Shards:
    """Streams given as (weight, samples of each shard)."""

    content: tuple[tuple[Fraction, tuple[int, ...]], ...]
    digest: str = "digest"

    def streams(self) -> tuple[Stream, ...]:
        made, first = [], 0
        for number, (weight, samples) in enumerate(self.content):
            shards = np.arange(first, first + len(samples))
            made.append(Stream("set", (8, number + 1), weight, shards, np.array(samples)))
            first += len(samples)
        return tuple(made)


def shards(*content: tuple[object, tuple[int, ...]]) -> Shards:
    return Shards(tuple((Fraction(weight), samples) for weight, samples in content))  # type: ignore[arg-type]


weights = st.fractions(min_value=Fraction(1, 4), max_value=3, max_denominator=7)
contents = st.lists(
    st.tuples(weights, st.lists(st.integers(1, 15), min_size=1, max_size=5).map(tuple)), min_size=1, max_size=3
).map(lambda content: Shards(tuple(content)))


@st.composite
def orders(draw: st.DrawFn) -> Order:
    manifest = draw(contents)
    size = draw(st.integers(2, 12) if draw(st.integers(0, 9)) else st.just(1))
    lanes = draw(st.sampled_from([None, *(n for n in range(1, size + 1) if size % n == 0)]))
    seed = draw(st.integers(-(2**70), 2**70))
    return Order(manifest, seed=seed, global_batch_size=size, lanes=lanes, small_buckets="repeat")


@settings(max_examples=40, deadline=None)
@given(order=orders(), epoch=st.integers(0, 2), data=st.data())
def test_visits_name_every_shard_that_rows_read_and_when(order: Order, epoch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.global_batch_size - 1))
    rows = range(start, data.draw(st.integers(start + 1, order.global_batch_size)))
    visits = order.visits(epoch, rows)
    entries = list(zip(visits.shard.tolist(), visits.first.tolist(), visits.last.tolist(), strict=True))
    read = [
        (shard, step)
        for step in range(order.steps_through(epoch - 1), order.steps_through(epoch))
        for shard in order.step(step, rows).shard.tolist()
    ]
    assert {shard for shard, _ in read} <= {shard for shard, _, _ in entries}
    assert all(any(s == shard and first <= step <= last for s, first, last in entries) for shard, step in read)
    assert (np.diff(visits.first) >= 0).all()
    samples = {int(n): int(c) for s in order.streams for n, c in zip(s.shards, s.samples, strict=True)}
    used = sum(samples[s] * share for s, share in zip(visits.shard.tolist(), visits.share.tolist(), strict=True))
    assert used == pytest.approx(len(read))
    if rows == range(order.global_batch_size):
        assert {shard for shard, _ in read} == {shard for shard, _, _ in entries}


def pairs(order: Order, steps: range) -> list[tuple[int, int, int]]:
    found = []
    for step in steps:
        r = order.step(step)
        found += list(zip(r.own_epoch.tolist(), r.shard.tolist(), r.index.tolist(), strict=True))
    return found


@settings(max_examples=40, deadline=None)
@given(order=orders(), epochs=st.integers(1, 3))
def test_every_epoch_ends_with_exactly_the_stated_prefix_of_each_stream(order: Order, epochs: int) -> None:
    size = order.global_batch_size
    seen: list[tuple[int, int, int]] = []
    for epoch in range(epochs):
        seen += pairs(order, range(order.steps_through(epoch - 1), order.steps_through(epoch)))
        assert len(set(seen)) == len(seen), "an (own epoch, sample) came twice"
        for stream in order.streams:
            mine = [pair for pair in seen if pair[1] in set(stream.shards.tolist())]
            # Independent count: the whole own epochs of the prefix hold every sample once, the last one a part.
            prefix = int((epoch + 1) * stream.per_epoch / size) * size
            by_own_epoch = Counter(own for own, _, _ in mine)
            complete, rest = divmod(prefix, stream.total)
            expected = dict.fromkeys(range(complete), stream.total) | ({complete: rest} if rest else {})
            assert by_own_epoch == expected
            samples = dict(zip(stream.shards.tolist(), stream.samples.tolist(), strict=True))
            assert all(0 <= index < samples[shard] for _, shard, index in mine)


@settings(max_examples=40, deadline=None)
@given(order=orders())
def test_lanes_change_the_order_within_an_epoch_but_not_its_samples(order: Order) -> None:
    """With one lane a stream is read position by position, so its samples are the first of the permutation."""
    sequential = Order(
        Shards(tuple((s.weight, tuple(s.samples.tolist())) for s in order.streams)),
        seed=order.seed,
        global_batch_size=order.global_batch_size,
        lanes=1,
        small_buckets="repeat",
    )
    steps = range(order.steps_through(0))
    mine, theirs = pairs(order, steps), pairs(sequential, steps)
    assert [s.name for s in order.streams] == [s.name for s in sequential.streams]
    assert set(mine) == set(theirs)


@settings(max_examples=40, deadline=None)
@given(order=orders(), step=st.integers(0, 10**9))
def test_any_step_is_found_directly_and_in_a_fresh_process(order: Order, step: int) -> None:
    fresh = pickle.loads(pickle.dumps(order))
    here, there = order.step(step), fresh.step(step)
    assert all(np.array_equal(getattr(here, name), getattr(there, name)) for name in ("own_epoch", "shard", "index"))
    assert order.stream(step).name == fresh.stream(step).name
    assert set(here.shard.tolist()) <= set(order.stream(step).shards.tolist())
    epoch = order.epoch(step)
    assert order.steps_through(epoch - 1) <= step < order.steps_through(epoch)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 1000])
def test_rows_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    order = Order(shards((1, (4000, 3100, 900)), ("5/3", (6400,))), seed=3, global_batch_size=3000)
    rows = 3000 // ranks
    for step in (0, 1, 7, 1000):
        whole = order.step(step)
        parts = [order.step(step, range(r * rows, (r + 1) * rows)) for r in range(ranks)]
        for name in ("own_epoch", "shard", "index"):
            assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


def test_weights_hold_exactly_over_epochs() -> None:
    order = Order(shards(("1/3", (60,)), (2, (30,)), (1, (90, 10))), seed=0, global_batch_size=4)
    drawn = Counter(order.stream(step).name for step in range(order.steps_through(29)))
    # 30 epochs of 60/3, 30*2 and 100 samples in batches of 4
    assert drawn == {"set/8x1": 30 * 20 // 4, "set/8x2": 30 * 60 // 4, "set/8x3": 30 * 100 // 4}


def test_streams_are_spread_evenly_over_an_epoch() -> None:
    order = Order(shards((1, (4000,)), (3, (4000,))), seed=1, global_batch_size=4)
    names = [order.stream(step).name for step in range(order.steps_through(0))]
    for start in range(0, len(names), 400):
        assert abs(names[start : start + 400].count("set/8x1") - 100) <= 2
    # but not periodically
    gaps = np.diff(np.flatnonzero(np.array(names) == "set/8x1"))
    assert len(set(gaps.tolist())) > 3


def test_own_epochs_and_seeds_have_different_permutations() -> None:
    content = shards((1, (50, 50)))
    order = Order(content, seed=0, global_batch_size=10)
    epochs = [[p[1:] for p in pairs(order, range(10 * e, 10 * e + 10))] for e in (0, 1)]
    other = [p[1:] for p in pairs(Order(content, seed=1, global_batch_size=10), range(10))]
    assert epochs[0] != epochs[1] != other != epochs[0]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(other)


def test_a_source_that_joins_leaves_the_permutation_of_another_alone() -> None:
    alone = Order(shards((1, (50, 50))), seed=0, global_batch_size=10)
    joined = Order(shards((1, (50, 50)), (1, (40,))), seed=0, global_batch_size=10)
    mine = [p for p in pairs(joined, range(14)) if p[1] < 2]
    assert mine == pairs(alone, range(10))


def test_a_rank_reads_few_shards_with_few_lanes() -> None:
    content = shards((1, (100,) * 64))
    few = Order(content, seed=0, global_batch_size=64, lanes=2).step(5, range(32))
    many = Order(content, seed=0, global_batch_size=64).step(5, range(32))
    assert len(set(few.shard.tolist())) <= 2
    assert len(set(many.shard.tolist())) > 10


def test_default_lanes_are_the_largest_fitting_divisor() -> None:
    def lanes(shard_count: int, size: int) -> int:
        return Order(shards((1, (1000,) * shard_count)), seed=0, global_batch_size=size).lanes[0]

    assert [lanes(100, 1024), lanes(10, 128), lanes(3, 128), lanes(100, 97), lanes(1, 8)] == [64, 8, 2, 1, 1]


def test_small_streams_are_refused_by_name_or_treated_as_asked() -> None:
    content = shards((1, (50,)), ("1/10", (90,)))
    with pytest.raises(ValueError, match=r"set/8x2 has 90 samples and weight 1/10: fewer than .*=10"):
        Order(content, seed=0, global_batch_size=10)
    dropped = Order(content, seed=0, global_batch_size=10, small_buckets="drop")
    assert [s.name for s in dropped.streams] == ["set/8x1"]
    repeated = Order(content, seed=0, global_batch_size=10, small_buckets="repeat")
    assert repeated.steps_through(0) == 5 + 1
    with pytest.raises(ValueError, match="no stream has 1000 samples"):
        Order(content, seed=0, global_batch_size=1000, small_buckets="drop")
    with pytest.raises(ValueError, match="one of refuse, repeat, drop"):
        Order(content, seed=0, global_batch_size=10, small_buckets="merge")


def test_lanes_must_divide_the_global_batch() -> None:
    with pytest.raises(ValueError, match=r"data.lanes=3 does not divide train.global_batch_size=10"):
        Order(shards((1, (50,))), seed=0, global_batch_size=10, lanes=3)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Order(shards((1, (50,))), seed=0, global_batch_size=10).step(-1)


def test_identity_holds_what_fixes_the_order() -> None:
    content = shards((1, (50, 50)))
    order = Order(content, seed=5, global_batch_size=10)
    assert order.identity() == {
        "version": 1,
        "seed": 5,
        "global_batch_size": 10,
        "lanes": {"set/8x1": 2},
        "small_buckets": "refuse",
        "manifest": "digest",
    }


def test_rows_are_the_same_in_every_version() -> None:
    """Recorded once: an existing run must go on with the samples that it has not seen."""
    order = Order(shards((1, (40, 31, 9)), ("5/3", (64,))), seed=42, global_batch_size=8)
    assert order.stream(11).name == "set/8x1"
    assert pairs(order, range(11, 12)) == [
        (0, 1, 5),
        (0, 1, 0),
        (0, 1, 6),
        (0, 1, 15),
        (0, 0, 1),
        (0, 0, 39),
        (0, 0, 16),
        (0, 0, 7),
    ]


@settings(max_examples=60, deadline=None)
@given(orders(), st.lists(st.integers(0, 60), min_size=1, max_size=8), st.booleans())
def test_several_steps_are_each_of_them(order: Order, steps: list[int], part: bool) -> None:
    rows = range(order.global_batch_size // 2, order.global_batch_size) if part else None
    for step, found in zip(steps, order.several(steps, rows), strict=True):
        alone = order.step(step, rows)
        for column in ("own_epoch", "shard", "index"):
            assert getattr(found, column).tolist() == getattr(alone, column).tolist()
