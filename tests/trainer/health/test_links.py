"""Ranks measured against each other: real gloo ranks, a clock that is wrong, a rank that does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.engines.distributed import World
from trainer.health.links import LinkError, Links, Measured, edge_colour, ring_of

SIZES = (1 << 16, 1 << 20)


def _links(timeout_s: float = 20.0) -> Links:
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    return Links(world, ["here"] * world.world_size, list(range(world.world_size)), timeout_s)


def _ahead(seconds: float, rank: int) -> float:
    return time.time() + seconds * (dist.get_rank() == rank)


def _measure(skew_s: float, budget_s: float) -> Measured:
    links = _links()
    clock: Callable[[], float] = partial(_ahead, skew_s, 2)
    measured = links.measure(SIZES, budget_s, clock)
    dist.barrier()
    links.close()
    return measured


def test_three_ranks_agree_on_times_links_and_whose_clock_is_ahead() -> None:
    first, *others = run_ranks(_measure, 3, 7.5, 60.0)
    assert others == [first, first]
    assert set(first.seconds) == set(SIZES) and all(0 < seconds < 20 for seconds in first.seconds.values())
    assert abs(first.offsets_s[2] - 7.5) < 0.5 and max(map(abs, first.offsets_s[:2])) < 0.5
    assert all(speed > 0 for row in first.speeds for speed in row)  # in a ring of three each has two links


def test_a_large_all_reduce_is_left_out_where_time_is_short() -> None:
    (first, second) = run_ranks(_measure, 2, 0.0, 0.0)
    assert set(first.seconds) == set(second.seconds) == {SIZES[0]}


def _one_is_silent() -> str:
    links = _links(timeout_s=1.0)
    began = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(3)
        return ""
    with pytest.raises(LinkError) as error:
        links.measure(SIZES, 60.0)
    assert time.monotonic() - began < 10
    time.sleep(2)
    return str(error.value)


def test_a_rank_that_does_not_answer_costs_the_time_out_and_no_more() -> None:
    assert "a word to all ranks" in run_ranks(_one_is_silent, 2)[0]


def test_a_ring_compares_like_with_like() -> None:
    assert ring_of(1, ["a", "a", "a"], [0, 1, 2]) == [0, 1, 2]
    assert ring_of(1, ["a", "a", "b", "b"], [0, 1, 0, 1]) == [1, 3]
    assert ring_of(2, ["a", "a", "b", "b", "c"], [0, 1, 0, 1, 0]) == [0, 2, 4]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
def test_every_link_of_a_ring_is_used_once_and_no_rank_serves_two_at_a_time(length: int) -> None:
    colours = [edge_colour(edge, length) for edge in range(length)]
    used = [edge for edge, colour in enumerate(colours) if colour >= 0]
    assert len(used) == {1: 0, 2: 1}.get(length, length)
    for edge in used:
        following = (edge + 1) % length
        assert following not in used or length == 1 or colours[edge] != colours[following] or following == edge
