"""Classification tasks of the experiments: data, foreign data, networks as people train them, and a folder for these.

Images have their published split; tables are split 70/30 by the seed, and standardized by the training part. Foreign data
are the test images turned by 90 degrees; for CIFAR-10 handwritten digits; for tables the test rows with every feature
permuted on its own and three times as far from its mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from experiments.cifar_files import TEST, TRAINING, records, standardized
from kronlaplace.demo.data import ClassificationData
from kronlaplace.demo.datasets import load
from kronlaplace.demo.fitting import build, seeds_of
from kronlaplace.demo.networks import lenet5, one_hidden_layer, small_lenet
from kronlaplace.demo.training import Recipe, train

TRAINING_SHARE = 0.7
FAR = 3.0
FOREIGN_DIGITS = 1000
WINE_QUALITY_THRESHOLDS = (5.5, 6.5)


@dataclass(frozen=True)
class Task:
    """A data set, by data directory and seed, and a network with its training."""

    title: str
    data: Callable[[Path | None, int], ClassificationData]
    network: Callable[[], nn.Sequential]
    recipe: Recipe
    split_by_seed: bool = False


def digits(data_dir, seed):
    return load("digits")


def mnist(data_dir, seed):
    return load("mnist", data_dir)


def cifar10(data_dir, seed):
    (train_x, train_y), (test_x, test_y) = (records(data_dir, name) for name in (TRAINING, TEST))
    train_x, test_x = train_x / 255, test_x / 255
    gray = load("mnist", data_dir).test_x[:FOREIGN_DIGITS]
    foreign_x = F.pad(gray, (2, 2, 2, 2), value=float(gray.min())).expand(-1, 3, -1, -1).contiguous()
    inputs = (standardized(train_x, train_x), train_y, standardized(test_x, train_x), test_y)
    return ClassificationData("cifar10", "CIFAR-10", 10, *inputs, foreign_x, "MNIST test digits")


def table(title, inputs, labels, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(inputs))
    kept, test = np.split(order, [round(TRAINING_SHARE * len(inputs))])
    mean, std = inputs[kept].mean(axis=0), inputs[kept].std(axis=0)
    rows = (inputs - mean) / std
    foreign = FAR * rng.permuted(rows[test], axis=0)
    train_x, test_x, foreign_x = (torch.from_numpy(part).float() for part in (rows[kept], rows[test], foreign))
    train_y, test_y = (torch.from_numpy(labels[part]).long() for part in (kept, test))
    phrase = f"test rows with every feature permuted on its own and {FAR:g} times as far from its mean"
    name = title.replace(" ", "-")
    return ClassificationData(name, title, int(labels.max()) + 1, train_x, train_y, test_x, test_y, foreign_x, phrase)


def breast_cancer(data_dir, seed):
    from sklearn.datasets import load_breast_cancer

    return table("breast cancer", *load_breast_cancer(return_X_y=True), seed)


def wine(data_dir, seed):
    from sklearn.datasets import load_wine

    return table("wine", *load_wine(return_X_y=True), seed)


def wine_quality(data_dir, seed):
    data = load("wine-quality-red", data_dir, n_splits=1)
    return table("wine quality", data.inputs, np.digitize(data.targets, WINE_QUALITY_THRESHOLDS), seed)


def small_cnn():
    """Three convolutions of 3x3 and one hidden layer for images `(N, 3, 32, 32)`, 47,818 parameters."""
    layers = []
    for n_in, n_out in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(n_in, n_out, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))


TASKS = {
    "digits": Task("digits, to convergence", digits, small_lenet, Recipe(3150, 64, 2e-3)),
    "digits-decay": Task(
        "digits, weight decay 1e-4 (the demo's training)",
        digits,
        small_lenet,
        Recipe(2000, 64, 3e-3, weight_decay=1e-4),
    ),
    "digits-prior": Task(
        "digits, prior precision 10", digits, small_lenet, Recipe(2000, 64, 3e-3, prior_precision=10.0)
    ),
    "breast-cancer": Task(
        "breast cancer, one logit", breast_cancer, partial(one_hidden_layer, 30), Recipe(2400, 32, 1e-3), True
    ),
    "wine": Task("wine", wine, partial(one_hidden_layer, 13, n_outputs=3), Recipe(600, 32, 1e-3), True),
    "wine-quality": Task(
        "wine quality in three classes",
        wine_quality,
        partial(one_hidden_layer, 11, n_outputs=3),
        Recipe(10200, 32, 3e-3),
        True,
    ),
    "mnist": Task("MNIST, LeNet-5", mnist, lenet5, Recipe(4680, 128, 1e-3)),
    "cifar10": Task("10,000 images of CIFAR-10, small CNN", cifar10, small_cnn, Recipe(4680, 128, 2e-3)),
}


def targets_of(data, labels):
    """Labels as losses and likelihoods take them: `(N, 1)` zeros and ones for two classes, else `(N,)`."""
    return labels.float().unsqueeze(1) if data.n_classes == 2 else labels


def trained(task, x, y, seed, path):
    """The network of a task and seed in evaluation mode, from its file or trained and written there.

    Args:
        task: One of `TASKS`.
        x: Training inputs.
        y: Training targets, see `targets_of`.
        seed: Of the initial weights and the order of the batches.
        path: Of the file; it is taken if the recipe in it is the task's.
    """
    weight_seed, batch_seed = seeds_of(seed)
    model = build(task.network, weight_seed, x.device)
    if path.exists():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("recipe") == repr(task.recipe):
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return model.eval()
    loss = nn.BCEWithLogitsLoss() if y.is_floating_point() else nn.CrossEntropyLoss()
    train(model, loss, x, y, task.recipe, seed=batch_seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path, {"recipe": repr(task.recipe)})
    return model
