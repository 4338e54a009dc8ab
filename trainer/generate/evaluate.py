"""The digits yardstick: how far are generated 8x8 digits from real ones?

Real data are scikit-learn's bundled digits as x/8 - 1 in [-1, 1], split 1257 train / 540 test. Nothing here is learned
from generated images. Distances between images are Euclidean over the 64 pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional as F

from data.demo import digits

Array = NDArray[np.float64]

CLASSES = 10
_SIDE = 8
_MOST_PER_CLASS = 400
_NEAREST_IMAGES = 500
_MEMORY_STRIDE = 4
_MEMORY_SUBSETS = 4


def balanced_labels(images: int) -> Tensor:
    """The asked class of every generated image, classes in order: [images] int64. ValueError unless 10 divides it."""
    if images <= 0 or images % CLASSES:
        raise ValueError(
            f"evaluate.images must be a positive multiple of {CLASSES} (one share per digit), not {images}"
        )
    return torch.arange(CLASSES).repeat_interleave(images // CLASSES)


def flatten_digits(pixels: Tensor) -> Array:
    """Generated pixels [N, C, H, W] in [-1, 1] as the yardstick wants them [N, 64]: grey, 8x8.

    ValueError unless H and W are multiples of 8.
    """
    height, width = pixels.shape[-2:]
    if height % _SIDE or width % _SIDE:
        raise ValueError(f"digits are {_SIDE}x{_SIDE} or a multiple of it, not {height}x{width}")
    grey = pixels.detach().double().cpu().mean(dim=1, keepdim=True)
    return F.adaptive_avg_pool2d(grey, (_SIDE, _SIDE)).flatten(1).numpy()


def frechet_distance(a: Array, b: Array) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features [N, K]; covariances with N - 1.

    The trace of the root is taken from S_a^(1/2) S_b S_a^(1/2), which is symmetric, so a singular S does no harm.
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0.0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


class DigitsYardstick:
    """Classifier, features and real images, fitted once (about a second); `score` may then be called many times.

    train, test: [N, 64] in [-1, 1]; labels: [N] in 0..9.
    """

    def __init__(self, train: ArrayLike, train_labels: ArrayLike, test: ArrayLike, test_labels: ArrayLike) -> None:
        self.train, self.test = np.asarray(train, np.float64), np.asarray(test, np.float64)
        self.train_labels, self.test_labels = np.asarray(train_labels), np.asarray(test_labels)
        self.judge = SVC(gamma=0.02, C=10).fit(self.train, self.train_labels)
        self.pca = PCA(16, random_state=0).fit(self.train)
        self.net = MLPClassifier((64, 32), max_iter=400, random_state=0, alpha=1e-3).fit(self.train, self.train_labels)
        self.real_spread = _spread(self.test, self.test_labels)

    @classmethod
    def bundled(cls) -> DigitsYardstick:
        """The yardstick on the demo data set's own split."""
        return cls(*digits())

    def net_features(self, images: Array) -> Array:
        """Last hidden layer of the classifier network: [N, 32], after its ReLU."""
        hidden = images
        for weight, bias in zip(self.net.coefs_[:-1], self.net.intercepts_[:-1], strict=True):
            hidden = np.maximum(hidden @ weight + bias, 0.0)
        return hidden

    def score(self, images: ArrayLike, labels: ArrayLike) -> dict[str, float]:
        """Measures of generated images [N, 64] in [-1, 1], not clipped, asked to be of `labels` [N], classes in order.

        accuracy: the SVC agrees with the asked class. fd_pca, fd_net: Frechet distance to the test images in 16
        principal components and in the network's features. div: mean distance between images of a class relative to the
        test images'. nn: mean distance of the first 500 to the nearest training image (real: 2.17). memory_ratio:
        distance to the nearest of 540 training images over that to the nearest of the 540 test images (real: 0.99).
        All on images clipped to [-1, 1], but fd_pca_unclipped.

        Raises ValueError for a wrong shape and for images that are not finite.
        """
        raw, asked = np.asarray(images, np.float64), np.asarray(labels)
        if raw.ndim != 2 or raw.shape[1] != _SIDE**2 or asked.shape != raw.shape[:1]:
            raise ValueError(f"expected images [N, 64] and labels [N], got {raw.shape} and {asked.shape}")
        broken = int((~np.isfinite(raw).all(axis=1)).sum())
        if broken:
            raise ValueError(
                f"{broken} of {len(raw)} generated images are not finite: the model or the sampler diverged"
            )
        seen = raw.clip(-1.0, 1.0)
        real = self.pca.transform(self.test)
        return {
            "accuracy": float((self.judge.predict(seen) == asked).mean()),
            "fd_pca": frechet_distance(self.pca.transform(seen), real),
            "fd_pca_unclipped": frechet_distance(self.pca.transform(raw), real),
            "fd_net": frechet_distance(self.net_features(seen), self.net_features(self.test)),
            "div": _spread(seen, asked) / self.real_spread,
            "nn": float(_nearest(seen[:_NEAREST_IMAGES], self.train).mean()),
            "memory_ratio": self._memory_ratio(seen[::_MEMORY_STRIDE]),
        }

    def _memory_ratio(self, images: Array) -> float:
        # Subsets of the size of the test part, so that neither side is nearer merely because it holds more images.
        random = np.random.default_rng(0)
        subsets = [random.permutation(len(self.train))[: len(self.test)] for _ in range(_MEMORY_SUBSETS)]
        to_train = np.mean([_nearest(images, self.train[subset]).mean() for subset in subsets])
        to_test = _nearest(images, self.test).mean()
        return float(to_train / to_test) if to_test > 0 else math.inf


def _nearest(images: Array, others: Array) -> Array:
    return cdist(images, others).min(axis=1)


def _spread(images: Array, labels: NDArray) -> float:
    """Mean distance between different images of a class, averaged over the classes with at least two images."""
    groups = [images[labels == label][:_MOST_PER_CLASS] for label in range(CLASSES)]
    distances = [pdist(group).mean() for group in groups if len(group) > 1]
    if not distances:
        raise ValueError("the diversity of a class needs at least two images of it")
    return float(np.mean(distances))
