"""What the demo is given: a classification task, or a regression table with its splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["ClassificationData", "RegressionData", "RegressionSplit"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassificationData:
    """Inputs to classify, standardized by the training part.

    Shapes: images `(N, 1, H, W)` or features `(N, D)`, float32; labels `(N,)`, int64.

    Attributes:
        name: Name in `DATASETS`.
        title: Name for readers.
        n_classes: Number of classes.
        train_x: Training inputs.
        train_y: Training labels.
        test_x: Test inputs.
        test_y: Test labels.
        foreign_x: Out-of-distribution inputs.
        foreign: What these are, as a phrase for the notes.
    """

    name: str
    title: str
    n_classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    foreign_x: Tensor
    foreign: str

    @property
    def has_images(self) -> bool:
        """Whether the inputs are images."""
        return self.train_x.dim() == 4


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
