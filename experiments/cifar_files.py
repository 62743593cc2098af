"""CIFAR-10 from its published files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from kronlaplace.demo.datasets import DATA_VARIABLE
from kronlaplace.demo.errors import CorruptDataError, MissingDataError
from kronlaplace.demo.files import read_bytes

SOURCE = "the binary version of CIFAR-10 (www.cs.toronto.edu/~kriz/cifar.html)"
BYTES = 1 + 3 * 32 * 32
TRAINING, TEST = "data_batch_1.bin", "test_batch.bin"


def records(data_dir, name):
    """The images of a file, `(N, 3, 32, 32)` from 0 to 255, and their labels."""
    root = data_dir or os.environ.get(DATA_VARIABLE)
    if root is None:
        raise MissingDataError(
            f"give --data-dir DIR or set {DATA_VARIABLE}, where DIR/cifar10 has {name} (plain or .gz) of {SOURCE}."
        )
    path = Path(root) / "cifar10" / name
    content = read_bytes(path, SOURCE)
    if len(content) == 0 or len(content) % BYTES:
        raise CorruptDataError(f"{path}: {len(content)} bytes are not records of {BYTES}; get it again from {SOURCE}.")
    rows = np.frombuffer(content, np.uint8).reshape(-1, BYTES)
    x = torch.from_numpy(rows[:, 1:].astype(np.float32)).reshape(-1, 3, 32, 32)
    return x, torch.from_numpy(rows[:, 0].astype(np.int64))


def standardized(x, like):
    """Images by the mean and standard deviation of each channel of others."""
    return (x - like.mean((0, 2, 3), keepdim=True)) / like.std((0, 2, 3), keepdim=True)


def train_and_test(data_dir):
    """Training images and labels, and test images and labels, standardized by the channels of the training images."""
    (x, y), (test_x, test_y) = records(data_dir, TRAINING), records(data_dir, TEST)
    return standardized(x, x), y, standardized(test_x, x), test_y
