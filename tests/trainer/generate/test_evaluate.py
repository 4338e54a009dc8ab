import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from trainer.generate.evaluate import DigitsYardstick, balanced_labels, flatten_digits, frechet_distance


@pytest.fixture(scope="module")
def yardstick() -> DigitsYardstick:
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images / 8 - 1, labels, test_size=0.3, stratify=labels, random_state=0
    )
    return DigitsYardstick(train, train_labels, test, test_labels)


def test_the_bundled_yardstick_is_the_same_split(yardstick: DigitsYardstick) -> None:
    bundled = DigitsYardstick.bundled()
    assert (len(bundled.train), len(bundled.test)) == (1257, 540)
    np.testing.assert_array_equal(bundled.train, yardstick.train)
    np.testing.assert_array_equal(bundled.test_labels, yardstick.test_labels)


def test_floor_is_real_train_against_real_test(yardstick: DigitsYardstick) -> None:
    score = yardstick.score(yardstick.train, yardstick.train_labels)
    assert round(score["fd_pca"], 2) == 0.12
    assert round(score["fd_net"], 2) == 0.54
    assert score["fd_pca_unclipped"] == score["fd_pca"]  # real images lie within [-1, 1]
    assert score["div"] == pytest.approx(1.0, abs=0.03)
    assert score["nn"] == 0.0  # they are the training images themselves
    assert score["memory_ratio"] < 0.7


def test_judge_and_nearest_distance_on_unseen_real_images(yardstick: DigitsYardstick) -> None:
    assert round(100 * yardstick.judge.score(yardstick.test, yardstick.test_labels), 1) == 99.1
    score = yardstick.score(yardstick.test, yardstick.test_labels)
    assert score["nn"] == pytest.approx(2.17, abs=0.01)
    assert score["fd_pca"] == pytest.approx(0.0, abs=1e-9)
    assert score["div"] == 1.0


def test_noise_collapse_and_wrong_classes_are_seen(yardstick: DigitsYardstick) -> None:
    labels = balanced_labels(500).numpy()
    random = np.random.default_rng(0)
    rows = np.concatenate([random.choice(np.flatnonzero(yardstick.test_labels == k), 50) for k in range(10)])
    real = yardstick.test[rows]
    means = np.stack([yardstick.train[yardstick.train_labels == k].mean(axis=0) for k in range(10)])[labels]
    good, noise = yardstick.score(real, labels), yardstick.score(random.standard_normal(real.shape), labels)
    collapsed, shuffled = yardstick.score(means, labels), yardstick.score(real, (labels + 1) % 10)
    assert good["accuracy"] > 0.97 and shuffled["accuracy"] < 0.1 and noise["accuracy"] < 0.3
    assert collapsed["accuracy"] > 0.97 and collapsed["div"] < 0.01 and good["div"] > 0.9
    assert noise["fd_pca"] > 10 * good["fd_pca"] and collapsed["fd_net"] > 10 * good["fd_net"]


def test_overshoot_counts_only_in_the_unclipped_distance(yardstick: DigitsYardstick) -> None:
    score = yardstick.score(np.where(yardstick.test == 1.0, 1.8, yardstick.test), yardstick.test_labels)
    assert score["fd_pca"] == pytest.approx(0.0, abs=1e-9) and score["fd_pca_unclipped"] > 0.1


def test_bad_input_is_refused(yardstick: DigitsYardstick) -> None:
    images = yardstick.test.copy()
    images[3, 5] = np.nan
    with pytest.raises(ValueError, match="1 of 540"):
        yardstick.score(images, yardstick.test_labels)
    with pytest.raises(ValueError, match=r"\[N, 64\]"):
        yardstick.score(yardstick.test.reshape(-1, 8, 8), yardstick.test_labels)
    with pytest.raises(ValueError, match="multiple of 10"):
        balanced_labels(15)


def test_frechet_distance_is_the_formula() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((50, 4)), random.standard_normal((60, 4)) * 2 + 1
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_pixels_are_brought_to_eight_by_eight(yardstick: DigitsYardstick) -> None:
    digits = torch.from_numpy(yardstick.test[:5]).reshape(5, 1, 8, 8)
    doubled = digits.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).expand(-1, 3, -1, -1)
    np.testing.assert_allclose(flatten_digits(doubled), yardstick.test[:5], atol=1e-12)
    assert balanced_labels(20).tolist() == sorted(list(range(10)) * 2)
    with pytest.raises(ValueError, match="12x8"):
        flatten_digits(torch.zeros(1, 1, 12, 8))
