"""An estimator of one's own goes wherever ours go."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.accumulations import NETWORKS, accumulated, assert_same, average
from tests.support.assertions import assert_close
from tests.support.cases import case
from tests.support.estimators import CONVERGED, White
from tests.support.problems import batches, estimate, problem


@pytest.mark.quick(3)
@pytest.mark.parametrize("network", NETWORKS)
def test_an_estimator_of_ones_own(network):
    made, data = problem(network)
    fisher = estimate(made, White())
    for layer, d in data.items():
        expected = oracles.exact_block(d.X).trace() / fisher[layer].to_dense().shape[0]
        assert_close(fisher[layer].to_dense(), expected * torch.eye(fisher[layer].to_dense().shape[0]).double(), 1e-10)
    first, *rest = batches(made, 1)
    one = accumulated(made, White(), [first])
    one.merge(accumulated(made, White(), rest))
    assert_same(one.finish(), fisher)
    assert_same(average(made, White(), batches(made), decay=1), fisher)
    assert fisher.metadata.estimator == "white"
    assert {row.estimator for row in fisher.coverage()} == {"white"}


def test_an_estimator_of_ones_own_as_a_basis_and_in_a_posterior():
    made, _ = problem("mlp")
    posterior = kl.KronLaplace(made.model, made.likelihood, White()).fit(batches(made)).tune()
    assert torch.isfinite(posterior.functional_variance(made.inputs)).all()
    errors = kl.relative_error(posterior.fisher, made.model, batches(made))
    assert all(0 < error < 1 for error in errors.values())


def test_a_posterior_with_an_estimator_of_ones_own_is_saved_and_loaded(tmp_path):
    made, _ = problem("mlp")
    posterior = kl.KronLaplace(made.model, made.likelihood, White()).fit(batches(made))
    posterior.save(tmp_path / "p")
    loaded = kl.KronLaplace.load(tmp_path / "p", made.model)
    assert torch.equal(loaded.log_marginal_likelihood(), posterior.log_marginal_likelihood())


def test_layers_without_factors_get_a_diagonal_block_beside_it():
    """Unless it says that it suits them."""

    @dataclass(frozen=True)
    class Factors(White):
        for_any_layer: ClassVar[bool] = False

    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    made = case(model, torch.randn(5, 3), 2)
    fisher = estimate(made, Factors())
    diagonal = estimate(made, kl.Diagonal())
    assert_close(fisher["1"].to_dense(), diagonal["1"].to_dense(), 1e-12)
    assert [row.estimator for row in fisher.coverage()] == ["white", "diagonal", "white"]


def test_a_list_that_does_not_say_how_it_decays():
    @dataclass(frozen=True)
    class Lists(White):
        def start(self, layer):
            return {**super().start(layer), "seen": []}

    made, _ = problem("mlp")
    estimate(made, Lists())
    with pytest.raises(AssertionError, match="Lists must define how its 'seen' decays"):
        average(made, Lists(), batches(made))


@pytest.mark.quick(1)
@pytest.mark.parametrize("lengths", [(2, 30), (30, 2), (1, 2), (30, 2, 30)])
def test_batches_of_sequences_of_different_lengths(lengths):
    """K-FOC keeps short sequences as pairs and long ones as products; both together are the nearest Kronecker product."""

    class Averaged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Linear(6, 5)
            self.out = torch.nn.Linear(5, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.token(x)).mean(1))

    torch.manual_seed(0)
    model = Averaged().double()
    data = [(torch.randn(4, length, 6).double(), torch.randint(2, (4,))) for length in lengths]
    full = kl.estimate_fisher(model, data, "classification", kl.KFOC(aggregation="full", **CONVERGED))
    swept = kl.estimate_fisher(model, data, "classification", kl.KFOC(sweeps=40))
    for name in full:
        torch.testing.assert_close(full[name].to_dense(), swept[name].to_dense(), rtol=1e-7, atol=1e-10)
