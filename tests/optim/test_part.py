"""How many examples of a batch something is computed on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace.optim.part import Part, part_of


@pytest.mark.parametrize("n", [1, 7, 30, 1000])
@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_fraction_is_rounded_up(n, tenths):
    """As integers, so that the rounding of ``0.1 · 30`` plays no role."""
    assert Part(tenths / 10).count(n) == -(-n * tenths // 10)


@pytest.mark.parametrize(("n", "count"), [(3, 3), (20, 20), (30, 24), (96, 24), (100, 25)])
def test_small_batches_have_a_larger_part(n, count):
    assert Part(1 / 4, fewest=24).count(n) == count


def test_the_users_fraction_has_no_fewest():
    assert part_of(0.1, "model_fraction", Part(1 / 4, fewest=24)).count(30) == 3
    assert part_of(None, "model_fraction", Part(1 / 4, fewest=24)).count(30) == 24
    for value, error in ((0.0, ValueError), (1.5, ValueError), ("half", TypeError)):
        with pytest.raises(error, match="model_fraction"):
            part_of(value, "model_fraction", Part(1.0))


@pytest.mark.parametrize(("n", "fraction"), [(30, 1.0), (64, 1 / 2), (320, 1 / 4)])
def test_the_averages_have_a_quarter_of_a_large_batch_unless_told_otherwise(n, fraction):
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(n, 3)
    blocks = []
    for settings in ({}, {"curvature_fraction": fraction}):
        network = copy.deepcopy(model)
        with kl.NaturalGradient(network, "classification", sampling="exact", **settings) as optimizer:
            outputs = network(x)
            optimizer.update_curvature(outputs)
            F.cross_entropy(outputs, torch.zeros(n, dtype=torch.long)).backward()
            optimizer.step()
            blocks.append(optimizer.blocks["0"].to_dense())
    assert torch.equal(*blocks)
