"""Targets: what the statistics keep of them, which are ignored, which are refused."""

import math

import pytest
import torch
import torch.nn.functional as F

import kronlaplace as kl
from kronlaplace.likelihoods import Euclidean, HeteroscedasticGaussian, Sampling, resolve_likelihood
from tests.support.likelihoods import CATEGORICAL, cases, draw, log_prob, make


@cases
def test_statistics_give_the_log_likelihood_and_add_up(name, shape):
    likelihood, (f, y) = make(name), draw(name, shape)
    parts = [likelihood.statistics(f[:2], y[:2]), likelihood.statistics(f[2:], y[2:])]
    assert all(part.shape == (2,) and part.dtype == torch.float64 for part in parts)
    torch.testing.assert_close(likelihood.log_likelihood(parts[0] + parts[1]), log_prob(name, f, y))
    counted = (y != -100).sum() if name in CATEGORICAL else y.numel()
    assert (parts[0] + parts[1])[1] == counted


def test_ignored_targets_count_for_nothing():
    f, y = torch.randn(4, 3), torch.full((4,), -100)
    assert kl.Categorical().statistics(f, y).tolist() == [0, 0]


@pytest.mark.parametrize("ignore_index", [255, -1, 0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8])
def test_another_ignore_index(ignore_index, dtype):
    """Also one of the classes, as a padding token is; and masks in uint8, where -100 is 156 to a comparison."""
    if not torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        return
    likelihood = kl.Categorical(ignore_index=ignore_index)
    f = torch.randn(5, 200, 2, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0, 1], [ignore_index, 2], [99, 7], [100, 0], [3, ignore_index]]).to(dtype)
    assert likelihood.check_targets(f, y)[0]
    expected = F.cross_entropy(f, y.long(), ignore_index=ignore_index, reduction="sum")
    actual = likelihood.log_likelihood(likelihood.statistics(f.detach(), y))
    torch.testing.assert_close(-actual, expected.detach())
    (direction,) = likelihood.directions(f.detach(), Sampling.EMPIRICAL, targets=y)
    torch.testing.assert_close(direction, torch.autograd.grad(expected, f)[0])


def test_unsigned_labels_are_not_taken_for_ignored_ones():
    f, y = torch.randn(1, 200), torch.tensor([156], dtype=torch.uint8)
    assert kl.Categorical().statistics(f, y)[1] == 1


@cases
def test_allowed_targets_are_let_through(name, shape):
    f, y = draw(name, shape)
    make(name).check_outputs(f)
    allowed, _ = make(name).check_targets(f, y)
    assert allowed.shape == () and allowed.dtype == torch.bool and allowed


@pytest.mark.parametrize(
    ("name", "shape", "value", "message"),
    [
        ("classes", (3, 4), 4, r"labels must lie in 0 … 3 for a network with 4 outputs.*value -100 are ignored"),
        ("classes", (3, 4), -1, r"labels must lie in 0 … 3"),
        ("pixels", (3, 4, 2), 4, r"labels must lie in 0 … 3"),
        ("tokens", (3, 2, 4), 4, r"labels must lie in 0 … 3"),
        ("bernoulli", (3, 2, 4), 1.01, "must lie between 0 and 1"),
        ("bernoulli", (3,), math.nan, "must lie between 0 and 1"),
        ("gaussian", (3, 2, 4), math.nan, "NaN or infinite"),
        ("euclidean", (3, 2), math.inf, "NaN or infinite"),
        ("heteroscedastic", (3, 4), math.nan, "NaN or infinite"),
    ],
)
def test_targets_of_values_that_are_not_allowed(name, shape, value, message):
    f, y = draw(name, shape)
    y[(-1,) * y.ndim] = value
    allowed, text = make(name).check_targets(f, y)
    assert not allowed
    with pytest.raises(ValueError, match=message):
        raise ValueError(text)


@pytest.mark.parametrize("name", ["classification", "binary", "regression", "euclidean", "heteroscedastic"])
def test_empirical_needs_targets(name):
    with pytest.raises(ValueError, match='sampling="empirical" needs the targets in the data, but none were given'):
        next(resolve_likelihood(name).directions(torch.randn(3, 2), Sampling.EMPIRICAL))


