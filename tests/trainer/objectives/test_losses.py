import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.objectives.losses import graded_loss, group_rows, interval_weight, row_loss
from trainer.objectives.objective import Targets


def error_of_mean_square(m: float, elements: int = 24) -> Tensor:
    """One row whose mean square is m, with elements of unequal sizes."""
    error = torch.linspace(-1, 2, elements, dtype=torch.float64).reshape(1, 2, -1)
    return error * math.sqrt(m / error.square().mean())


@pytest.mark.parametrize(
    ("interval", "expected"), [(0, 4.0777), (0.01, 3.9510), (0.05, 3.5257), (0.25, 2.3764), (0.5, 1.7265), (1, 1.0)]
)
def test_interval_weight_has_the_published_values(interval: float, expected: float) -> None:
    r = torch.tensor([0.0], dtype=torch.float64)
    assert interval_weight(r + interval, r).item() == pytest.approx(expected, abs=6e-5)
    assert interval_weight(-(r + interval), r).item() == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("m", "expected"), [(1e-6, 7.0886e-4), (1e-2, 0.100494), (0.25, 0.502493), (1, 1.004987)])
def test_barron_has_the_published_values(m: float, expected: float) -> None:
    assert row_loss(error_of_mean_square(m), "barron").item() == pytest.approx(expected, rel=6e-5)


def test_l2_is_the_mean_square_of_every_row() -> None:
    error = torch.stack([error_of_mean_square(m)[0] for m in (0.04, 4.0)])
    torch.testing.assert_close(row_loss(error, "l2"), torch.tensor([0.04, 4.0], dtype=torch.float64))


def test_barron_with_alpha_two_is_the_scaled_l2() -> None:
    error = error_of_mean_square(0.3)
    torch.testing.assert_close(row_loss(error, "barron", alpha=2, scale=1e-3), row_loss(error, "l2") / 1e-3)


def gradient(error: Tensor, kind: str, **options: float) -> Tensor:
    leaf = error.clone().requires_grad_()
    row_loss(leaf, kind, **options).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_l2_gradient_is_two_errors_per_element() -> None:
    error = error_of_mean_square(0.3)
    torch.testing.assert_close(gradient(error, "l2"), 2 * error / error.numel())


@pytest.mark.parametrize("m", [1e-4, 1e-2, 1.0, 50.0])
def test_barron_pushes_every_row_with_the_same_norm(m: float) -> None:
    """dl/dF = 2.01 error / (D sqrt(m + 1e-6)) (method 2.2), so its norm is about 2.01 / sqrt(D)."""
    error = error_of_mean_square(m)
    made = gradient(error, "barron")
    torch.testing.assert_close(made, 2.01 * error / (error.numel() * math.sqrt(m + 1e-6)), rtol=1e-3, atol=0)
    assert made.norm().item() == pytest.approx(2.01 / math.sqrt(error.numel()), rel=1e-2)


def test_a_row_without_error_has_no_gradient_and_no_nan() -> None:
    for kind in ("l2", "barron"):
        assert torch.equal(gradient(torch.zeros(2, 3, 4), kind), torch.zeros(2, 3, 4))


class Free:
    """A network whose output is a leaf of its own."""

    shares_module = True

    def __init__(self, output: Tensor) -> None:
        self.output = output.requires_grad_()

    def velocity(self, *_: Any) -> Tensor:
        return self.output


def targets(velocity: Tensor, **fields: Any) -> Targets:
    rows = len(velocity)
    t = torch.linspace(0.3, 0.9, rows, dtype=torch.float64)
    groups, names = group_rows(torch.arange(rows) % 2, ("left", "right"), t)
    weight = torch.ones(rows, dtype=torch.float64)
    return Targets(torch.arange(rows), velocity, t, t, None, velocity, weight, groups, names, **fields)


def rows_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, 4)


