"""A damping that adapts grows until the blocks can be inverted; a fixed one cannot, and says so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl

TINY = 1e-12


def trained_one_step(damping):
    """One step of a network with proportional inputs, whose undamped factors are singular in single precision."""
    torch.manual_seed(0)
    model = nn.Linear(40, 3)
    x = torch.randn(20, 1) * torch.linspace(1, 100, 40)
    optimizer = kl.NaturalGradient(model, "classification", damping=damping, momentum=0.0)
    with optimizer:
        outputs = model(x)
        optimizer.update_curvature(outputs)
        F.cross_entropy(outputs, torch.randint(3, (20,))).backward()
        optimizer.step()
    return model, optimizer


def test_a_damping_that_adapts_grows_until_the_blocks_are_not_singular():
    rule = kl.damping.LevenbergMarquardt(initial=TINY, minimum=TINY)
    model, optimizer = trained_one_step(rule)
    assert optimizer.damping.damping > TINY
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_fixed_damping_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="singular up to rounding; use a larger damping"):
        trained_one_step(kl.damping.FactoredTikhonov(TINY))
