import math

import pytest
import torch
from scipy import stats

from trainer.objectives.random_streams import betas, normals, philox, purpose_id, uniforms

ROWS = torch.arange(8_000)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_by_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second % 2**32,
            first >> 32 ^ counter[3] ^ key[1],
            first % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    first, second = words(key)
    made = philox([torch.tensor([word]) for word in words(counter)], (first, second))
    assert [int(word) for word in made] == words(expected)


def test_philox_equals_integer_arithmetic_on_many_counters() -> None:
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (4, 200), generator=generator)
    key = [0xDEADBEEF, 0x89ABCDEF]
    made = torch.stack(philox(list(counters), (key[0], key[1])), dim=1).tolist()
    assert made == [philox_by_integers(column, key) for column in counters.T.tolist()]


def test_uniforms_are_keyed_by_block_row_step_and_purpose() -> None:
    seed, step, purpose, row = (7 << 32) + 11, 123, purpose_id("times"), 45
    made = uniforms(seed, step, purpose, torch.tensor([row]), 8)[0].tolist()
    blocks = [philox_by_integers([block, row, step, purpose], [11, 7]) for block in (0, 1)]
    assert made == [(word + 0.5) / 2**32 for block in blocks for word in block]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 18])
def test_a_row_does_not_depend_on_the_rows_beside_it(count: int) -> None:
    rows = torch.tensor([3, 0, 17, 5])
    together = normals(1, 2, purpose_id("z"), rows, (count,), dtype=torch.float64)
    alone = torch.cat(
        [normals(1, 2, purpose_id("z"), rows[i : i + 1], (count,), dtype=torch.float64) for i in range(4)]
    )
    assert torch.equal(together, alone)
    shuffled = normals(1, 2, purpose_id("z"), rows.flip(0), (count,), dtype=torch.float64)
    assert torch.equal(together, shuffled.flip(0))


def test_a_longer_row_begins_with_the_uniforms_of_a_shorter_one() -> None:
    assert torch.equal(uniforms(1, 2, 3, ROWS[:9], 11)[:, :6], uniforms(1, 2, 3, ROWS[:9], 6))


def test_a_purpose_per_row_equals_one_call_per_purpose() -> None:
    rows, shape = torch.arange(6), (2, 3)
    purposes = torch.tensor([purpose_id("z"), purpose_id("z_adv")]).repeat_interleave(3)
    made = normals(1, 2, purposes, rows, shape, dtype=torch.float64)
    assert torch.equal(made[:3], normals(1, 2, purpose_id("z"), rows[:3], shape, dtype=torch.float64))
    assert torch.equal(made[3:], normals(1, 2, purpose_id("z_adv"), rows[3:], shape, dtype=torch.float64))


def test_no_rows_give_an_empty_tensor_of_the_right_shape() -> None:
    assert normals(1, 2, 3, ROWS[:0], (2, 3)).shape == (0, 2, 3)
    assert uniforms(1, 2, 3, ROWS[:0], 4).shape == (0, 4)
    assert betas(1, 2, "t", ROWS[:0], 0.8, 1.2).shape == (0,)


@pytest.mark.parametrize(
    "other",
    [(2, 1, "z", ROWS), (1 + (1 << 32), 1, "z", ROWS), (1, 2, "z", ROWS), (1, 1, "z_adv", ROWS), (1, 1, "z", ROWS + 1)],
    ids=["seed", "high word of the seed", "step", "purpose", "row"],
)
def test_streams_are_independent(other: tuple[int, int, str, torch.Tensor]) -> None:
    seed, step, purpose, rows = other
    first = normals(1, 1, purpose_id("z"), ROWS, (2,), dtype=torch.float64)
    second = normals(seed, step, purpose_id(purpose), rows, (2,), dtype=torch.float64)
    correlation = torch.corrcoef(torch.cat([first, second], dim=1).T).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(len(ROWS))
    same_squares = torch.corrcoef(torch.stack([first[:, 0] ** 2, second[:, 0] ** 2]))[0, 1]
    assert same_squares.abs() < 5 / math.sqrt(len(ROWS))


def test_uniforms_lie_inside_the_unit_interval_and_are_uniform() -> None:
    made = uniforms(5, 6, 7, ROWS, 3)
    assert made.min() > 0 and made.max() < 1
    for column in made.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3


def test_normals_are_standard_normal_with_independent_elements() -> None:
    made = normals(5, 6, 7, ROWS, (5,), dtype=torch.float64)
    assert stats.kstest(made.flatten().numpy(), "norm").pvalue > 1e-3
    error = 5 / math.sqrt(made.numel())
    assert abs(made.mean()) < error
    assert abs(made.var() - 1) < error * math.sqrt(2)
    assert abs((made**4).mean() - 3) < error * math.sqrt(96)
    assert torch.corrcoef(made.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(len(ROWS))


def test_normals_are_rounded_once_to_the_dtype_asked_for() -> None:
    wide = normals(5, 6, 7, ROWS[:50], (2, 3), dtype=torch.float64)
    assert torch.equal(normals(5, 6, 7, ROWS[:50], (2, 3)), wide.float())


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.8, 1.0), (0.5, 0.5), (1.0, 0.6), (2.0, 5.0), (1.5, 0.3)])
def test_betas_follow_the_beta_distribution(alpha: float, beta: float) -> None:
    rows = ROWS[:4000]
    made = betas(8, 9, "t", rows, alpha, beta)
    assert stats.kstest(made.numpy(), stats.beta(alpha, beta).cdf).pvalue > 1e-3
    assert torch.equal(made[100:110], betas(8, 9, "t", ROWS[100:110], alpha, beta))
    next_step = betas(8, 10, "t", rows, alpha, beta)
    assert torch.corrcoef(torch.stack([made, next_step]))[0, 1].abs() < 5 / math.sqrt(len(rows))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.6), (0.3, 1.5)])
def test_betas_are_exact_and_not_only_nearly_so(alpha: float, beta: float) -> None:
    """Many rows, since the proposals alone, without the acceptance, are nearly right."""
    made = betas(8, 9, "t", torch.arange(60_000), alpha, beta)
    assert stats.kstest(made.numpy(), stats.beta(alpha, beta).cdf).pvalue > 1e-2
