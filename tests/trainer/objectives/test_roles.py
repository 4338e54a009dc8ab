import itertools

import pytest
import torch

from tests.trainer.objectives.cases import EQUAL_ROLES
from trainer.objectives.roles import assign, pattern, published_partition

WEIGHTS = [
    dict(zip(EQUAL_ROLES, values, strict=True)) for values in itertools.product(range(4), repeat=4) if sum(values) > 0
]


def test_equal_weights_take_turns() -> None:
    assert pattern(EQUAL_ROLES) == [0, 1, 2, 3]


def test_a_period_holds_every_role_as_often_as_its_weight() -> None:
    for weights in WEIGHTS:
        order = pattern(weights)
        assert [order.count(i) for i in range(4)] == list(weights.values())


def test_every_part_of_the_pattern_holds_nearly_the_share_of_each_role() -> None:
    for weights in WEIGHTS:
        order, period = pattern(weights), sum(weights.values())
        for begin, length in itertools.product(range(period), range(1, period)):
            part = (order * 2)[begin : begin + length]
            for i, weight in enumerate(weights.values()):
                assert abs(part.count(i) - length * weight / period) < 2, (weights, order)


def test_the_next_step_rotates_the_pattern_by_one_row() -> None:
    weights = {"e2e": 2, "mul": 1, "any": 1, "adv": 1}
    for step in range(7):
        now, then = assign(weights, step, 13).local, assign(weights, step + 1, 13).local
        assert torch.equal(now[1:], then[:-1])
    assert torch.equal(assign(weights, 0, 13).local, assign(weights, 5, 13).local)


def test_a_row_serves_every_role_in_turn_over_a_period_of_steps() -> None:
    served = [assign(EQUAL_ROLES, step, 1).local.item() for step in range(8)]
    assert served == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("weights", [EQUAL_ROLES, {"e2e": 2, "mul": 1, "any": 3, "adv": 1}, {"any": 1}])
def test_windows_of_whole_periods_are_balanced_on_every_rank(weights: dict[str, int], world_size: int) -> None:
    for step, periods in itertools.product(range(5), (1, 2, 3)):
        batch = world_size * periods * sum(weights.values())
        roles = assign(weights, step, batch, 0, world_size)
        assert roles.counts.tolist() == [[weight * periods for weight in weights.values()]] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_ranks_hold_consecutive_parts_of_the_same_roles_and_agree_on_the_counts(world_size: int) -> None:
    whole = assign(EQUAL_ROLES, 3, 12)
    ranks = [assign(EQUAL_ROLES, 3, 12, rank, world_size) for rank in range(world_size)]
    assert torch.equal(torch.cat([roles.local for roles in ranks]), whole.local)
    for rank, roles in enumerate(ranks):
        assert torch.equal(roles.counts, ranks[0].counts)
        for i, name in enumerate(roles.names):
            assert len(roles.rows(name)) == int(roles.counts[rank, i])
            assert roles.total(name) == whole.total(name) == 3
            assert roles.most(name) == max(len(other.rows(name)) for other in ranks)
        assert roles.most("e2e", "adv") == max(len(other.rows("e2e", "adv")) for other in ranks)


def test_a_role_of_weight_zero_does_not_exist() -> None:
    roles = assign({"e2e": 1, "mul": 0, "any": 1, "adv": 0}, 0, 6)
    assert roles.names == ("e2e", "any")
    assert roles.total("mul", "adv") == roles.most("adv") == len(roles.rows("mul")) == 0
    assert roles.local.tolist() == [0, 1] * 3


PARTITIONS = {
    4: (1, 1, 1, 1), 5: (1, 1, 1, 2), 6: (2, 2, 2, 0), 7: (2, 2, 2, 1), 8: (2, 2, 2, 2), 9: (2, 2, 2, 3),
    10: (2, 2, 2, 4), 11: (3, 3, 3, 2), 12: (3, 3, 3, 3), 14: (4, 4, 4, 2), 16: (4, 4, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("rows", PARTITIONS)
def test_the_published_partition_is_by_blocks_with_the_recorded_sizes(rows: int) -> None:
    order = published_partition(EQUAL_ROLES, rows)
    assert order == sorted(order)
    assert tuple(order.count(i) for i in range(4)) == PARTITIONS[rows]
    roles = assign(EQUAL_ROLES, 17, rows, published=True)
    assert roles.local.tolist() == order
    assert roles.names == tuple(EQUAL_ROLES)


@pytest.mark.parametrize("weights", [{"e2e": 1, "mul": -1}, {"e2e": 0, "mul": 0}, {"e2e": 0.5}, {}])
def test_impossible_weights_are_refused_with_an_example(weights: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"role weights must be integers >= 0 and not all zero.*e2e: 1"):
        pattern(weights)
    with pytest.raises(ValueError, match=r"role weights"):
        assign(weights, 0, 4)


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size 7 is not a multiple of 2 ranks"):
        assign(EQUAL_ROLES, 0, 7, 0, 2)
