"""The data sets that need no file: scikit-learn's tables and digits, and two that are made from the seed.

The test part of scikit-learn's data is the same for every seed, so that tables compare.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kronlaplace.demo.data import ClassificationData, RegressionData
from kronlaplace.demo.images import digit_images

__all__ = [
    "load_breast_cancer",
    "load_diabetes",
    "load_digits",
    "load_wine",
    "make_moons",
    "make_sine",
    "sine_function",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Parts = tuple[FloatArray, IntArray, FloatArray, IntArray]
"""Training inputs and labels, test inputs and labels."""

_SPLIT_SEED = 0
_FAR = 5.0
_RING = (5.0, 10.0)


def load_digits() -> ClassificationData:
    """Return the 8x8 digits, a quarter of them for testing."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    return digit_images("digits", "scikit-learn's 8x8 digits", *_split(images.reshape(-1, 1, 8, 8), labels))


def load_breast_cancer() -> ClassificationData:
    """Return the Wisconsin breast cancer table: 30 features, two classes."""
    from sklearn import datasets

    table = datasets.load_breast_cancer(return_X_y=True)
    return _features("breast-cancer", "scikit-learn's breast cancer table", *table)


def load_wine() -> ClassificationData:
    """Return the wine recognition table: 13 features, three classes."""
    from sklearn import datasets

    return _features("wine", "scikit-learn's wine table", *datasets.load_wine(return_X_y=True))


def make_moons(seed: int, n_train: int = 200, n_test: int = 1000, noise_std: float = 0.2) -> ClassificationData:
    """Make two interleaving half circles with noise; the out-of-distribution inputs are on a ring around them."""
    from sklearn import datasets

    inputs, labels = datasets.make_moons(n_train + n_test, noise=noise_std, random_state=seed)
    parts = inputs[:n_train], labels[:n_train], inputs[n_train:], labels[n_train:]
    rng = np.random.default_rng(seed)
    angle, radius = rng.uniform(0.0, 2.0 * np.pi, n_test), rng.uniform(*_RING, n_test)
    ring = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    phrase = f"points {_RING[0]:g} to {_RING[1]:g} standard deviations from the center of the data"
    return _standardized("moons", "two moons", parts, ring, phrase)


def load_diabetes() -> RegressionData:
    """Return the diabetes table: 10 features, a quarter of the rows for testing."""
    from sklearn import datasets

    inputs, targets = datasets.load_diabetes(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(inputs))
    n_test = len(inputs) // 4
    split = (order[n_test:], order[:n_test])
    return RegressionData("diabetes", "scikit-learn's diabetes table", inputs, targets, [split])


def make_sine(seed: int, n_train: int = 100, n_test: int = 400, noise_std: float = 0.2) -> RegressionData:
    """Make training inputs in [-4, -1.5] and [1, 4]; the test inputs fill [-4, 4], the gap included."""
    rng = np.random.default_rng(seed)
    left, right = rng.uniform(-4.0, -1.5, n_train // 2), rng.uniform(1.0, 4.0, n_train - n_train // 2)
    x = np.concatenate([left, right, rng.uniform(-4.0, 4.0, n_test)])
    y = sine_function(x) + noise_std * rng.normal(size=len(x))
    split = (np.arange(n_train), np.arange(n_train, len(x)))
    return RegressionData("sine", "a noisy sine with a gap in the training inputs", x[:, None], y, [split])


def sine_function(x: FloatArray) -> FloatArray:
    """Evaluate the function behind the `sine` data set, without its noise."""
    return np.sin(1.5 * x)


def _split(inputs: FloatArray, labels: IntArray) -> Parts:
    """Put a quarter of each class into the test part."""
    from sklearn.model_selection import train_test_split

    train_x, test_x, train_y, test_y = train_test_split(
        inputs, labels, test_size=0.25, stratify=labels, random_state=_SPLIT_SEED
    )
    return train_x, train_y, test_x, test_y


def _features(name: str, title: str, inputs: FloatArray, labels: IntArray) -> ClassificationData:
    """A table split and standardized; out of distribution are its test features, permuted and far from the data."""
    parts = _split(inputs, labels)
    train_x, _, test_x, _ = parts
    permuted = np.random.default_rng(_SPLIT_SEED).permuted(test_x, axis=0)
    far = _FAR * (permuted - train_x.mean(axis=0)) / train_x.std(axis=0)
    phrase = f"test rows with every feature permuted on its own and {_FAR:g} times as far from its mean"
    return _standardized(name, title, parts, far, phrase)


def _standardized(
    name: str,
    title: str,
    parts: Parts,
    foreign: FloatArray,
    phrase: str,
) -> ClassificationData:
    """Standardize features by the training part; `foreign` is standardized already."""
    train_x, train_y, test_x, test_y = parts
    mean, std = train_x.mean(axis=0), train_x.std(axis=0)

    def features(x: FloatArray) -> torch.Tensor:
        return torch.from_numpy((x - mean) / std).float()

    return ClassificationData(
        name,
        title,
        int(train_y.max()) + 1,
        features(train_x),
        torch.from_numpy(train_y),
        features(test_x),
        torch.from_numpy(test_y),
        torch.from_numpy(foreign).float(),
        phrase,
    )
