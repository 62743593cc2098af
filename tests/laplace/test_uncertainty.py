"""The parts of uncertainty against numerical integrals, dense draws, and the definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from kronlaplace.likelihoods.logistic import binary_entropy, logistic_moments
from tests.support.output_shapes import outputs_and_covariance, problem, within

# -- the integrals -------------------------------------------------------------------------------------------


def entropy(f):
    return special.expit(f) * np.logaddexp(0, -f) + special.expit(-f) * np.logaddexp(0, f)


def by_quadpack(function, mean, std):
    def integrand(f):
        return function(f) * math.exp(-0.5 * ((f - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))

    low, high = mean - 12 * std, mean + 12 * std
    edges = sorted({low, high, *(x for x in (mean, 0.0, -8.0, 8.0, -45.0, 45.0) if low < x < high)})
    return sum(
        integrate.quad(integrand, a, b, epsabs=1e-14, epsrel=1e-13, limit=400)[0] for a, b in itertools.pairwise(edges)
    )


@pytest.mark.parametrize("std", [1e-3, 0.1, 0.7, 1.0, 1.0001, 2.0, 5.0, 30.0, 300.0])
@pytest.mark.parametrize("mean", [0.0, 0.4, -3.0, 11.0, 60.0])
def test_moments_of_a_gaussian_logit_equal_adaptive_quadrature(mean, std):
    p, h = logistic_moments(torch.tensor([mean], dtype=torch.float64), torch.tensor([std**2], dtype=torch.float64))
    assert float(p) == pytest.approx(by_quadpack(special.expit, mean, std), abs=2e-13)
    assert float(h) == pytest.approx(by_quadpack(entropy, mean, std), abs=2e-13)


@given(st.floats(-1e3, 1e3), st.floats(0, 1e6))
def test_moments_of_a_gaussian_logit_obey_their_laws(mean, variance):
    """Symmetry, Jensen's inequality, and nothing out of range."""
    m, v = torch.tensor([mean, -mean], dtype=torch.float64), torch.full((2,), variance, dtype=torch.float64)
    p, h = logistic_moments(m, v)
    assert float(p.sum()) == pytest.approx(1, abs=1e-13)
    assert float(h[0]) == pytest.approx(float(h[1]), abs=1e-13)
    assert 0 <= float(h[0]) <= float(torch.special.entr(p).sum()) + 1e-13


def test_without_variance_the_moments_are_those_of_the_logit():
    f = torch.tensor([-50.0, -1.0, 0.0, 2.0, 30.0]).double()
    p, h = logistic_moments(f, torch.zeros(5))
    torch.testing.assert_close(p, torch.sigmoid(f), rtol=1e-13, atol=0)
    torch.testing.assert_close(h, binary_entropy(f), rtol=1e-13, atol=0)
    np.testing.assert_allclose(binary_entropy(f), entropy(f.numpy()), rtol=1e-13)


# -- classification ------------------------------------------------------------------------------------------


def parts_of(probabilities, axis):
    """Mean entropy and mutual information of draws of probabilities, (n, ...)."""

    def total(p):
        terms = torch.special.entr(p)
        return terms + torch.special.entr(1 - p) if axis is None else terms.sum(axis)

    aleatoric = total(probabilities).mean(0)
    return aleatoric, total(probabilities.mean(0, keepdim=True))[0] - aleatoric


@pytest.mark.parametrize("diagonal", [False, True])
def test_several_classes_equal_dense_draws(diagonal):
    """Within the statistical error of both."""
    made = problem("mlp")
    posterior = made.fitted(prior_precision=0.3)
    f, covariance = outputs_and_covariance(made, posterior)
    covariance = within(covariance)
    if diagonal:
        covariance = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    n = 20_000
    torch.manual_seed(1)
    draws = torch.distributions.MultivariateNormal(f, covariance).sample((n,))
    aleatoric, epistemic = parts_of(torch.softmax(draws, -1), -1)
    found = posterior.uncertainty(made.inputs, n_samples=n, diagonal=diagonal)
    error = torch.special.entr(torch.softmax(draws, -1)).sum(-1).std(0) * math.sqrt(2 / n)
    assert found.in_nats
    assert len(found) == len(f)
    assert ((found.aleatoric - aleatoric).abs() < 5 * error).all()
    assert ((found.epistemic - epistemic).abs() < 5 * error).all()
    assert (found.epistemic > 10 * error).all()
    assert found.mutual_information is found.epistemic


