"""Point clouds in the plane and their energy distance: shows whether a recipe wins on digits and loses elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.datasets import make_moons
from torch import Tensor

Array = NDArray[np.float64]


def eight_gaussians(count: int, random: np.random.Generator) -> Array:
    """Eight Gaussians of standard deviation .08 on a circle of radius 1.4: [count, 2]."""
    angle = random.integers(8, size=count) * (math.pi / 4)
    return 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.08 * random.standard_normal((count, 2))


def checkerboard(count: int, random: np.random.Generator) -> Array:
    """x = 4u - 2, y = u' - 2b + floor(x) mod 2, b in {0, 1}, both times .75: [count, 2]."""
    x = 4 * random.random(count) - 2
    y = random.random(count) - 2 * random.integers(2, size=count) + np.floor(x) % 2
    return 0.75 * np.stack([x, y], axis=1)


def two_moons(count: int, random: np.random.Generator) -> Array:
    """scikit-learn's moons with noise .05, standardised by the moments of 100,000 points: [count, 2]."""
    reference, _ = make_moons(100_000, noise=0.05, random_state=0)
    points, _ = make_moons(count, noise=0.05, random_state=int(random.integers(2**31)))
    return (points - reference.mean(axis=0)) / reference.std(axis=0)


TOYS: dict[str, Callable[[int, np.random.Generator], Array]] = {
    "gaussians": eight_gaussians,
    "checkerboard": checkerboard,
    "moons": two_moons,
}


def toy_data(name: str, train: int = 20_000, reference: int = 4_000) -> tuple[Tensor, Array]:
    """Training points [train, 2] float32 and reference points [reference, 2]; always the same."""
    points = TOYS[name](train + reference, np.random.default_rng(0))
    return torch.from_numpy(points[:train]).float(), points[train:]


def energy_distance(a: Array, b: Array) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| over different points: unbiased, so it may fall below 0."""
    return float(2 * cdist(a, b).mean() - _own_distance(a) - _own_distance(b))


def _own_distance(points: Array) -> float:
    return float(cdist(points, points).sum() / (len(points) * (len(points) - 1)))
