"""Output metrics against Hessians by autograd; predictive distributions against sampling."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.likelihoods import Likelihood, Sampling, resolve_likelihood
from kronlaplace.links import Link
from tests import oracles

LIKELIHOODS = {
    "classification": kl.Categorical(),
    "binary": kl.Bernoulli(),
    "regression": kl.Gaussian(noise_std=0.7),
}


def metric(likelihood, f, sampling, **options):
    directions = torch.stack(list(likelihood.directions(f, sampling, **options)))
    return torch.einsum("vni,vnj->nij", directions, directions)


@given(st.sampled_from(list(LIKELIHOODS)), st.integers(2, 6), st.floats(0.1, 30), st.integers(0, 1000))
def test_exact_directions_are_a_square_root_of_the_hessian(name, n_outputs, spread, seed):
    f = spread * torch.randn(4, n_outputs, generator=torch.Generator().manual_seed(seed)).double()
    actual = metric(LIKELIHOODS[name], f, Sampling.EXACT)
    expected = torch.stack([oracles.output_metric(name, row, noise_std=0.7) for row in f])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


def test_exact_categorical_directions_stay_finite_for_impossible_classes():
    f = torch.tensor([[0.0, -1e4, 3.0], [float("-inf"), 0.0, 0.0], [0.0, 0.0, float("-inf")]])
    actual = metric(kl.Categorical(), f, Sampling.EXACT)
    pi = f.softmax(1)
    torch.testing.assert_close(actual, torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("sampling", Sampling)
def test_number_of_directions_is_announced(name, sampling):
    likelihood, f = LIKELIHOODS[name], torch.randn(5, 4)
    targets = torch.zeros(5, dtype=torch.long) if name == "classification" else torch.zeros(5, 4)
    directions = list(likelihood.directions(f, sampling, mc_samples=7, targets=targets))
    assert len(directions) == likelihood.n_directions(4, sampling, 7)
    assert {d.shape for d in directions} == {f.shape}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_directions_have_the_metric_as_second_moment(name):
    """Tolerance: six standard errors of 40,000 draws of products of size about 1."""
    f = torch.tensor([[0.3, -1.0, 0.5]]).double()
    likelihood = LIKELIHOODS[name]
    generator = torch.Generator().manual_seed(0)
    actual = metric(likelihood, f.expand(40_000, 3), Sampling.MC, generator=generator).mean(0)
    largest = 2 / 0.7**2
    torch.testing.assert_close(actual, metric(likelihood, f, Sampling.EXACT)[0], rtol=0, atol=6 * largest / 200)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_statistics_give_the_log_likelihood_and_add_up(name):
    likelihood, f = LIKELIHOODS[name], torch.randn(6, 3).double()
    y = {"classification": torch.arange(6) % 3, "binary": (f > 0.2).double(), "regression": torch.randn(6, 3).double()}[
        name
    ]
    expected = -sum(oracles.negative_log_likelihood(name, fi, yi, 0.7) for fi, yi in zip(f, y, strict=True))
    parts = likelihood.statistics(f[:2], y[:2]) + likelihood.statistics(f[2:], y[2:])
    torch.testing.assert_close(likelihood.log_likelihood(parts), expected)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_metadata_round_trip(name):
    assert Likelihood.from_metadata(LIKELIHOODS[name].to_metadata()) == LIKELIHOODS[name]


def monte_carlo(f, covariance, inverse_link, n=400_000):
    """The integral itself, by sampling from torch's own multivariate normal."""
    normal = torch.distributions.MultivariateNormal(f, covariance)
    return torch.stack([inverse_link(chunk) for chunk in normal.sample((n,)).split(50_000)]).mean((0, 1))


