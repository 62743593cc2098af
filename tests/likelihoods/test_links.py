"""Links against sampling, position by position, and the Laplace bridge against its formulas."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.likelihoods.links import Link


def monte_carlo(f, covariance, inverse_link, n=400_000):
    """The integral itself, by sampling from torch's own multivariate normal."""
    normal = torch.distributions.MultivariateNormal(f, covariance)
    return torch.stack([inverse_link(chunk) for chunk in normal.sample((n,)).split(50_000)]).mean((0, 1))


@pytest.mark.parametrize(
    ("likelihood", "link", "tolerance"),
    [
        (kl.Categorical(), Link.MC, 0.005),
        (kl.Categorical(), Link.PROBIT, 0.05),
        (kl.Categorical(), Link.MARGIN, 0.05),
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


def contrasts(f):
    """The matrix that takes from every logit that of the most probable class."""
    n_classes = len(f)
    matrix = torch.eye(n_classes, dtype=torch.float64)
    matrix[:, int(f.argmax())] -= 1
    return matrix


@given(st.integers(2, 8), st.integers(1, 8), st.floats(-3, 4), st.integers(0, 1000))
def test_margin_link_applies_mackay_to_the_margins(n_classes, rank, log_scale, seed):
    """Against the dense covariance of all margins, however singular; shifts of all logits by anything change nothing."""
    generator = torch.Generator().manual_seed(seed)
    f = 3 * torch.randn(n_classes, generator=generator).double()
    root = torch.randn(n_classes, rank, generator=generator).double()
    covariance = 10**log_scale * root @ root.T
    A = contrasts(f)
    variances = (A @ covariance @ A.T).diagonal()
    expected = (A @ f / (1 + math.pi / 8 * variances).sqrt()).softmax(0)
    for shift in (0, 7 * covariance.diagonal().mean()):
        moved = (f + shift / 3)[None], (covariance + shift)[None]
        torch.testing.assert_close(kl.Categorical().predictive(*moved, Link.MARGIN, 0, None)[0], expected)
    actual = kl.Categorical().predictive(f[None], variances[None], Link.MARGIN, 0, None)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    assert actual.argmax() == f.argmax()
    odds = actual / (actual + actual.max())  # of every class against the most probable: MacKay's
    one_against_one = kl.Bernoulli().predictive(A @ f, variances, Link.PROBIT, 0, None)
    torch.testing.assert_close(odds, one_against_one, rtol=1e-12, atol=0)


@pytest.mark.parametrize("leading", [(5,), (2, 3)], ids=str)
def test_margin_link_of_two_classes_is_the_probit_link_of_their_difference(leading):
    mean, covariance = gaussians(leading, n_outputs=2)
    actual = kl.Categorical().predictive(mean, covariance, Link.MARGIN, 0, None)[..., 1]
    difference = torch.tensor([-1.0, 1.0]).double()
    variance = difference @ covariance @ difference
    expected = kl.Bernoulli().predictive(mean @ difference, variance, Link.PROBIT, 0, None)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_margin_link_goes_from_the_softmax_to_the_uniform_distribution():
    mean, covariance = gaussians((5,), n_outputs=4)
    for scale, expected, difference in ((0, mean.softmax(1), 1e-14), (1e-8, mean.softmax(1), 1e-6), (1e14, 0.25, 1e-5)):
        actual = kl.Categorical().predictive(mean, scale * covariance, Link.MARGIN, 0, None)
        torch.testing.assert_close(actual, torch.ones_like(mean) * expected, rtol=difference, atol=0)


def test_margin_link_of_equal_logits():
    """Whichever of them counts as the most probable, the two have the same probability."""
    f, covariance = torch.tensor([[1.0, 3.0, 3.0]]).double(), gaussians((1,))[1]
    p = kl.Categorical().predictive(f, covariance, Link.MARGIN, 0, None)[0]
    assert p[1] == p[2] > p[0]


def bridge(f, covariance):
    return kl.Categorical().predictive(f[None], covariance[None], Link.BRIDGE, 0, None)[0]


def zero_sum(n_classes, seed):
    """A mean and a covariance without a common shift, whose variances a Dirichlet could have."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(n_classes, generator=generator).double()
    projection = torch.eye(n_classes).double() - 1 / n_classes
    root = torch.eye(n_classes).double() + 0.3 * torch.randn(n_classes, n_classes, generator=generator).double()
    return f - f.mean(), projection @ root @ root.T @ projection


@pytest.mark.parametrize("n_classes", [3, 4, 10])
def test_laplace_bridge_has_the_papers_formula_as_its_limit_of_large_variances(n_classes):
    f, covariance = zero_sum(n_classes, 0)
    variance = covariance.diagonal()
    alpha = (1 - 2 / n_classes + f.exp() / n_classes**2 * (-f).exp().sum()) / variance
    torch.testing.assert_close(bridge(f, 1e9 * covariance), alpha / alpha.sum(), rtol=1e-6, atol=0)
    # In between, the logarithm of what it makes of the softmax is tempered.
    concentration, tempered = (alpha / f.softmax(0)).log(), (bridge(f, covariance) / f.softmax(0)).log()
    weight = math.pi / 8 * variance.mean() / (1 + math.pi / 8 * variance.mean())
    ratio = (tempered - tempered.mean()) / (concentration - concentration.mean())
    torch.testing.assert_close(ratio, weight.expand(n_classes))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_classes", [2, 3, 10, 1000])
def test_laplace_bridge_of_a_certain_network_is_its_softmax(n_classes, dtype, whole):
    generator = torch.Generator().manual_seed(0)
    f = 5 * torch.randn(4, n_classes, generator=generator, dtype=dtype)
    root = torch.randn(4, n_classes, 2, generator=generator, dtype=dtype)
    covariance = root @ root.mT if whole else root.square().sum(-1)
    rounding = 200 * torch.finfo(dtype).eps  # of logits up to 20
    for scale, difference in ((0, rounding), (1e-8, rounding + 1e-6), (1e-3, 0.05)):
        actual = kl.Categorical().predictive(f, scale * covariance, Link.BRIDGE, 0, None)
        torch.testing.assert_close(actual, f.softmax(1), rtol=difference, atol=0)


@given(st.integers(2, 12), st.integers(1, 12), st.floats(-8, 4), st.integers(0, 1000))
def test_laplace_bridge_does_not_depend_on_rounding(n_classes, rank, log_scale, seed):
    """Small relative changes of the covariance make small changes, however singular it is; so do shifts of all logits."""
    generator = torch.Generator().manual_seed(seed)
    f = 3 * torch.randn(n_classes, generator=generator).double()
    root = torch.randn(n_classes, rank, generator=generator).double()
    covariance = 10**log_scale * root @ root.T
    noise = torch.randn(n_classes, n_classes, generator=generator).double()
    changed = covariance * (1 + 1e-9 * (noise + noise.T))
    expected = bridge(f, covariance)
    torch.testing.assert_close(bridge(f, changed), expected, rtol=1e-6, atol=0)
    shifted = covariance + covariance.diagonal().mean()
    torch.testing.assert_close(bridge(f + 7, shifted), expected, rtol=1e-6, atol=0)


@given(st.integers(2, 6), st.integers(0, 100))
def test_laplace_bridge_recovers_a_dirichlet(n_classes, seed):
    """The Laplace approximation of a Dirichlet in logit space (MacKay 1998) goes back to that very Dirichlet."""
    alpha = 0.5 + 20 * torch.rand(n_classes, generator=torch.Generator().manual_seed(seed)).double()
    f = alpha.log() - alpha.log().mean()
    inverse = 1 / alpha
    covariance = torch.diag(inverse) - (inverse[:, None] + inverse[None] - inverse.mean()) / n_classes
    actual = kl.Categorical().predictive(f[None], covariance[None], Link.BRIDGE, 0, None)[0]
    torch.testing.assert_close(actual, alpha / alpha.sum(), rtol=1e-6, atol=1e-9)


LEADING = [(), (5,), (2, 3), (2, 1, 3, 2)]


PREDICTING = [
    (kl.Categorical(), Link.MARGIN),
    (kl.Categorical(), Link.PROBIT),
    (kl.Categorical(), Link.BRIDGE),
    (kl.Categorical(), Link.MC),
    (kl.Bernoulli(), Link.PROBIT),
    (kl.Bernoulli(), Link.MC),
    (kl.Gaussian(noise_std=0.5), Link.PROBIT),
]


def gaussians(leading, n_outputs=3, whole=True):
    """Means and covariances, another at every position; as many positions on an axis as outputs, to confuse axes."""
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(*leading, n_outputs, generator=generator).double()
    root = torch.randn(*leading, n_outputs, n_outputs, generator=generator).double()
    covariance = root @ root.mT
    return mean, covariance if whole else covariance.diagonal(dim1=-2, dim2=-1)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize(("likelihood", "link"), [case for case in PREDICTING if case[1] is not Link.MC])
def test_predictive_goes_position_by_position(likelihood, link, leading, whole):
    mean, covariance = gaussians(leading, whole=whole)
    actual = likelihood.predictive(mean, covariance, link, 0, None)
    parts = [actual.mean, actual.variance] if isinstance(actual, kl.Prediction) else [actual]
    for position in itertools.product(*map(range, leading)):
        one = likelihood.predictive(mean[position][None], covariance[position][None], link, 0, None)
        expected = [one.mean, one.variance] if isinstance(one, kl.Prediction) else [one]
        for a, b in zip(parts, expected, strict=True):
            assert a.shape == mean.shape
            torch.testing.assert_close(a[position], b[0])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("likelihood", [kl.Categorical(), kl.Bernoulli()], ids=str)
def test_mc_link_goes_position_by_position(likelihood, leading, whole):
    """Tolerance: six standard errors of both averages; a probability has a standard deviation of at most 1/2."""
    n = 20_000
    mean, covariance = gaussians(leading, whole=whole)
    actual = likelihood.predictive(mean, covariance, Link.MC, n, torch.Generator().manual_seed(0))
    assert actual.shape == mean.shape
    inverse_link = (lambda s: s.softmax(-1)) if isinstance(likelihood, kl.Categorical) else torch.sigmoid
    for position in itertools.product(*map(range, leading)):
        full = covariance[position] if whole else torch.diag(covariance[position])
        torch.manual_seed(0)
        samples = torch.distributions.MultivariateNormal(mean[position], full).sample((n,))
        torch.testing.assert_close(
            actual[position], inverse_link(samples).mean(0), rtol=0, atol=6 * 0.5 * math.sqrt(2 / n)
        )


@pytest.mark.parametrize("likelihood", [kl.Bernoulli(), kl.Gaussian()], ids=str)
def test_variances_of_outputs_that_are_no_columns(likelihood):
    """Of a network that returns (N,)."""
    mean, variance = torch.randn(5).double(), torch.rand(5).double()
    flat = likelihood.predictive(mean, variance, Link.PROBIT, 0, None)
    column = likelihood.predictive(mean[:, None], variance[:, None], Link.PROBIT, 0, None)
    if isinstance(flat, kl.Prediction):
        flat, column = flat.total_variance, column.total_variance
    torch.testing.assert_close(flat, column[:, 0])


@pytest.mark.parametrize(
    ("mean", "covariance"),
    [
        ((5, 3), (5,)),
        ((5, 3), (5, 1)),
        ((5, 3), (3, 3)),
        ((5, 3), (5, 3, 4)),
        ((5, 3), (1, 3, 3)),
        ((2, 5, 3), (5, 3, 3)),
        ((), (1,)),
    ],
)
@pytest.mark.parametrize(("likelihood", "link"), PREDICTING)
def test_covariance_of_a_shape_that_does_not_fit(likelihood, link, mean, covariance):
    with pytest.raises(ValueError, match=r"covariance of outputs with a mean of shape .* must have shape .*; got"):
        likelihood.predictive(torch.zeros(mean), torch.zeros(covariance), link, 10, None)
