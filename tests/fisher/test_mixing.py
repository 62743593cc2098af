"""Convex combinations of Fishers, against dense algebra."""

import pytest
import torch

import kronlaplace as kl
from kronlaplace.fisher.merging import merge_fishers
from kronlaplace.fisher.mixing import mix_fishers
from tests.support.posteriors import problem

SHARE = 0.3


def pair(estimator, network="mlp"):
    """Two Fishers of the same kind: from some examples and from others."""
    made = problem(network)
    half = len(made.targets) // 2
    return [
        kl.estimate_fisher(made.model, data, "classification", estimator, sampling="exact")
        for data in (made.data(stop=half), made.data(start=half, stop=2 * half))
    ]


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "diagonal", "exact"])
def test_mixture_is_what_the_estimator_makes_of_both(estimator, network):
    first, second = pair(estimator, network)
    mixed = mix_fishers(first, second, 0.5)
    torch.testing.assert_close(mixed.to_dense(), merge_fishers(first, second).to_dense(), rtol=1e-10, atol=1e-14)
    assert mixed.n_examples == second.n_examples
    assert mixed.metadata == second.metadata
    assert torch.equal(mixed.statistics, second.statistics)


@pytest.mark.parametrize("estimator", ["diagonal", "exact"])
def test_blocks_without_structure_are_added(estimator):
    first, second = pair(estimator)
    expected = (1 - SHARE) * first.to_dense() + SHARE * second.to_dense()
    torch.testing.assert_close(mix_fishers(first, second, SHARE).to_dense(), expected, rtol=1e-12, atol=1e-15)


def test_mixture_of_products_is_the_nearest_product():
    """Its error is the least singular part of the rearranged sum, which has rank two."""
    first, second = pair("kfoc")
    mixed = mix_fishers(first, second, SHARE)
    for name, block in mixed.items():
        q, p = block.shape
        total = (1 - SHARE) * first[name].to_dense() + SHARE * second[name].to_dense()
        rearranged = total.view(q, p, q, p).permute(0, 2, 1, 3).reshape(q * q, p * p)
        values = torch.linalg.svdvals(rearranged)
        error = torch.linalg.norm(block.to_dense() - total)
        torch.testing.assert_close(error, values[1], rtol=1e-6, atol=1e-10)


def test_mixture_in_an_eigenbasis_is_the_diagonal_in_the_second_basis():
    first, second = pair("ekfac")
    mixed = mix_fishers(first, second, SHARE)
    for name, block in mixed.items():
        basis = torch.kron(*(b.vectors[0].contiguous() for b in second[name].bases()))
        total = (1 - SHARE) * first[name].to_dense() + SHARE * second[name].to_dense()
        expected = basis @ (basis.T @ total @ basis).diagonal().diag() @ basis.T
        torch.testing.assert_close(block.to_dense(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "kfoc", "ekfac", "sua", "diagonal", "exact"])
def test_mixture_of_equals_is_the_same(estimator):
    first, _ = pair(estimator, "cnn")
    mixed = mix_fishers(first, first, SHARE)
    torch.testing.assert_close(mixed.to_dense(), first.to_dense(), rtol=1e-9, atol=1e-12)
    assert mix_fishers(first, first, 1.0) is first
    for name, block in mixed.items():
        assert block.shares_weights_over_space == first[name].shares_weights_over_space
