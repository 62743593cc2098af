"""Posteriors from every kind of block, in every kind of architecture, against dense computation in float64."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import kronlaplace as kl
from tests.support import oracles
from tests.support.assertions import assert_close
from tests.support.cases import case
from tests.support.networks import mlp
from tests.support.problems import NETWORKS as ALL_NETWORKS
from tests.support.problems import batches, estimate, problem

NETWORKS = ["cnn", "depthwise", "transformer", "lstm", "norms"]
ESTIMATORS = {
    "kfac": lambda: kl.KFAC(),
    "sua": lambda: kl.SUA(),
    "tkfac": lambda: kl.TKFAC(),
    "kfoc": lambda: kl.KFOC(aggregation="full"),
    "ekfac": lambda: kl.EKFAC(),
    "diagonal": lambda: kl.Diagonal(),
    "exact": lambda: kl.ExactBlock(),
}
KINDS = {
    "kfac": {"kronecker"},
    "sua": {"kronecker"},
    "tkfac": {"kronecker"},
    "kfoc": {"kronecker"},
    "ekfac": {"eigen"},
    "diagonal": {"diagonal"},
    "exact": {"dense"},
}
RTOL = 1e-8


@functools.cache
def jacobians(network, likelihood):
    """Of all examples by all blocks in their order, (N, C, P)."""
    made, _ = problem(network, likelihood)
    rows = [oracles.weight_gradients(made.model, oracles.example(made.inputs, n)) for n in range(len(made.targets))]
    return torch.stack([torch.cat([x.flatten(1) for x in row.values()], dim=1) for row in rows])


def matrix(model, block, values=None):
    """A block's ``W̄`` from the network's parameters, some of them replaced by ``values``."""
    values = {name: p.detach() for name, p in model.named_parameters()} | (values or {})
    columns = [values[name].reshape(block.q, -1) for name in block.parameters]
    names = [name.rpartition(".")[2] for name in block.parameters]
    if len(names) == 3:  # two biases, which act through their sum
        columns[2] = columns[2] + values[block.parameters[2].replace("bias_ih", "bias_hh")].reshape(block.q, -1)
    return torch.cat(columns, dim=1)


def posterior_of(network, name, likelihood="classification", **options):
    made, _ = problem(network, likelihood)
    posterior = kl.KronLaplace(made.model, likelihood, ESTIMATORS[name](), **options)
    return made, posterior.fit(batches(made))


def dense_precision(posterior, deltas):
    """``N/τ · F + diag(δ)`` from ``to_dense`` alone."""
    sizes = [math.prod(block.shape) for block in posterior.fisher.values()]
    prior = torch.cat([torch.full((n,), d, dtype=torch.float64) for n, d in zip(sizes, deltas, strict=True)])
    return posterior.fisher.to_dense() * posterior.fisher.n_examples / posterior.temperature + torch.diag(prior), prior


# -- against dense computation -------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_evidence_and_functional_variance_equal_dense(name, network, likelihood):
    made, _ = problem(network, likelihood)
    layers = list(oracles.blocks(made.model))
    deltas = [0.3 + 0.2 * i for i in range(len(layers))] if likelihood == "regression" else [0.4] * len(layers)
    made, posterior = posterior_of(
        network, name, likelihood, temperature=0.7, prior_precision=deltas if likelihood == "regression" else 0.4
    )
    assert {block.kind for block in posterior.fisher.values()} <= KINDS[name] | {"diagonal"}
    assert KINDS[name] <= {block.kind for block in posterior.fisher.values()}
    assert list(posterior.fisher) == layers
    precision, prior = dense_precision(posterior, deltas)

    theta = torch.cat([matrix(made.model, block).flatten() for block in oracles.blocks(made.model).values()])
    expected = (
        oracles.log_likelihood(made.model, made.inputs, made.targets, likelihood) / 0.7
        - 0.5 * (prior * theta**2).sum()
        - 0.5 * (torch.logdet(precision) - prior.log().sum())
    )
    torch.testing.assert_close(posterior.log_marginal_likelihood(), expected, rtol=RTOL, atol=0)

    j = jacobians(network, likelihood)
    expected = j @ torch.linalg.inv(precision) @ j.mT
    assert_close(posterior.functional_variance(made.inputs), expected, RTOL)
    diagonal = posterior.functional_variance(made.inputs, diagonal=True)
    torch.testing.assert_close(diagonal, expected.diagonal(dim1=1, dim2=2), rtol=RTOL, atol=1e-14)


@pytest.mark.quick(1, grid=20)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_functional_variance_does_not_depend_on_chunks(name, network, monkeypatch):
    made, posterior = posterior_of(network, name)
    whole = [posterior.functional_variance(made.inputs, diagonal) for diagonal in (False, True)]
    monkeypatch.setattr("kronlaplace.laplace.layer_covariance.BUDGET", 1)
    monkeypatch.setattr("kronlaplace.laplace.linearized._FIRST_CHUNK", 2)
    for expected, diagonal in zip(whole, (False, True), strict=True):
        assert_close(posterior.functional_variance(made.inputs, diagonal), expected, 1e-10)


@pytest.mark.quick(3, grid=20)
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.filterwarnings("ignore:the evidence is largest at the edge")
def test_tuning_finds_a_better_evidence(name, network, structure):
    """A random network with few data may want a precision at the edge of the range, layer by layer."""
    made, posterior = posterior_of(network, name, prior_precision=1e-3)
    before = posterior.log_marginal_likelihood()
    posterior.tune(structure=structure)
    assert posterior.log_marginal_likelihood() > before
    p = posterior.predict(made.inputs)
    torch.testing.assert_close(p.sum(1), torch.ones(len(p)).double())


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("network", "name"), [("depthwise", "kfac"), ("depthwise", "ekfac"), ("lstm", "kfoc"), ("norms", "exact")]
)
def test_covariance_of_samples_is_the_inverse_precision(network, name):
    """20,000 draws; every entry within six of its own standard errors, also between layers, where it is zero."""
    made, posterior = posterior_of(network, name, prior_precision=0.8)
    n, blocks = 20_000, oracles.blocks(made.model)
    draws = posterior.sample(n)
    frozen = {name: p.detach().expand(n, *p.shape) for name, p in made.model.named_parameters()}
    flat = []
    for block in blocks.values():
        columns = [{**frozen, **draws}[name].reshape(n, block.q, -1) for name in block.parameters]
        if len(columns) == 3:
            columns[2] = columns[2] + frozen[block.parameters[2].replace("bias_ih", "bias_hh")].reshape(n, block.q, 1)
        flat.append(torch.cat(columns, dim=2).flatten(1))
    flat = torch.cat(flat, dim=1)
    theta = torch.cat([matrix(made.model, block).flatten() for block in blocks.values()])
    expected = torch.linalg.inv(dense_precision(posterior, [0.8] * len(blocks))[0])
    variance = expected.diagonal()
    standard_error = torch.sqrt((torch.outer(variance, variance) + expected**2) / n)
    assert ((flat.T.cov() - expected).abs() / standard_error).max() < 6
    assert ((flat.mean(0) - theta).abs() / (variance / n).sqrt()).max() < 6


@pytest.mark.quick(3)
@pytest.mark.parametrize("network", NETWORKS)
def test_redundant_biases_stay(network):
    """Samples name the parameters that have a posterior, with their shapes; a second bias is not among them."""
    made, posterior = posterior_of(network, "kfac")
    draws = posterior.sample(2)
    shapes = {name: (2, *p.shape) for name, p in made.model.named_parameters() if "bias_hh" not in name}
    assert {name: tuple(draw.shape) for name, draw in draws.items()} == shapes
    posterior.prior_precision = 1e14
    for name, draw in posterior.sample(2).items():
        torch.testing.assert_close(draw[1], made.model.get_parameter(name).detach(), atol=1e-5, rtol=0)


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.quick(2, grid=20)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_posteriors_are_saved_and_loaded(name, network, tmp_path):
    made, posterior = posterior_of(network, name, temperature=0.7, prior_precision=0.3)
    posterior.save(tmp_path / "p")
    loaded = kl.KronLaplace.load(tmp_path / "p", made.model)
    assert [(b.kind, b.shape) for b in loaded.fisher.values()] == [(b.kind, b.shape) for b in posterior.fisher.values()]
    assert loaded.fisher.metadata == posterior.fisher.metadata
    assert torch.equal(loaded.log_marginal_likelihood(), posterior.log_marginal_likelihood())
    torch.testing.assert_close(
        loaded.functional_variance(made.inputs), posterior.functional_variance(made.inputs), rtol=1e-12, atol=1e-14
    )
    # Not bit by bit: tensors from a file lie elsewhere in memory, which matrix products may round by.
    for a, b in zip(loaded.sample(2).values(), posterior.sample(2).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("network", ALL_NETWORKS)
@pytest.mark.parametrize("name", ["kfac", "ekfac", "exact"])
def test_fishers_are_saved_and_loaded(name, network, tmp_path):
    made, _ = problem(network)
    fisher = estimate(made, ESTIMATORS[name]())
    fisher.save(tmp_path / "f")
    loaded = kl.KroneckerFisher.load(tmp_path / "f")
    assert loaded.metadata == fisher.metadata
    assert list(loaded) == list(fisher)
    for layer, block in fisher.items():
        assert type(loaded[layer]) is type(block)
        assert torch.equal(loaded[layer].to_dense(), block.to_dense())
        assert torch.equal(
            torch.as_tensor(getattr(loaded[layer], "scale", 0)), torch.as_tensor(getattr(block, "scale", 0))
        )
    posterior = kl.KronLaplace(made.model, made.likelihood).fit(fisher=loaded)
    expected = kl.KronLaplace(made.model, made.likelihood).fit(fisher=fisher)
    assert torch.equal(posterior.log_marginal_likelihood(), expected.log_marginal_likelihood())


# -- a predicted noise ---------------------------------------------------------------------------------------


def heteroscedastic(columns=2):
    made = mlp("regression", outputs=2 * columns)
    posterior = kl.KronLaplace(made.model, kl.HeteroscedasticGaussian())
    targets = torch.randn(len(made.inputs), columns).double()
    return made, targets, posterior.fit(list(zip(made.inputs.split(3), targets.split(3), strict=True)))


def outputs_and_variance(made, posterior):
    """Of the linearised model, dense."""
    j = torch.stack([oracles.jacobian(made.model, ["0", "2"], x) for x in made.inputs])
    precision, _ = dense_precision(posterior, [float(posterior.prior_precision)] * 2)
    return made.model(made.inputs).detach(), j @ torch.linalg.inv(precision) @ j.mT


@pytest.mark.parametrize("columns", [1, 2])
def test_predicted_noise_with_the_linearised_model(columns):
    made, _, posterior = heteroscedastic(columns)
    f, covariance = outputs_and_variance(made, posterior)
    assert_close(posterior.functional_variance(made.inputs), covariance, RTOL)
    variance = covariance.diagonal(dim1=1, dim2=2)
    prediction = posterior.predict(made.inputs)
    torch.testing.assert_close(prediction.mean, f[:, :columns])
    torch.testing.assert_close(prediction.variance, variance[:, :columns])
    torch.testing.assert_close(prediction.noise_variance, torch.exp(f[:, columns:] + variance[:, columns:] / 2))


@pytest.mark.grid
def test_predicted_noise_by_sampling():
    """A sharp posterior has the network's own outputs; a wide one agrees with the network at drawn weights."""
    made, _, posterior = heteroscedastic()
    f = made.model(made.inputs).detach()
    posterior.prior_precision = 1e12
    sharp = posterior.predict(made.inputs, method="sample", n_samples=4)
    torch.testing.assert_close(sharp.mean, f[:, :2], atol=1e-4, rtol=0)
    torch.testing.assert_close(sharp.noise_variance, f[:, 2:].exp(), atol=1e-4, rtol=1e-4)
    assert sharp.variance.max() < 1e-8
    posterior.prior_precision = 20.0
    n = 4000
    wide, draws = posterior.predict(made.inputs, method="sample", n_samples=n), posterior.sample(n, seed=1)
    runs = [functional_call(made.model, {k: v[i] for k, v in draws.items()}, (made.inputs,)) for i in range(n)]
    runs = torch.stack(runs).detach()
    mean, noise = runs[..., :2], runs[..., 2:].exp()
    for actual, draws in ((wide.mean, mean), (wide.noise_variance, noise)):
        assert ((actual - draws.mean(0)).abs() / (draws.var(0) * 2 / n).sqrt()).max() < 6
    torch.testing.assert_close(wide.variance, mean.var(0), rtol=0.25, atol=1e-6)


