"""What shows only side by side: the bad rank is named, and good ones are not."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.health import comparison
from trainer.health.findings import GREEN, RED, YELLOW
from trainer.health.links import Measured

HOSTS = ["n0", "n1", "n2", "n3"]


def facts(**changes: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Of four ranks alike but for `changes` of n2."""
    made = {}
    for rank, host in enumerate(HOSTS):
        made[rank] = {"host": host, "software": {"torch": "2.13", "NCCL": "2.27"}, "device": "H200", "speed": 600.0}
    made[2] |= changes
    return made


def measured(speeds: list[tuple[float, ...]], seconds: float = 1e-3) -> Measured:
    return Measured({100_000_000: seconds}, (0.0,) * 4, tuple(speeds))


@pytest.mark.parametrize("offset, level", [(0.2, GREEN), (3.0, YELLOW), (-3.0, YELLOW), (400.0, RED)])
def test_a_wrong_clock_is_named(offset: float, level: str) -> None:
    (found,) = comparison.clocks([0.0, 0.001, offset, 0.0], HOSTS)
    assert found.level == level
    if level != GREEN:
        assert (found.rank, found.host) == (2, "n2") and ("ahead of" if offset > 0 else "behind") in found.value


def test_the_slow_node_of_a_ring_is_named_and_its_neighbours_are_not() -> None:
    slow, fast = 1e9, 40e9
    speeds = [(fast, fast), (slow, fast), (slow, slow), (fast, slow)]
    assert comparison.slow_links(speeds) == [2]
    found = list(comparison.traffic(measured(speeds), HOSTS, gpus=True))
    assert [(finding.check, finding.level) for finding in found] == [("all-reduce", GREEN), ("links", YELLOW)]
    assert found[1].host == "n2" and "1.00 GB/s, the median rank's 40.00" in found[1].value


def test_of_two_ranks_with_one_slow_link_none_is_blamed() -> None:
    assert comparison.slow_links([(1e6, 0.0), (1e6, 0.0)]) == []


def test_gpus_that_talk_at_the_pace_of_plain_tcp_are_found() -> None:
    speeds = [(1e9, 1e9)] * 4
    found = next(comparison.traffic(measured(speeds, seconds=0.1), HOSTS, gpus=True))
    assert found.level == YELLOW and "100 MB 1.00 GB/s" in found.value and "NCCL_SOCKET_IFNAME" in found.remedy
    assert next(comparison.traffic(measured(speeds, seconds=0.1), HOSTS, gpus=False)).level == GREEN


def test_a_gpu_that_computes_slowly_is_named() -> None:
    (found,) = comparison.computing(facts(speed=300.0))
    assert found.level == YELLOW and found.host == "n2" and "300 TFLOP/s" in found.value
    (found,) = comparison.computing(facts(speed=550.0))
    assert found.level == GREEN
    (found,) = comparison.computing(facts(speed=None))  # another check says why
    assert found.level == GREEN


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"software": {"torch": "2.12", "NCCL": "2.27"}}, "torch 2.12 (others: 2.13)"),
        ({"software": {"torch": "2.13"}}, "NCCL none (others: 2.27)"),
        ({"device": "H100"}, "device H100 (others: H200)"),
    ],
)
def test_a_node_with_other_software_or_hardware_is_named(changes: dict[str, Any], word: str) -> None:
    (found,) = comparison.equality(facts(**changes))
    assert found.level == RED and (found.rank, found.host) == (2, "n2") and found.value == word


def test_equal_nodes_are_equal() -> None:
    (found,) = comparison.equality(facts())
    assert found.level == GREEN and "4 ranks" in found.value
    assert list(comparison.equality({0: facts()[0]})) == []
