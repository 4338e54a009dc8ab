"""The one measure of sameness (law 9): ||a - b|| / max(||b||, 1e-3 of the global norm), tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

FLOOR = 1e-3
"""Share of the global norm below which a tensor's own norm is not the measure of its error."""


def relative(distance: float, norm: float, norm_of_all: float) -> float:
    """||a - b|| over the larger of ||b|| and FLOOR of the norm of all tensors. What is not a number is infinite: a
    maximum over errors must not lose it. Equal zeros are equal."""
    scale = max(norm, FLOOR * norm_of_all)
    error = distance / scale if scale else (0.0 if distance == 0 else math.inf)
    return math.inf if math.isnan(error) else error


def errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Error of every tensor by name; see `relative`.

    Raises:
        ValueError: the two hold different names or shapes; a tensor that is left out is no small error.
    """
    different = sorted(actual.keys() ^ expected.keys())
    if different:
        raise ValueError(f"different tensors: {different[:5]}{' ...' if len(different) > 5 else ''}")
    norms = {name: float(tensor.double().norm()) for name, tensor in expected.items()}
    of_all = float(torch.tensor(list(norms.values()), dtype=torch.float64).norm())
    found = {}
    for name, tensor in expected.items():
        if actual[name].shape != tensor.shape:
            raise ValueError(f"{name}: shapes {tuple(actual[name].shape)} and {tuple(tensor.shape)}")
        distance = float((actual[name].double() - tensor.double()).norm())
        found[name] = relative(distance, norms[name], of_all)
    return found