@pytest.mark.parametrize(
    ("likelihood", "link", "tolerance"),
    [
        (kl.Categorical(), Link.MC, 0.005),
        (kl.Categorical(), Link.PROBIT, 0.05),
        (kl.Bernoulli(), Link.MC, 0.005),
        (kl.Bernoulli(), Link.PROBIT, 0.03),
    ],
)
def test_links_approximate_the_integral(likelihood, link, tolerance):
    """Sampling is right up to its error; the closed forms as well as their papers say (a few percent)."""
    f = torch.tensor([0.8, -0.4, 0.1]).double()
    root = torch.tensor([[1.0, 0, 0], [0.3, 0.8, 0], [-0.2, 0.1, 0.6]]).double()
    covariance = root @ root.T
    inverse_link = (lambda s: s.softmax(-1)) if isinstance(likelihood, kl.Categorical) else torch.sigmoid
    expected = monte_carlo(f, covariance, inverse_link)
    generator = torch.Generator().manual_seed(0)
    actual = likelihood.predictive(f[None], covariance[None], link, 100_000, generator)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_mc_link_uses_the_correlations():
    """Two logits that move together do not change which class wins; independent ones do."""
    f = torch.tensor([[2.0, 0.0]]).double()
    together = 9 * torch.ones(1, 2, 2).double()
    generator = torch.Generator().manual_seed(0)
    predictive = kl.Categorical().predictive
    torch.testing.assert_close(predictive(f, together, Link.MC, 1000, generator), f.softmax(1))
    apart = predictive(f, torch.full((1, 2), 9.0).double(), Link.MC, 1000, generator)
    assert apart[0, 0] < f.softmax(1)[0, 0] - 0.1


def test_laplace_bridge_equals_the_papers_formula():
    """Hobbhahn et al. 2022, after the projection on Σ f = 0 that conditioning gives; written with dense algebra."""
    f = torch.tensor([0.8, -0.4, 0.1]).double()
    root = torch.randn(3, 3).double()
    covariance = root @ root.T
    one = torch.ones(3).double()
    gain = covariance @ one / (one @ covariance @ one)
    mean, projected = f - gain * f.sum(), covariance - torch.outer(gain, one @ covariance)
    alpha = (1 - 2 / 3 + mean.exp() / 9 * (-mean).exp().sum()) / projected.diagonal()
    actual = kl.Categorical().predictive(f[None], covariance[None], Link.BRIDGE, 0, None)[0]
    torch.testing.assert_close(actual, alpha / alpha.sum())


@given(st.integers(2, 6), st.integers(0, 100))
def test_laplace_bridge_recovers_a_dirichlet(n_classes, seed):
    """The Laplace approximation of a Dirichlet in logit space (MacKay 1998) goes back to that very Dirichlet."""
    alpha = 0.5 + 20 * torch.rand(n_classes, generator=torch.Generator().manual_seed(seed)).double()
    f = alpha.log() - alpha.log().mean()
    inverse = 1 / alpha
    covariance = torch.diag(inverse) - (inverse[:, None] + inverse[None] - inverse.mean()) / n_classes
    actual = kl.Categorical().predictive(f[None], covariance[None], Link.BRIDGE, 0, None)[0]
    torch.testing.assert_close(actual, alpha / alpha.sum(), rtol=1e-6, atol=1e-9)


def test_gaussian_predictive_keeps_function_and_noise_apart():
    prediction = kl.Gaussian(noise_std=0.5).predictive(
        torch.zeros(2, 1), torch.full((2, 1, 1), 3.0), Link.PROBIT, 0, None
    )
    assert prediction.variance.tolist() == [[3.0], [3.0]]
    assert prediction.noise_variance == 0.25
    assert prediction.total_variance.tolist() == [[3.25], [3.25]]


@pytest.mark.parametrize("noise_std", [0, -1.0, math.inf, math.nan, "large", None])
def test_noise_must_be_positive(noise_std):
    with pytest.raises(ValueError, match="noise_std must be a positive finite number, got"):
        kl.Gaussian(noise_std=noise_std)


def test_shorthands():
    assert resolve_likelihood("binary") == kl.Bernoulli()
    with pytest.raises(ValueError, match="unknown likelihood 'softmax'; the shorthands are 'classification'"):
        resolve_likelihood("softmax")
    with pytest.raises(TypeError, match="with parentheses"):
        resolve_likelihood(kl.Categorical)