def test_plain_rows_regress_on_the_velocity_weighted() -> None:
    net = Free(rows_of(1, 2, 3))
    made = targets(rows_of(0.5, 2, 6))
    made = Targets(**{**vars(made), "weight": torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)})
    out = graded_loss(net, made, "l2", 1.0, 1e-3, residual_clamp=1.0)
    assert out.total.item() == pytest.approx(0.25 + 0 + 4.5)
    out.total.backward()
    torch.testing.assert_close(net.output.grad, rows_of(2 * 0.5 / 4, 0, 0.5 * 2 * -3 / 4))


def test_consistent_rows_regress_on_the_clipped_residual_and_others_are_not_clipped() -> None:
    """B1: target = F - clip(coefficient F - integral - v), so the loss is the mean square of the clipped residual."""
    net = Free(rows_of(1, 1, 1, 5))
    made = targets(
        rows_of(0.5, 0.5, 0.5, 0.5),
        consistent=torch.tensor([True, True, True, False]),
        coefficient=torch.tensor([2.0, 10.0, 1.0, 1.0], dtype=torch.float64),
        integral=rows_of(1.2, 1.0, 0, 0),
    )
    out = graded_loss(net, made, "l2", 1.0, 1e-3, residual_clamp=1.0)
    residuals = [2 - 1.2 - 0.5, 1.0, 1 - 0.5, 5 - 0.5]
    assert out.total.item() == pytest.approx(sum(q * q for q in residuals))
    assert out.tally["clamped_share"].tolist() == [1, 3]
    out.total.backward()
    torch.testing.assert_close(net.output.grad, rows_of(*(2 * q / 4 for q in residuals)))


def test_the_rectification_term_is_the_loss_of_the_gap_with_its_own_weight() -> None:
    net = Free(rows_of(1, 1))
    gap_weight = torch.tensor([0.0, 0.25], dtype=torch.float64)
    made = targets(rows_of(1, 1), gap=rows_of(0.0, 0.6), gap_weight=gap_weight)
    out = graded_loss(net, made, "l2", 1.0, 1e-3, residual_clamp=1.0)
    assert {name: value.item() for name, value in out.terms.items()} == pytest.approx(
        {"base": 0, "rectify": 0.25 * 0.36}
    )
    assert out.total.item() == pytest.approx(0.25 * 0.36)
    out.total.backward()
    torch.testing.assert_close(net.output.grad, rows_of(0, 0.25 * 2 * 0.6 / 4))


def test_parts_of_the_rows_add_up_to_the_whole_loss_and_diagnostics() -> None:
    net, made = Free(rows_of(1, 2, 3, 4, 5)), targets(rows_of(0, 0.1, 0.2, 0.3, 0.4))
    whole = graded_loss(net, made, "barron", 1.0, 1e-3, residual_clamp=1.0)
    parts = [
        graded_loss(Free(net.output.detach()[part]), made[part], "barron", 1.0, 1e-3, residual_clamp=1.0)
        for part in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    for name in whole.tally:
        torch.testing.assert_close(sum(part.tally[name] for part in parts), whole.tally[name])


def test_errors_are_reported_by_role_and_by_time_bin() -> None:
    net, made = Free(rows_of(1, 2, 3)), targets(rows_of(0, 0, 0))
    tally = graded_loss(net, made, "l2", 1.0, 1e-3, residual_clamp=1.0).tally
    assert tally["error/left"].tolist() == [1 + 9, 2]
    assert tally["error/right"].tolist() == [4, 1]
    assert tally["error/t_0.2_0.4"].tolist() == [1, 1]
    assert tally["error/t_0.6_0.8"].tolist() == [4, 1]
    assert tally["error/t_0.8_1.0"].tolist() == [9, 1]
    assert tally["error/t_0.0_0.2"].tolist() == [0, 0]


def test_time_bins_take_the_size_of_the_time_and_hold_its_ends() -> None:
    groups, names = group_rows(torch.tensor([0, 0, 0]), ("only",), torch.tensor([1.0, -1.0, 0.0]))
    assert [names[i] for i in groups[:, 1:].argmax(dim=1) + 1] == ["error/t_0.8_1.0"] * 2 + ["error/t_0.0_0.2"]
    assert torch.equal(groups.sum(dim=1), torch.full((3,), 2.0))
