"""The oracles against one another: two slow ways to the same numbers."""

import itertools

import pytest
import torch
from torch import nn

from tests.support import oracles
from tests.support.assertions import assert_close
from tests.support.problems import NETWORKS, problem


@pytest.mark.quick(4)
@pytest.mark.parametrize("network", NETWORKS)
def test_oracles_agree_with_one_another(network):
    """Weight gradients from the parameters and from each use of a layer; traces; the order of the errors."""
    _, data = problem(network)
    for name, d in data.items():
        F = oracles.exact_block(d.X)
        torch.testing.assert_close(oracles.diagonal(d.X).trace(), F.trace(), rtol=1e-12, atol=1e-15)
        for group in d.groups:
            assert_close(torch.einsum("nvti,ntj->nvij", group.g, group.a), group.X, 1e-13, name)
            of_group = oracles.exact_block(group.X)
            if not of_group.any():  # rectified away
                continue
            trace = oracles.dense(*oracles.tkfac_exact(group)).trace()
            torch.testing.assert_close(trace, of_group.trace(), rtol=1e-12, atol=1e-15)
            best = oracles.error(oracles.dense(*oracles.kfoc_full(group)), of_group)
            for rule in (oracles.kfac_expand, oracles.kfac_reduce, oracles.tkfac_exact, oracles.tkfac_uncorrelated):
                assert best <= oracles.error(oracles.dense(*rule(group)), of_group) + 1e-7


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", ["mlp", "cnn", "residual"])
def test_oracles_agree_with_the_older_ones(network):
    made, data = problem(network)
    for name in made.layers:
        J = [oracles.layer_jacobian(made.model, name, x) for x in made.inputs]
        M = [oracles.output_metric(made.likelihood, made.model(x[None])[0].detach()) for x in made.inputs]
        F = sum(j.T @ m @ j for j, m in zip(J, M, strict=True)) / len(J)
        assert_close(oracles.exact_block(data[name].X), F, 1e-12, name)
        A, G = oracles.kfac_factors(made.model, made.model.get_submodule(name), made.inputs, made.likelihood)
        assert_close(oracles.block_dense(oracles.kfac_expand, data[name]), oracles.dense(1.0, G, A), 1e-12, name)


def test_the_published_running_average_is_a_sequence_of_best_rank_ones():
    made, data = problem("depthwise")
    batches = list(torch.arange(len(made.targets)).split(2))
    for name, d in data.items():
        for group in d.groups:
            published = oracles.dense(*oracles.kfoc_published(group, batches))
            assert_close(published, oracles.dense(*oracles.kfoc_running(group, batches)), 1e-9, name)


def test_theorem_4_is_exact_where_its_assumption_holds():
    """On all images whose pixels are ±1, pixels do not correlate: KFC's activation factor is SUA's to rounding."""
    conv = nn.Conv2d(2, 1, (2, 3), stride=(1, 2), padding=1).double()
    images = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8))).double().reshape(-1, 2, 2, 2)
    mixed = torch.tensor([[1.0, 0.3], [-0.5, 2.0]]).double()
    images = torch.einsum("jk,nkhw->njhw", mixed, images) + torch.tensor([0.4, -0.7]).double()[:, None, None]
    a = torch.stack([oracles.patches(conv, image[None]) for image in images])
    assert_close(oracles.sua_activations(conv, images), torch.einsum("nti,ntj->ij", a, a) / len(a), 1e-12)
