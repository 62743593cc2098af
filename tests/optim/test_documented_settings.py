"""The settings in the documentation of KFC's Algorithm 1 train small and larger networks on scikit-learn's digits."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import kronlaplace as kl


def deep():
    hidden = [module for _ in range(4) for module in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), *hidden, nn.Linear(64, 10))


NETWORKS = {
    "two layers": lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    "wide": lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
    "six layers": deep,
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    ),
}


@pytest.mark.parametrize("batch_size", [32, 128])
@pytest.mark.parametrize("name", NETWORKS)
def test_kfcs_settings_do_not_diverge(name, batch_size):
    """The loss of every batch stays below twice that of a guess, and at the end the loss is below half of it."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    model, losses = NETWORKS[name](), []
    with kl.NaturalGradient(
        model, "classification", lr=0.01, momentum=0.9, damping=kl.damping.FactoredTikhonov(3e-2), kl_clip=0.3
    ) as optimizer:
        for batch in torch.cat([torch.randperm(len(x)) for _ in range(3)]).split(batch_size)[:60]:
            optimizer.zero_grad()
            outputs = model(x[batch])
            optimizer.update_curvature(outputs)
            loss = F.cross_entropy(outputs, y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    guess = torch.tensor(10.0).log().item()
    assert max(losses) < 2 * guess
    assert sum(losses[-10:]) / len(losses[-10:]) < guess / 2