@pytest.mark.filterwarnings("ignore:the evidence is largest at the edge")
def test_predicted_noise_is_tuned_and_saved(tmp_path):
    """There is a prior precision to find, but no noise."""
    made, targets, posterior = heteroscedastic()
    precision, prior = dense_precision(posterior, [1.0, 1.0])
    theta = torch.cat([oracles.weight_matrix(made.model[i]).flatten() for i in (0, 2)])
    mean, log_variance = made.model(made.inputs).detach().chunk(2, dim=1)
    log_likelihood = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(targets).sum()
    expected = log_likelihood - 0.5 * (prior * theta**2).sum() - 0.5 * torch.logdet(precision)
    torch.testing.assert_close(posterior.log_marginal_likelihood(), expected, rtol=RTOL, atol=0)
    before = posterior.log_marginal_likelihood()
    assert posterior.tune().log_marginal_likelihood() >= before
    assert posterior.likelihood == kl.HeteroscedasticGaussian()
    posterior.save(tmp_path / "p")
    loaded = kl.KronLaplace.load(tmp_path / "p", made.model)
    assert torch.equal(loaded.predict(made.inputs).noise_variance, posterior.predict(made.inputs).noise_variance)


def test_predicted_noise_refuses_what_has_no_meaning():
    made, targets, posterior = heteroscedastic()
    with pytest.raises(ValueError, match="link='probit' would have no effect: HeteroscedasticGaussian"):
        posterior.predict(made.inputs, link="probit")
    with pytest.raises(ValueError, match="n_samples=5 would have no effect"):
        posterior.predict(made.inputs, n_samples=5)
    with pytest.raises(
        ValueError, match="noise_std only applies to the Gaussian likelihood; this posterior has Hetero"
    ):
        posterior.log_marginal_likelihood(noise_std=1.0)
    with pytest.raises(ValueError, match=r"batch 0: HeteroscedasticGaussian targets must have shape \(7, 2\)"):
        posterior.fit([(made.inputs, targets[:, :1])])
    odd = case(nn.Sequential(nn.Linear(4, 3)), torch.randn(4, 4), 3, "regression")
    with pytest.raises(ValueError, match=r"needs outputs of shape \(N, 2C\).*returned \(4, 3\)"):
        kl.KronLaplace(odd.model, "heteroscedastic").fit([odd.inputs])


