"""The one measure of sameness (law 9): ||a - b|| / max(||b||, 1e-3 of the global norm), tensor by tensor."""

from collections.abc import Mapping

import torch
from torch import Tensor


def errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Error of every tensor by name; both must hold the same names and shapes."""
    assert actual.keys() == expected.keys(), f"different tensors: {sorted(actual.keys() ^ expected.keys())}"
    norms = {name: float(tensor.double().norm()) for name, tensor in expected.items()}
    floor = 1e-3 * float(torch.tensor(list(norms.values()), dtype=torch.float64).norm())
    found = {}
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, f"{name}: {actual[name].shape} and {tensor.shape}"
        found[name] = float((actual[name].double() - tensor.double()).norm()) / max(norms[name], floor)
    return found


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """Fail with the names of the tensors whose error is above `bound` (or not a number)."""
    above = {name: error for name, error in errors(actual, expected).items() if not error <= bound}
    assert not above, f"above {bound}: {above}"