@pytest.mark.parametrize("network", ["mlp", "tokens", "segmentation"])
def test_the_total_is_the_entropy_of_the_prediction(network):
    made = problem(network)
    posterior = made.fitted(prior_precision=0.5)
    found = posterior.uncertainty(made.inputs, n_samples=50, seed=3)
    p = posterior.predict(made.inputs, link="mc", n_samples=50, seed=3)
    axis = 1 if network == "segmentation" else -1
    assert found.total.shape == made.targets.shape
    torch.testing.assert_close(found.total, torch.special.entr(p).sum(axis))
    assert (found.epistemic >= 0).all()


@pytest.mark.parametrize("network", ["mlp", "cnn", "single-tokens", "segmentation", "flat"])
def test_binary_outputs_equal_adaptive_quadrature(network):
    made = problem(network, "binary")
    posterior = made.fitted(prior_precision=0.5)
    f, covariance = outputs_and_covariance(made, posterior)
    std = within(covariance).diagonal(dim1=1, dim2=2).sqrt()
    found = posterior.uncertainty(made.inputs)
    assert found.total.shape == made.targets.shape
    for k in (0, f.numel() // 2, f.numel() - 1):
        mean, s = float(f.flatten()[k]), float(std.flatten()[k])
        p = by_quadpack(special.expit, mean, s)
        assert float(found.aleatoric.flatten()[k]) == pytest.approx(by_quadpack(entropy, mean, s), abs=1e-8)
        assert float(found.total.flatten()[k]) == pytest.approx(special.entr(p) + special.entr(1 - p), abs=1e-8)


@pytest.mark.parametrize("diagonal", [False, True])
def test_two_classes_are_one_logit(diagonal):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2).double().eval()
    x, y = torch.randn(9, 4).double(), torch.arange(9) % 2
    posterior = kl.KronLaplace(model, "classification").fit([(x, y)])
    covariance = posterior.functional_variance(x)
    shared = 0 if diagonal else 2 * covariance[:, 0, 1]
    std = (covariance[:, 0, 0] + covariance[:, 1, 1] - shared).sqrt()
    f = model(x).detach()
    found = posterior.uncertainty(x, diagonal=diagonal)
    expected = [by_quadpack(entropy, *pair) for pair in zip((f[:, 1] - f[:, 0]).tolist(), std.tolist(), strict=True)]
    np.testing.assert_allclose(found.aleatoric, expected, atol=1e-10)


@pytest.mark.parametrize(("network", "likelihood"), [("mlp", "classification"), ("tokens", "classification")])
@pytest.mark.parametrize("antithetic", [False, True])
def test_sampled_weights_follow_the_definition(network, likelihood, antithetic):
    made = problem(network, likelihood)
    posterior = made.fitted(prior_precision=0.5)
    found = posterior.uncertainty(made.inputs, method="sample", n_samples=20, seed=4, antithetic=antithetic)
    if not antithetic:
        p = posterior.draw(made.inputs, 20, method="sample", seed=4).predictions
        aleatoric, epistemic = parts_of(p, -1)
        torch.testing.assert_close(found.aleatoric, aleatoric)
        torch.testing.assert_close(found.epistemic, epistemic)
    p = posterior.predict(made.inputs, method="sample", n_samples=20, seed=4, antithetic=antithetic)
    torch.testing.assert_close(found.total, torch.special.entr(p).sum(-1))


def test_sampled_binary_outputs_follow_the_definition():
    made = problem("mlp", "binary")
    posterior = made.fitted(prior_precision=0.5)
    found = posterior.uncertainty(made.inputs, method="sample", n_samples=20, seed=4)
    aleatoric, epistemic = parts_of(posterior.draw(made.inputs, 20, method="sample", seed=4).predictions, None)
    torch.testing.assert_close(found.aleatoric, aleatoric)
    torch.testing.assert_close(found.epistemic, epistemic)


