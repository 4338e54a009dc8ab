"""The test tool itself: results by rank, the first failing rank's traceback, dead and hanging ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailedError, run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("planted")
    dist.barrier()


def _die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _sleep_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_come_back_by_rank_and_processes_are_reused_at_any_world_size() -> None:
    assert run_ranks(_sum_of_ranks, 2, 1) == [(0, 3), (1, 3)]
    assert run_ranks(_sum_of_ranks, 3, 0) == [(0, 3), (1, 3), (2, 3)]
    assert run_ranks(_sum_of_ranks, 1, 5) == [(0, 5)]


def test_the_failing_ranks_traceback_is_raised_and_the_next_call_works() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 of 2.*planted"):
        run_ranks(_fail_on_rank_one, 2)
    assert run_ranks(_sum_of_ranks, 2, 0) == [(0, 1), (1, 1)]


def test_a_dead_rank_and_a_hanging_rank_end_the_call() -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2:\nthe process died with exit code 7"):
        run_ranks(_die_on_rank_one, 2)
    assert run_ranks(_sum_of_ranks, 2, 0) == [(0, 1), (1, 1)]  # new ranks, started outside the short timeout below
    with pytest.raises(TimeoutError, match=r"ranks \[1\]"):
        run_ranks(_sleep_on_rank_one, 2, timeout=5)
