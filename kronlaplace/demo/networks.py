"""The networks of the demo: plain `torch.nn.Sequential`, every output a raw score."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

__all__ = ["lenet5", "small_lenet", "one_hidden_layer"]


def lenet5(n_classes: int = 10) -> nn.Sequential:
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling, images `(N, 1, 28, 28)`, 61,706 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, n_classes),
    )


def small_lenet(n_classes: int = 10) -> nn.Sequential:
    """Build the same for images `(N, 1, 8, 8)`: two convolutions of 3x3, one hidden layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 32),
        nn.ReLU(),
        nn.Linear(32, n_classes),
    )


def one_hidden_layer(
    n_features: int, n_hidden: int = 50, activation: Callable[[], nn.Module] = nn.ReLU, n_outputs: int = 1
) -> nn.Sequential:
    """Build one hidden layer for rows `(N, n_features)`; 50 ReLU units and one output make that of the UCI tables."""
    return nn.Sequential(nn.Linear(n_features, n_hidden), activation(), nn.Linear(n_hidden, n_outputs))
