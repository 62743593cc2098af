"""Densities of targets under predictions; means and variances of what a likelihood predicts."""

import math

import pytest
import torch

import kronlaplace as kl
from kronlaplace.likelihoods import HeteroscedasticGaussian, Sampling
from kronlaplace.likelihoods.links import Link
from tests.support.likelihoods import CASES, CATEGORICAL, NOISE, class_axis, draw, make


def prediction(name, f):
    """Of the kind and shape that `predictive` gives, with a function variance that differs by element."""
    if name in CATEGORICAL:
        return f.softmax(class_axis(name, f.shape))
    if name == "bernoulli":
        return f.sigmoid()
    mean, log_variance = f.tensor_split(2, dim=1) if name == "heteroscedastic" else (f, None)
    variance = torch.linspace(0.1, 3, mean.numel()).reshape(mean.shape).to(f)
    noise = f.new_tensor(NOISE**2) if log_variance is None else log_variance.exp()
    return kl.Prediction(mean, variance, noise)


PREDICTIVE_CASES = [case for case in CASES if case[0] != "euclidean"]


predictive_cases = pytest.mark.parametrize(
    ("name", "shape"), PREDICTIVE_CASES, ids=lambda value: str(value).replace(" ", "")
)


def part_of(predicted, part):
    if isinstance(predicted, torch.Tensor):
        return predicted[part]
    noise = predicted.noise_variance
    return kl.Prediction(predicted.mean[part], predicted.variance[part], noise[part] if noise.ndim else noise)


@predictive_cases
def test_predictive_nll_is_the_density_of_the_targets(name, shape):
    """By torch.distributions, and additive over batches."""
    f, y = draw(name, shape)
    predicted, likelihood = prediction(name, f), make(name)
    if name in CATEGORICAL:
        kept = y != -100
        moved = predicted.movedim(class_axis(name, shape), -1)
        expected = -torch.distributions.Categorical(probs=moved[kept]).log_prob(y[kept]).sum()
        count = kept.sum()
    elif name == "bernoulli":  # the mean of the log-density over a label that is one with probability y
        bernoulli = torch.distributions.Bernoulli(probs=predicted)
        one, zero = bernoulli.log_prob(torch.ones_like(y)), bernoulli.log_prob(torch.zeros_like(y))
        expected, count = -(y * one + (1 - y) * zero).sum(), y.numel()
    else:
        std = (predicted.variance + predicted.noise_variance).sqrt()
        expected, count = -torch.distributions.Normal(predicted.mean, std).log_prob(y).sum(), y.numel()
    parts = [likelihood.predictive_nll(part_of(predicted, s), y[s]) for s in (slice(2), slice(2, None))]
    assert all(part.shape == (2,) and part.dtype == torch.float64 for part in parts)
    torch.testing.assert_close(parts[0] + parts[1], torch.stack([expected, torch.as_tensor(count).double()]))


@predictive_cases
def test_gradient_of_the_predictive_nll(name, shape):
    """Without uncertainty of the function it is the network's own loss, whose gradient is the empirical direction."""
    f, y = draw(name, shape)
    f.requires_grad_()
    predicted = prediction(name, f)
    if isinstance(predicted, kl.Prediction):
        predicted = kl.Prediction(predicted.mean, torch.zeros_like(predicted.mean), predicted.noise_variance)
    nll = make(name).predictive_nll(predicted, y)
    torch.testing.assert_close(nll, make(name).statistics(f, y)) if name != "gaussian" else None
    (actual,) = torch.autograd.grad(nll[0], f)
    (expected,) = make(name).directions(f.detach(), Sampling.EMPIRICAL, targets=y)
    torch.testing.assert_close(actual, expected)


