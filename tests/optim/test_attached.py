"""A network that carries the hooks of an optimizer can be used for everything else in the meantime."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl


class Attention(nn.Module):
    """Runs written out while it is observed."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = x.unflatten(1, (2, 8))
        return self.last(self.attention(x, x, x)[0].mean(1))


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)),
    "attention": Attention,
}


def problem(network):
    torch.manual_seed(0)
    return NETWORKS[network]().double(), torch.randn(20, 16).double(), torch.randint(3, (20,))


def optimizer_of(model):
    return kl.NaturalGradient(model, "classification", damping=kl.damping.FactoredTikhonov(0.1), lr=0.1)


def step(optimizer, model, x, y):
    optimizer.zero_grad()
    outputs = model(x)
    optimizer.update_curvature(outputs)
    F.cross_entropy(outputs, y).backward()
    optimizer.step()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_fisher_is_that_of_the_network_without_hooks(network, steps):
    model, x, y = problem(network)
    with optimizer_of(model) as optimizer:
        for _ in range(steps):
            step(optimizer, model, x, y)
        fisher = kl.estimate_fisher(model, [(x, y)], "classification")
        plain = kl.estimate_fisher(copy.deepcopy(model), [(x, y)], "classification")
    assert set(fisher) == set(plain)
    for name, block in fisher.items():
        assert torch.equal(block.to_dense(), plain[name].to_dense())


@pytest.mark.parametrize("network", NETWORKS)
def test_training_does_not_notice(network):
    """Neither before the first step, nor between a forward pass and its update."""
    results = []
    for others in (False, True):
        model, x, y = problem(network)
        with optimizer_of(model) as optimizer:
            if others:
                kl.KronLaplace(model, "classification").fit([(x, y)])
            step(optimizer, model, x, y)
            optimizer.zero_grad()
            outputs = model(x)
            if others:
                kl.KronLaplace(model, "classification").fit([(x[:7], y[:7])]).predict(x[:5])
            optimizer.update_curvature(outputs)
            F.cross_entropy(outputs, y).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