@pytest.mark.parametrize(
    ("likelihood", "shape", "message"),
    [
        (kl.Bernoulli(), (), r"Bernoulli needs outputs with the examples on the first axis.*a single number"),
        (kl.Gaussian(), (), r"Gaussian needs outputs with the examples"),
        (Euclidean(), (), r"Euclidean needs outputs with the examples"),
        (kl.Categorical(), (), r"Categorical needs one logit per class.*returned \(\)"),
        (kl.Categorical(), (6,), r"Categorical needs one logit per class.*returned \(6,\).*use Bernoulli"),
        (kl.Categorical(), (6, 1), r"returned \(6, 1\).*use Bernoulli"),
        (kl.Categorical(), (6, 1, 1), r"returned \(6, 1, 1\)"),
        (kl.Categorical(class_axis=1), (6, 1, 3), r"Categorical with class_axis=1 needs.*returned \(6, 1, 3\)"),
        (kl.Categorical(class_axis=-1), (6, 3, 1), r"Categorical with class_axis=-1 needs.*returned \(6, 3, 1\)"),
        (kl.Categorical(class_axis=2), (6, 3, 1), r"Categorical with class_axis=2 needs.*returned \(6, 3, 1\)"),
        (kl.Categorical(class_axis=2), (6, 3), r"class_axis=2 is not the last axis of outputs of shape \(6, 3\)"),
        (kl.Categorical(class_axis=3), (6, 3, 2), r"class_axis=3 is not the last axis.*\(class_axis=1\).*=-1\)"),
        (kl.Categorical(class_axis=2), (6, 3, 2, 2), r"class_axis=2 is not the last axis"),
        (kl.Categorical(class_axis=2), (6,), r"Categorical with class_axis=2 needs.*returned \(6,\)"),
        (HeteroscedasticGaussian(), (6,), r"needs outputs of shape \(N, 2C\).*returned \(6,\).*two outputs per target"),
        (HeteroscedasticGaussian(), (6, 3), r"returned \(6, 3\).*use Gaussian\(noise_std=...\)"),
        (HeteroscedasticGaussian(), (6, 0), r"returned \(6, 0\)"),
        (HeteroscedasticGaussian(), (6, 2, 2), r"returned \(6, 2, 2\)"),
    ],
)
def test_outputs_that_do_not_fit(likelihood, shape, message):
    with pytest.raises(ValueError, match=message):
        likelihood.check_outputs(torch.zeros(shape))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "message"),
    [
        (kl.Categorical(), (6, 3), (6, 1), r"indices of shape \(6,\) .*got shape \(6, 1\).*targets\.squeeze\(1\)"),
        (kl.Categorical(), (6, 3), (6, 3), r"targets\.argmax\(1\) if yours are one-hot"),
        (
            kl.Categorical(),
            (6, 3, 2),
            (6, 3, 2),
            r"shape \(6, 2\) \(classes on axis 1\) or \(6, 3\) \(classes on axis 2\).*got shape \(6, 3, 2\)",
        ),
        (kl.Categorical(), (6, 3, 2, 2), (6, 3), r"shape \(6, 2, 2\) .* or \(6, 3, 2\)"),
        (kl.Categorical(class_axis=1), (6, 3, 2), (6, 3), r"shape \(6, 2\) .*and class_axis=1; got shape \(6, 3\)"),
        (
            kl.Categorical(class_axis=-1),
            (6, 3, 2),
            (6, 2),
            r"shape \(6, 3\) .*and class_axis=-1; got.*one target for each",
        ),
        (kl.Categorical(), (6, 1, 3), (6, 3), r"needs one logit per class.*returned \(6, 1, 3\)"),
        (kl.Bernoulli(), (6, 3, 2), (6, 6), r"Bernoulli targets must have the shape.*\(6, 3, 2\).*broadcasting"),
        (kl.Gaussian(), (6,), (6, 1), r"Gaussian targets must have the shape.*\(6,\); got \(6, 1\).*broadcasting"),
        (Euclidean(), (6, 3), (6, 2), r"Euclidean targets must have the shape.*\(6, 3\); got \(6, 2\)"),
        (HeteroscedasticGaussian(), (6, 4), (6, 4), r"must have shape \(6, 2\) for outputs.*\(6, 4\).*got \(6, 4\)"),
        (HeteroscedasticGaussian(), (6, 2), (6, 2), r"must have shape \(6, 1\) or \(6,\)"),
        (HeteroscedasticGaussian(), (6, 4), (6,), r"must have shape \(6, 2\)"),
    ],
)
def test_targets_of_a_shape_that_does_not_fit(likelihood, outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        likelihood.check_targets(torch.zeros(outputs), torch.zeros(targets, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2)])
def test_class_indices_must_be_integers(dtype, shape):
    targets = torch.zeros((6, *shape[2:]), dtype=dtype)
    with pytest.raises(ValueError, match=f"must be integer class indices.*dtype {dtype}"):
        kl.Categorical().check_targets(torch.zeros(shape), targets)


@pytest.mark.parametrize("class_axis", [0, -2, -3, True, 1.0, "last"])
def test_class_axis_must_be_first_or_last(class_axis):
    with pytest.raises(ValueError, match=r"class_axis must be 1 for outputs.*, -1 for.*or None to infer.*got"):
        kl.Categorical(class_axis=class_axis)


@pytest.mark.parametrize("ignore_index", [None, 1.0, True, "255"])
def test_ignore_index_must_be_an_integer(ignore_index):
    with pytest.raises(TypeError, match="ignore_index must be an integer, such as -100, got"):
        kl.Categorical(ignore_index=ignore_index)


def test_one_target_may_come_without_a_column():
    likelihood, (f, y) = HeteroscedasticGaussian(), draw("heteroscedastic", (5, 2))
    assert likelihood.check_targets(f, y[:, 0])[0]
    torch.testing.assert_close(likelihood.statistics(f, y[:, 0]), likelihood.statistics(f, y))
    (with_column,) = likelihood.directions(f, Sampling.EMPIRICAL, targets=y)
    (without,) = likelihood.directions(f, Sampling.EMPIRICAL, targets=y[:, 0])
    torch.testing.assert_close(without, with_column)
