"""The measure of sameness: its floor, its zeros, and that no maximum over errors can lose what is not a number."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.sameness import errors


def test_a_small_tensor_is_measured_by_a_thousandth_of_the_norm_of_all() -> None:
    expected = {"large": torch.tensor([1000.0]), "small": torch.tensor([1e-6])}
    found = errors({"large": torch.tensor([1001.0]), "small": torch.tensor([0.5])}, expected)
    assert found == pytest.approx({"large": 1e-3, "small": 0.5}, rel=1e-4)


@pytest.mark.parametrize("side", ["actual", "expected"])
def test_nan_is_the_largest_error_wherever_it_stands(side: str) -> None:
    good = {name: torch.ones(2) for name in "abc"}
    bad = good | {"b": torch.tensor([1.0, math.nan])}
    found = errors(bad, good) if side == "actual" else errors(good, bad)
    assert max(found.values()) == max(found["b"], 0.0) == math.inf
    assert found["a"] == found["c"] == 0


def test_equal_zeros_are_the_same_and_others_are_not() -> None:
    zero = {"w": torch.zeros(2)}
    assert errors(zero, zero) == {"w": 0.0}
    assert errors({"w": torch.full((2,), 1e-30)}, zero) == {"w": math.inf}


def test_a_tensor_that_one_side_lacks_or_has_in_another_shape_is_no_error_but_a_mistake() -> None:
    with pytest.raises(ValueError, match="different tensors: \\['b'\\]"):
        errors({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"a: shapes \(1, 2\) and \(2,\)"):
        errors({"a": torch.ones(1, 2)}, {"a": torch.ones(2)})