@predictive_cases
def test_predictive_nll_depends_on_no_values(name, shape):
    """On torch's meta device there are none."""
    f, y = draw(name, shape)
    predicted = prediction(name, f.to("meta"))
    assert make(name).predictive_nll(predicted, y.to("meta")).shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_impossible_targets_do_not_make_the_predictive_nll_infinite(dtype):
    tiny = -math.log(torch.finfo(dtype).tiny)
    classes = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]], dtype=dtype)
    actual = kl.Categorical().predictive_nll(classes, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(actual, torch.tensor([tiny + math.log(2), 3]).double())
    ones = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5], dtype=dtype)
    actual = kl.Bernoulli().predictive_nll(ones, torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(actual, torch.tensor([2 * tiny + math.log(2), 5]).double())


def test_ignored_targets_do_not_count_in_the_predictive_nll():
    """Not even where nothing sensible is predicted."""
    pi = torch.tensor([[0.25, 0.75], [math.nan, math.nan]])
    actual = kl.Categorical(ignore_index=255).predictive_nll(pi, torch.tensor([0, 255], dtype=torch.uint8))
    torch.testing.assert_close(actual, torch.tensor([math.log(4), 1]).double())


def test_predictive_nll_of_one_target_without_a_column():
    f, y = draw("heteroscedastic", (5, 2))
    likelihood, predicted = HeteroscedasticGaussian(), prediction("heteroscedastic", f)
    torch.testing.assert_close(
        likelihood.predictive_nll(predicted, y[:, 0]), likelihood.predictive_nll(predicted, y), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "message"),
    [
        ("classes", (6, 4), (6, 1), r"indices of shape \(6,\) .*got shape \(6, 1\)"),
        ("tokens", (6, 2, 4), (6, 4), r"indices of shape \(6, 2\) .*got shape \(6, 4\)"),
        ("bernoulli", (6, 2), (6,), r"Bernoulli targets must have the shape.*\(6, 2\); got \(6,\)"),
        ("gaussian", (6, 1), (6,), r"Gaussian targets must have the shape.*\(6, 1\); got \(6,\)"),
        ("heteroscedastic", (6, 4), (6,), r"must have shape \(6, 2\) for outputs of shape \(6, 4\).*got \(6,\)"),
        ("heteroscedastic", (6, 2), (6, 2), r"must have shape \(6, 1\) or \(6,\)"),
    ],
)
def test_predictive_nll_compares_each_prediction_with_its_own_target(name, outputs, targets, message):
    predicted = prediction(name, torch.zeros(outputs))
    with pytest.raises(ValueError, match=message):
        make(name).predictive_nll(predicted, torch.zeros(targets, dtype=torch.long))


@pytest.mark.parametrize("name", ["classes", "bernoulli", "gaussian", "heteroscedastic"])
def test_predictive_nll_of_another_kind_of_prediction(name):
    y = torch.zeros(5, dtype=torch.long)
    if name in ("classes", "bernoulli"):
        wrong, message = kl.Prediction(y, y, y), "predicts probabilities, a tensor.*got a Prediction"
    else:
        wrong, message = torch.zeros(5, 1), "predicts a Prediction, with mean and variance; got a Tensor"
    with pytest.raises(TypeError, match=message):
        make(name).predictive_nll(wrong, y)


def test_gaussian_predictive_keeps_function_and_noise_apart():
    prediction = kl.Gaussian(noise_std=0.5).predictive(
        torch.zeros(2, 1), torch.full((2, 1, 1), 3.0), Link.PROBIT, 0, None
    )
    assert prediction.variance.tolist() == [[3.0], [3.0]]
    assert prediction.noise_variance == 0.25
    assert prediction.total_variance.tolist() == [[3.25], [3.25]]


@pytest.mark.parametrize("whole", [True, False])
def test_predicted_noise_is_averaged_over_its_own_uncertainty(whole):
    """Against draws of the outputs and then of the targets: total variance, and its two parts."""
    mean = torch.tensor([[0.5, -2.0, 0.3, -1.0]]).double()
    root = torch.tensor([[0.6, 0, 0, 0], [0.1, 0.9, 0, 0], [0.2, 0, 0.5, 0], [0, -0.3, 0.1, 0.4]]).double()
    covariance = root @ root.T
    given = covariance[None] if whole else covariance.diagonal()[None]
    prediction = HeteroscedasticGaussian().predictive(mean, given, Link.PROBIT, 0, None)
    f = torch.distributions.MultivariateNormal(mean[0], covariance).sample((400_000,))
    noise = (0.5 * f[:, 2:]).exp() * torch.randn(400_000, 2).double()
    assert prediction.mean.shape == prediction.variance.shape == prediction.noise_variance.shape == (1, 2)
    torch.testing.assert_close(prediction.mean, mean[:, :2])
    torch.testing.assert_close(prediction.variance[0], f[:, :2].var(0), rtol=0.02, atol=0)
    torch.testing.assert_close(prediction.noise_variance[0], noise.var(0), rtol=0.02, atol=0)
    torch.testing.assert_close(prediction.total_variance[0], (f[:, :2] + noise).var(0), rtol=0.02, atol=0)
