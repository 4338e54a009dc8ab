from unittest import mock

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from tests.ranks import run_ranks
from trainer.observe.metrics import Clock, Tally


def pair(total: float, count: float) -> Tensor:
    return torch.tensor([total, count])


def test_means_are_over_counts_and_terms_per_step() -> None:
    tally = Tally("cpu")
    for _ in range(2):  # two steps of two micro-batches
        tally.add({"clamped": pair(3.0, 4.0)})
        tally.add({"clamped": pair(1.0, 12.0), "loss/adv": pair(5.0, 1.0)})
        tally.add_terms({"base": torch.tensor(0.5), "rect": torch.tensor(0.25)})
        tally.add_terms({"base": torch.tensor(1.5)})
        tally.add_scalars({"grad_norm": torch.tensor(2.5)})
        tally.add_value("wait", 3.0)
        tally.end_step()
    assert tally.reduce() == {
        "base": 2.0,
        "clamped": 0.25,
        "grad_norm": 2.5,
        "loss/adv": 5.0,
        "rect": 0.25,
        "wait": 3.0,
    }


def test_a_reduce_starts_anew_and_uncounted_names_are_absent() -> None:
    tally = Tally("cpu")
    tally.add({"a": pair(1.0, 1.0), "empty": pair(0.0, 0.0)})
    tally.end_step()
    assert tally.reduce() == {"a": 1.0}
    tally.add({"b": pair(2.0, 1.0)})
    tally.end_step()
    assert tally.reduce() == {"b": 2.0}
    assert tally.reduce() == {}


def test_adding_keeps_no_graph_and_does_not_change_what_was_given() -> None:
    given = torch.ones(2, requires_grad=True) * 2
    tally = Tally("cpu")
    tally.add({"a": given})
    tally.add({"a": given})
    assert not next(iter(tally._sums.values())).requires_grad
    assert given.tolist() == [2.0, 2.0]


def test_non_finite_values_are_reported_as_they_are() -> None:
    tally = Tally("cpu")
    tally.add({"a": pair(float("inf"), 2.0), "b": pair(1.0, 1.0)})
    assert tally.reduce() == {"a": float("inf"), "b": 1.0}


def _rank_with_its_own_names(rounds: int) -> tuple[list[dict[str, float]], list[int]]:
    rank, results, collectives, tally = dist.get_rank(), [], [], Tally("cpu")
    with (
        mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced,
        mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as gathered,
    ):
        for number in range(rounds):
            tally.add({"all": pair(1.0 + rank, 1.0), f"only{rank}": pair(10.0 * rank + number, 1.0)})
            tally.add_terms({"loss": torch.tensor(1.0)} if rank == 0 else {})
            if number == 2 and rank == 1:
                tally.add({"late": pair(7.0, 1.0)})
            tally.end_step()
            before = reduced.call_count + gathered.call_count
            results.append(tally.reduce())
            collectives.append(reduced.call_count + gathered.call_count - before)
    return results, collectives


def test_ranks_with_different_names_agree_and_need_one_collective_once_the_names_are_known() -> None:
    outcomes = run_ranks(_rank_with_its_own_names, 2, 4)
    results, collectives = outcomes[0]
    assert outcomes[1] == (results, collectives)
    for number in range(4):
        late = {"late": 7.0} if number == 2 else {}
        assert results[number] == {"all": 1.5, "loss": 1.0, "only0": number, "only1": 10.0 + number, **late}
    assert collectives == [3, 1, 3, 1]


def test_clock_reports_throughput_without_the_time_spent_aside() -> None:
    now = {"t": 100.0}
    clock = Clock(lambda: now["t"])

    def passes(seconds: float) -> None:
        now["t"] += seconds

    for _ in range(4):
        with clock.waiting():
            passes(0.5)
        passes(1.5)
        clock.step(64)
    with clock.aside():
        passes(1000.0)
    assert clock.interval() == {"images_per_second": 32.0, "step_seconds": 2.0, "data_wait_share": 0.25}
    assert clock.interval() == {}
    passes(4.0)
    clock.step(64)
    assert clock.interval() == pytest.approx({"images_per_second": 16.0, "step_seconds": 4.0, "data_wait_share": 0.0})