class OwnBinary(kl.Likelihood):
    """A Bernoulli that is not the package's: its expectations are taken by draws."""

    check_targets = kl.Bernoulli.check_targets
    statistics = kl.Bernoulli.statistics
    log_likelihood = kl.Bernoulli.log_likelihood
    _exact_directions = kl.Bernoulli._exact_directions
    _sampled_direction = kl.Bernoulli._sampled_direction
    _gradient = kl.Bernoulli._gradient
    predictive = kl.Bernoulli.predictive
    predictive_nll = kl.Bernoulli.predictive_nll
    sample_mean = kl.Bernoulli.sample_mean


@pytest.mark.parametrize("network", ["mlp", "flat"])
def test_own_likelihoods_are_drawn(network):
    made = problem(network, "binary")
    exact = made.fitted(prior_precision=0.5).uncertainty(made.inputs)
    own = kl.KronLaplace(made.model, OwnBinary(), prior_precision=0.5).fit(made.data())
    drawn = own.uncertainty(made.inputs, n_samples=20_000)
    torch.testing.assert_close(drawn.aleatoric, exact.aleatoric, rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.epistemic, exact.epistemic, rtol=0, atol=0.01)


# -- regression ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"method": "sample", "n_samples": 10}])
@pytest.mark.parametrize("likelihood", ["regression", "heteroscedastic"])
def test_regression_has_the_variances_of_the_prediction(likelihood, options):
    made = problem("mlp", likelihood)
    posterior = made.fitted(prior_precision=0.5)
    found, prediction = posterior.uncertainty(made.inputs, **options), posterior.predict(made.inputs, **options)
    assert not found.in_nats
    torch.testing.assert_close(found.epistemic, prediction.variance)
    torch.testing.assert_close(found.aleatoric, prediction.noise_variance.expand_as(prediction.mean))
    torch.testing.assert_close(found.total, prediction.total_variance)
    entropies = [torch.distributions.Normal(0, v.sqrt()).entropy() for v in (found.total, found.aleatoric)]
    torch.testing.assert_close(found.mutual_information, entropies[0] - entropies[1])


# -- laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["glm", "sample"])
@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression", "heteroscedastic"])
def test_a_certain_posterior_has_no_epistemic_part(likelihood, method):
    made = problem("mlp", likelihood)
    certain = made.fitted(prior_precision=1e14).uncertainty(made.inputs, method=method)
    uncertain = made.fitted(prior_precision=1.0).uncertainty(made.inputs, method=method)
    assert float(certain.epistemic.max()) < 1e-10
    assert float(uncertain.epistemic.min()) > 1e-4
    for found in (certain, uncertain):
        assert torch.equal(found.total, found.aleatoric + found.epistemic)
        assert (found.epistemic >= 0).all()
    p = made.model(made.inputs)
    if likelihood == "classification":
        torch.testing.assert_close(certain.total, torch.distributions.Categorical(logits=p).entropy())
    if likelihood == "binary":
        torch.testing.assert_close(certain.total, torch.distributions.Bernoulli(logits=p).entropy())


def test_loaders_half_precision_and_text():
    made = problem("mlp", "binary")
    posterior, x = made.fitted(), made.inputs
    loader = DataLoader(TensorDataset(x), batch_size=3)
    torch.testing.assert_close(posterior.uncertainty(loader).epistemic, posterior.uncertainty(x).epistemic)
    assert repr(posterior.uncertainty(x)).startswith("Uncertainty(shape (7, 4), nats; means: total 0.")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).to(torch.bfloat16).eval()
    x = torch.randn(6, 4, dtype=torch.bfloat16)
    half = kl.KronLaplace(model, "classification").fit([(x, torch.arange(6) % 3)])
    for method in ("glm", "sample"):
        assert half.uncertainty(x, method=method).total.dtype == torch.float32


def test_refusals():
    made = problem("mlp", "binary")
    posterior, x = made.fitted(), made.inputs
    with pytest.raises(ValueError, match="n_samples=9 would have no effect"):
        posterior.uncertainty(x, n_samples=9)
    with pytest.raises(ValueError, match="diagonal=True would have no effect"):
        posterior.uncertainty(x, diagonal=True)
    with pytest.raises(ValueError, match="antithetic=True would have no effect"):
        posterior.uncertainty(x, antithetic=True)
    with pytest.raises(ValueError, match="unknown method"):
        posterior.uncertainty(x, method="linear")
    with pytest.raises(TypeError, match="here it is diagonal="):
        posterior.uncertainty(x, diagonal_output=True)
