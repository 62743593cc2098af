"""Undamped natural-gradient training does not see affine changes of activations and pre-activations (K-FAC Theorem 1)."""

import pytest
import torch

import kronlaplace as kl
from kronlaplace.optim.natural_gradient import NaturalGradient
from tests.support.reparameterizations import difference, mlp, transformed_mlp

STEPS = 20


def train(model, batches, structure):
    """Undamped steps with the exact Fisher of each batch."""
    optimizer = NaturalGradient(
        model,
        "regression",
        lr=0.05,
        momentum=0.0,
        structure=structure,
        damping=kl.damping.FactoredTikhonov(0.0),
        kl_clip=None,
        curvature_every=1,
        invert_every=1,
        ema_decay=0.0,
        sampling="exact",
    )
    with optimizer:
        for x, y in batches:
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.update_curvature(outputs)
            (0.5 * (outputs - y).square().sum() / len(x)).backward()
            optimizer.step()


@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal"])
def test_reparameterized_networks_stay_the_same_function(structure):
    torch.manual_seed(0)
    model = mlp(hidden=(3, 3))
    transformed, fresh = transformed_mlp(model), torch.randn(7, 3).double()
    batches = [(torch.randn(40, 3).double(), torch.randn(40, 3).double()) for _ in range(STEPS)]
    with torch.no_grad():
        before = model(fresh)
    assert difference(model, transformed, fresh) < 1e-11
    for network in (model, transformed):
        train(network, batches, structure)
    with torch.no_grad():
        moved = torch.linalg.norm(model(fresh) - before) / torch.linalg.norm(before)
    assert moved > 0.1  # something happened
    assert difference(model, transformed, fresh) < 1e-6
