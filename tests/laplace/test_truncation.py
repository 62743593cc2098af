"""Posteriors with truncated factors: everything agrees with the dense computation from the same blocks."""

import copy

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks import TruncatedBlock
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.predictor import Predictor
from tests.support.posteriors import (
    assert_like_dense,
    dense_precision,
    outputs_and_jacobians,
    problem,
    same,
    some_mean,
    some_prior,
)

SMALL = kl.Truncation(limit=3, rank=2)
TWO = kl.Truncation(limit=6, rank=3)
KINDS = ["mlp", "cnn", "lstm", "depthwise"]


def fitted(made, truncation=SMALL, estimator="kfac", **options):
    posterior = made.fitted(estimator, truncation=truncation, **options)
    assert any(isinstance(block, TruncatedBlock) for block in posterior.fisher.values())
    return posterior


@pytest.mark.parametrize("network", KINDS)
@pytest.mark.parametrize("truncation", [SMALL, TWO])
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_evidence_and_covariances_are_those_of_the_dense_precision(network, truncation, structure):
    made = problem(network, "classification")
    prior, D = some_prior(made, structure)
    mean, flat = some_mean(made, "flat")
    posterior = fitted(made, truncation, prior_precision=prior, prior_mean=mean, temperature=0.7)
    assert_like_dense(made, posterior, D, flat, outputs_and_jacobians(network, "classification")[1])


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "kfoc"])
def test_estimators_of_kronecker_products_are_truncated(estimator):
    made = problem("mlp", "classification")
    posterior = fitted(made, estimator=estimator)
    whole = made.fitted(estimator, truncation=None)
    torch.testing.assert_close(posterior.fisher.trace(), whole.fisher.trace(), rtol=1e-10, atol=0)
    assert posterior.log_marginal_likelihood() < whole.log_marginal_likelihood()


def test_other_estimators_keep_whole_bases():
    for estimator in ("ekfac", "diagonal", "exact"):
        posterior = problem("mlp", "classification").fitted(estimator, truncation=SMALL)
        assert not any(isinstance(block, TruncatedBlock) for block in posterior.fisher.values())


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("wanted", OutputCovariance)
def test_all_kinds_of_covariances(network, wanted):
    """From outputs' covariances of the dense precision, for differences between classes too."""
    made = problem(network, "classification")
    posterior = fitted(made, prior_precision=0.4)
    f, jacobians = outputs_and_jacobians(network, "classification")
    n, classes = f.shape
    prior = torch.full((jacobians.shape[2],), 0.4, dtype=torch.float64)
    rows = jacobians.flatten(0, 1)
    whole = rows @ torch.linalg.inv(dense_precision(posterior, prior)) @ rows.T
    blocks = torch.stack([whole[i * classes : (i + 1) * classes, i * classes : (i + 1) * classes] for i in range(n)])
    expected = {OutputCovariance.JOINT: whole, OutputCovariance.VARIANCES: blocks.diagonal(dim1=1, dim2=2)}
    eye = torch.eye(classes, dtype=torch.float64)
    centering = eye - 1 / classes
    expected[OutputCovariance.CENTERED_VARIANCES] = (centering @ blocks @ centering).diagonal(dim1=1, dim2=2)
    margins = eye - torch.nn.functional.one_hot(f.argmax(1), classes).double().unsqueeze(1)
    expected[OutputCovariance.MARGIN_VARIANCES] = (margins @ blocks @ margins.mT).diagonal(dim1=1, dim2=2)
    _, actual = Predictor(made.model, posterior._state).outputs_and_covariance(made.inputs, wanted)
    torch.testing.assert_close(actual, expected.get(wanted, blocks), rtol=1e-8, atol=1e-10)