# -- no noise model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_targets", [True, False])
def test_without_a_noise_model_there_is_a_variance_but_no_prediction(with_targets):
    made = mlp("regression")
    posterior = kl.KronLaplace(made.model, "euclidean")
    posterior.fit(made.batches() if with_targets else list(made.inputs.split(3)))
    _, covariance = outputs_and_variance(made, posterior)
    assert_close(posterior.functional_variance(made.inputs), covariance, RTOL)
    assert set(posterior.sample(1)) == {name for name, _ in made.model.named_parameters()}
    for call in (
        lambda: posterior.predict(made.inputs),
        lambda: posterior.predict(made.inputs, method="sample", n_samples=2),
        lambda: posterior.log_marginal_likelihood(),
        lambda: posterior.tune(),
    ):
        with pytest.raises(NotImplementedError, match=r"Euclidean has no noise model.*Gaussian\(noise_std"):
            call()


def test_euclidean_is_gaussian_with_unit_noise():
    made = mlp("regression")
    first, second = (kl.KronLaplace(made.model, name).fit(made.batches()) for name in ("euclidean", "regression"))
    assert_close(first.functional_variance(made.inputs), second.functional_variance(made.inputs), 1e-12)


def test_a_ready_made_fisher_brings_its_estimator():
    made, _ = problem("mlp")
    fisher = estimate(made, kl.TKFAC())
    posterior = kl.KronLaplace(made.model, made.likelihood, kl.KFAC()).fit(fisher=fisher)
    assert posterior.estimator == kl.TKFAC()
    posterior.fit(made.batches())
    assert posterior.fisher.metadata.estimator == "tkfac"
