"""Every estimator against its slow definition on every network, and the laws that hold between estimators."""

import functools

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.assertions import assert_blocks_are, assert_close
from tests.support.estimators import BASES, KRONECKER, TOLERANCE
from tests.support.problems import NETWORKS, estimate, problem

pytestmark = pytest.mark.filterwarnings("ignore:sampling=.empirical.")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", KRONECKER)
def test_kronecker_estimator_equals_its_definition(name, network):
    make, rule = KRONECKER[name]
    made, data = problem(network)
    fisher = estimate(made, make())
    assert fisher.n_examples == len(made.targets)
    assert_blocks_are(fisher, data, functools.partial(oracles.block_dense, rule), TOLERANCE.get(name, 1e-10))


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["kfac", "kfac-reduce", "tkfac", "tkfac-uncorrelated"])
def test_each_factor_equals_its_definition(name, network):
    """With the scale where it belongs: K-FAC's is 1, TKFAC's factors have unit traces."""
    make, rule = KRONECKER[name]
    made, data = problem(network)
    fisher = estimate(made, make())
    for layer, d in data.items():
        if d.block.diagonal or not all(group.X.any() for group in d.groups):  # no direction to normalise by
            continue
        expected = [rule(group) for group in d.groups]
        scale, G, A = (torch.stack([torch.as_tensor(e[i]).double() for e in expected]) for i in range(3))
        block = fisher[layer]
        if d.block.groups == 1:
            assert_close(torch.as_tensor(block.scale).reshape(1), scale, 1e-10, layer)
            G, A = G[0], A[0]
        assert_close(block.gradient_factor, G, 1e-10, layer)
        assert_close(block.activation_factor, A, 1e-10, layer)


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", NETWORKS)
def test_sua_equals_theorem_4(network):
    """On linear layers that are used once and on convolutions that are used once, with zero padding."""
    made, data = problem(network)
    fisher = estimate(made, kl.SUA())
    for name, d in data.items():
        if d.block.convolution and d.groups[0].images is None:
            continue
        if d.block.diagonal or (not d.block.convolution and d.groups[0].a.shape[1] > 1):
            continue
        assert_close(fisher[name].to_dense(), oracles.block_dense(oracles.sua, d), 1e-10, name)
        if d.block.groups == 1:
            scale, G, A = oracles.sua(d.groups[0])
            assert_close(fisher[name].activation_factor, A, 1e-10, name)
            assert_close(fisher[name].gradient_factor, G, 1e-10, name)
            assert_close(fisher[name].scale, scale, 1e-10, name)


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("basis", BASES)
def test_ekfac_equals_its_definition(basis, network):
    make, rule = KRONECKER[basis]
    made, data = problem(network)
    fisher = estimate(made, kl.EKFAC(basis=make()))

    def dense(d):
        return torch.block_diag(*(oracles.ekfac(group, *rule(group)[1:]) for group in d.groups))

    assert_blocks_are(fisher, data, dense, 1e-9)


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "lstm", "reused"])
@pytest.mark.parametrize("aggregation", ["full", "sweeps"])
def test_ekfac_uses_the_eigenbasis_of_any_kronecker_estimator(aggregation, network):
    """Of the same factors: those of K-FOC are converged to less than its eigenvectors would show."""
    made, data = problem(network)
    basis = kl.KFOC(aggregation=aggregation)
    factors = estimate(made, basis)
    fisher = estimate(made, kl.EKFAC(basis=basis))
    for name, d in data.items():
        if d.block.diagonal:
            continue
        G, A = (
            f.reshape(d.block.groups, *f.shape[-2:])
            for f in (factors[name].gradient_factor, factors[name].activation_factor)
        )
        expected = torch.block_diag(*(oracles.ekfac(*triple) for triple in zip(d.groups, G, A, strict=True)))
        assert_close(fisher[name].to_dense(), expected, 1e-8, name)


@pytest.mark.quick(3)
@pytest.mark.parametrize("network", NETWORKS)
def test_diagonal_equals_its_definition(network):
    made, data = problem(network)
    assert_blocks_are(estimate(made, kl.Diagonal()), data, lambda d: oracles.diagonal(d.X))


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", NETWORKS)
def test_exact_block_equals_its_definition(network):
    """Also where a Kronecker block is block diagonal over groups, or diagonal: this one is the ground truth."""
    made, data = problem(network)
    fisher = estimate(made, kl.ExactBlock())
    assert list(fisher) == list(data)
    for name, d in data.items():
        if d.block.diagonal and isinstance(made.model.get_submodule(name), nn.Embedding):
            assert_close(fisher[name].to_dense().diagonal(), oracles.diagonal(d.X).diagonal(), 1e-10, name)
        else:
            assert_close(fisher[name].to_dense(), oracles.exact_block(d.X), 1e-10, name)


@pytest.mark.quick(1)
@pytest.mark.parametrize("likelihood", ["binary", "regression"])
@pytest.mark.parametrize("network", ["mlp", "depthwise", "lstm", "segmentation"])
@pytest.mark.parametrize("name", ["kfac", "kfac-reduce", "tkfac", "tkfac-uncorrelated"])
def test_other_likelihoods(name, network, likelihood):
    make, rule = KRONECKER[name]
    made, data = problem(network, likelihood)
    assert_blocks_are(estimate(made, make()), data, functools.partial(oracles.block_dense, rule))


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "segmentation", "transformer", "gru", "tied"])
@pytest.mark.parametrize("name", KRONECKER)
def test_empirical_sampling_uses_the_gradients_of_the_labels(name, network):
    make, rule = KRONECKER[name]
    made, data = problem(network, empirical=True)
    fisher = estimate(made, make(), sampling="empirical")
    assert_blocks_are(fisher, data, functools.partial(oracles.block_dense, rule), TOLERANCE.get(name, 1e-10))