class Positions(nn.Module):
    """A layer at three positions, whose factors are larger than that, and a wide last layer."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(7, 6)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        return self.last(self.shared(x).tanh().mean(1))


def positions():
    torch.manual_seed(0)
    model = Positions().double().eval()
    return model, torch.randn(9, 3, 7).double(), torch.randint(5, (9,))


@pytest.mark.parametrize("layers", [None, "last", ["shared"]])
def test_shared_weights_and_wide_last_layers_are_predicted_as_with_whole_bases(layers):
    """The truncated block, decomposed like any dense one, predicts the same."""
    model, x, y = positions()
    options = {"layers": layers, "prior_precision": 0.3}
    posterior = kl.KronLaplace(model, "classification", truncation=kl.Truncation(3, 2), **options).fit([(x, y)])
    blocks = {
        name: kl.KroneckerBlock(block.gradient_factor, block.activation_factor, block.scale, name)
        for name, block in posterior.fisher.items()
    }
    fisher = kl.KroneckerFisher(blocks, 9, posterior.fisher.metadata, posterior.fisher.statistics)
    whole = kl.KronLaplace(model, "classification", truncation=None, **options).fit(fisher=fisher)
    assert all(isinstance(block, TruncatedBlock) for block in posterior.fisher.values())
    for link in ("margin", "probit", "centered-probit", "bridge"):
        torch.testing.assert_close(posterior.predict(x, link=link), whole.predict(x, link=link), rtol=1e-9, atol=1e-10)
    for one in (True, False):
        torch.testing.assert_close(
            posterior.functional_variance(x, diagonal=one),
            whole.functional_variance(x, diagonal=one),
            rtol=1e-9,
            atol=1e-10,
        )
    torch.testing.assert_close(posterior.log_marginal_likelihood(), whole.log_marginal_likelihood(), rtol=1e-10, atol=0)
    for structure in ("scalar", "layerwise", "diagonal"):
        one, other = (copy.copy(p).tune(structure=structure, logit_scale="fixed") for p in (posterior, whole))
        torch.testing.assert_close(one.prior_precision.log(), other.prior_precision.log(), rtol=1e-4, atol=2e-2)


def test_draws_have_the_dense_covariance():
    made = problem("mlp", "classification")
    posterior = fitted(made, prior_precision=0.4)
    size = posterior.fisher.to_dense().shape[0]
    expected = torch.linalg.inv(dense_precision(posterior, torch.full((size,), 0.4, dtype=torch.float64)))
    inverses = posterior.covariance().values()
    roots = []
    for inverse in inverses:
        q, p = inverse.block.shape
        unit = torch.eye(q * p, dtype=torch.float64).view(q * p, q, p)
        roots.append(inverse.sqrt_solve(unit).flatten(1))
    root = torch.block_diag(*roots)
    torch.testing.assert_close(root @ root.T, expected, rtol=1e-8, atol=1e-10)


def test_the_evidence_is_differentiable():
    posterior = fitted(problem("mlp", "classification"))
    at = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: posterior.log_marginal_likelihood(prior_precision=p), at)


def test_files_hold_the_truncated_factors_and_the_choice(tmp_path):
    made = problem("mlp", "classification")
    posterior = fitted(made).tune()
    posterior.save(tmp_path / "posterior")
    loaded = kl.KronLaplace.load(tmp_path / "posterior", made.model)
    assert loaded.truncation == SMALL
    same(posterior, loaded, made)
    whole = made.fitted(truncation=None)
    whole.save(tmp_path / "whole")
    assert kl.KronLaplace.load(tmp_path / "whole", made.model).truncation is None


def test_a_posterior_moves_to_another_dtype():
    made = copy.deepcopy(problem("mlp", "classification"))
    posterior = fitted(made)
    expected = posterior.functional_variance(made.inputs)
    posterior.to(torch.float32)
    actual = posterior.functional_variance(made.inputs.float())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_ready_made_fisher_is_truncated_and_stays_as_it_is():
    made = problem("mlp", "classification")
    fisher = kl.estimate_fisher(made.model, made.data(), made.likelihood)
    posterior = made.posterior(truncation=SMALL).fit(fisher=fisher)
    same(posterior, fitted(made), made)
    assert not any(isinstance(block, TruncatedBlock) for block in fisher.values())
    rows = [row for row in posterior.fisher.coverage() if row.block == "truncated"]
    assert rows
    assert all("eigenpairs of" in row.note for row in rows)
    assert fisher.truncated(SMALL).to_dense().equal(posterior.fisher.to_dense())
    assert fisher.truncated() is fisher


def test_data_can_be_added():
    made = problem("mlp", "classification")
    posterior = made.posterior(truncation=SMALL).fit(made.data(0, 4)).fit(made.data(4), add=True)
    whole = made.fitted(truncation=None)
    assert posterior.fisher.n_examples == whole.fisher.n_examples
    torch.testing.assert_close(posterior.fisher.trace(), whole.fisher.trace(), rtol=1e-10, atol=0)


def test_the_posterior_as_prior_is_that_of_the_dense_blocks():
    """The next task's evidence and covariances, where the earlier precision is a truncated block plus the identity."""
    made = problem("mlp", "classification")
    prior = fitted(made).as_prior()
    posterior = made.posterior(truncation=SMALL, prior_precision=prior).fit(made.data())
    N = posterior.fisher.n_examples
    F = N * posterior.fisher.to_dense()
    precision = F + F + torch.eye(len(F), dtype=torch.float64)
    jacobians = outputs_and_jacobians("mlp", "classification")[1]
    expected = jacobians @ torch.linalg.inv(precision) @ jacobians.mT
    torch.testing.assert_close(posterior.functional_variance(made.inputs), expected, rtol=1e-7, atol=1e-9)
    logdet = sum(inverse.logdet() for inverse in posterior.covariance().values())
    torch.testing.assert_close(logdet, torch.logdet(precision), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior.logdet(), torch.logdet(precision - F), rtol=1e-9, atol=1e-9)


def test_variational_curvature_is_truncated_in_every_round():
    made = problem("mlp", "classification")
    posterior = made.posterior(truncation=SMALL)
    posterior.fit_variational(made.data(), rounds=2, tolerance=1e-6)
    assert any(isinstance(block, TruncatedBlock) for block in posterior.fisher.values())


def test_what_is_no_truncation_is_refused():
    with pytest.raises(
        TypeError, match=r"truncation must be a kl\.Truncation, such as kl\.Truncation\(rank=256\), or None"
    ):
        kl.KronLaplace(nn.Linear(2, 2), "classification", truncation=100)
