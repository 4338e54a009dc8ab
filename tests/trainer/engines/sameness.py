"""Law 9's measure (trainer/sameness.py) as an assertion."""

from collections.abc import Mapping

from torch import Tensor

from trainer.sameness import errors

__all__ = ["assert_same", "errors"]


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """Fail with the names of the tensors whose error is above `bound` (or not a number)."""
    above = {name: error for name, error in errors(actual, expected).items() if not error <= bound}
    assert not above, f"above {bound}: {above}"
