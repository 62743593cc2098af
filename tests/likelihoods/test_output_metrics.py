"""Output metrics against Hessians by autograd; predictive distributions against sampling."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.likelihoods import Euclidean, HeteroscedasticGaussian, Likelihood, Sampling, resolve_likelihood
from kronlaplace.likelihoods.links import Link
from tests.support.likelihoods import (
    CASES,
    CATEGORICAL,
    cases,
    class_axis,
    draw,
    expected_metric,
    hessians,
    loss,
    make,
    metric,
)


@pytest.mark.quick(5)
@cases
@given(seed=st.integers(0, 1000), spread=st.floats(0.1, 30))
def test_exact_directions_are_a_square_root_of_the_hessian(name, shape, seed, spread):
    if name == "heteroscedastic":
        spread = min(spread, 3.0)  # a log-variance
    f, y = draw(name, shape, seed, spread)
    actual = metric(make(name), f, Sampling.EXACT, targets=y)
    torch.testing.assert_close(actual, expected_metric(name, f, y), rtol=1e-9, atol=1e-13)


@cases
def test_the_diagonal_of_the_metric_is_the_sum_of_the_squares_of_the_directions(name, shape):
    f, y = draw(name, shape, 1, 1.0)
    likelihood = make(name)
    expected = sum(d.square() for d in likelihood.directions(f, Sampling.EXACT, targets=y))
    torch.testing.assert_close(likelihood.metric_diagonal(f, y), expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(Likelihood._metric_diagonal(likelihood, f, y), expected, rtol=1e-9, atol=1e-13)


def test_fisher_of_a_predicted_noise_in_closed_form():
    """Lehmann and Casella: the information on (μ, σ²) is diag(1/σ², 1/(2σ⁴)); dσ²/ds is σ²."""
    variance = torch.tensor([0.3, 2.0]).double()
    f = torch.cat([torch.tensor([5.0, -1.0]).double(), variance.log()])[None]
    expected = torch.diag(torch.cat([1 / variance, variance**2 / (2 * variance**2)]))
    torch.testing.assert_close(metric(HeteroscedasticGaussian(), f, Sampling.EXACT)[0], expected)


@pytest.mark.parametrize(("name", "shape"), [("pixels", (3, 4, 2)), ("tokens", (3, 2, 4)), ("classes", (3, 4))])
def test_without_targets_nothing_is_ignored(name, shape):
    f, _ = draw(name, shape)
    labels = torch.zeros(f.select(class_axis(name, shape), 0).shape, dtype=torch.long)
    torch.testing.assert_close(metric(make(name), f, Sampling.EXACT), hessians(name, f, labels))
    assert all((d != 0).all() for d in make(name).directions(f, Sampling.MC, mc_samples=2))


def test_exact_categorical_directions_stay_finite_for_impossible_classes():
    f = torch.tensor([[0.0, -1e4, 3.0], [float("-inf"), 0.0, 0.0], [0.0, 0.0, float("-inf")]])
    actual = metric(kl.Categorical(), f, Sampling.EXACT)
    pi = f.softmax(1)
    torch.testing.assert_close(actual, torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "shape"), [("pixels", (3, 4, 2, 3)), ("tokens", (3, 2, 4))])
def test_exact_directions_are_at_one_position_each(name, shape):
    """And come lazily: the first of them without the others."""
    f, _ = draw(name, shape)
    axis = class_axis(name, shape)
    directions = make(name).directions(f, Sampling.EXACT)
    assert iter(directions) is directions
    touched = [(d != 0).any(axis).reshape(3, -1).nonzero()[:, 1].unique().tolist() for d in directions]
    positions = f[0].numel() // 4
    assert touched == [[p] for p in range(positions) for _ in range(3)]


@cases
@pytest.mark.parametrize("sampling", Sampling)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_number_shape_and_dtype_of_directions_are_announced(name, shape, sampling, dtype):
    f, y = draw(name, shape)
    f = f.to(dtype)
    directions = list(make(name).directions(f, sampling, mc_samples=7, targets=y))
    assert len(directions) == make(name).n_directions(f, sampling, 7, y)
    assert {(d.shape, d.dtype) for d in directions} == {(f.shape, dtype)}


@pytest.mark.parametrize(
    ("likelihood", "shape", "count"),
    [
        (kl.Bernoulli(), (5,), 1),
        (kl.Gaussian(), (5, 4), 4),
        (Euclidean(), (5, 2, 3), 6),
        (HeteroscedasticGaussian(), (5, 6), 6),
        (kl.Categorical(), (5, 4), 3),
        (kl.Categorical(), (5, 4, 2, 3), 18),
        (kl.Categorical(class_axis=1), (5, 4, 2), 6),
        (kl.Categorical(class_axis=-1), (5, 4, 2), 4),
        (kl.Categorical(class_axis=-1), (5, 2, 3, 4), 18),
    ],
)
def test_number_of_directions_without_targets(likelihood, shape, count):
    f = torch.randn(shape)
    assert [likelihood.n_directions(f, sampling, 7) for sampling in Sampling] == [count, 7, 1]
    assert sum(1 for _ in likelihood.directions(f, Sampling.EXACT)) == count


@pytest.mark.quick(3)
@cases
def test_sampled_directions_have_the_metric_as_second_moment(name, shape):
    """Tolerance: six standard errors of the mean of 40,000 draws, from the draws themselves."""
    f, y = draw(name, shape)
    f, y, n = f[1:2], y[1:2], 40_000
    generator = torch.Generator().manual_seed(0)
    many_f, many_y = f.expand(n, *f.shape[1:]), y.expand(n, *y.shape[1:])
    draws = metric(make(name), many_f, Sampling.MC, generator=generator, targets=many_y)
    bound = 6 * draws.std(0) / math.sqrt(n) + 1e-12
    assert ((draws.mean(0) - expected_metric(name, f, y)[0]).abs() <= bound).all()


@cases
def test_several_draws_share_the_weight(name, shape):
    f, y = draw(name, shape)
    several, one = (
        list(make(name).directions(f, Sampling.MC, mc_samples=m, targets=y, generator=torch.Generator().manual_seed(3)))
        for m in (4, 1)
    )
    torch.testing.assert_close(2 * several[0], one[0])
    assert name in CATEGORICAL or not torch.equal(several[0], several[1])


def gumbel_gradient(f, generator):
    noise = -torch.log(-torch.log(torch.rand(f.shape, generator=generator, dtype=f.dtype)))
    return f.softmax(1) - F.one_hot((f + noise).argmax(1), f.shape[1])


REFERENCE_DRAWS = {
    "classification": gumbel_gradient,
    "binary": lambda f, g: f.sigmoid() - (torch.rand(f.shape, generator=g, dtype=f.dtype) < f.sigmoid()).to(f.dtype),
    "regression": lambda f, g: torch.randn(f.shape, generator=g, dtype=f.dtype) / 1.0,
}


@pytest.mark.parametrize("name", REFERENCE_DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_targets", [False, True])
def test_draws_for_a_generator_never_change(name, dtype, with_targets):
    """Bit for bit: a seed of an earlier version gives the same Fisher."""
    f = torch.randn(50, 7, dtype=dtype)
    targets = None
    if with_targets:
        targets = torch.zeros(50, dtype=torch.long) if name == "classification" else torch.zeros(50, 7)
    ours, reference = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    options = {"mc_samples": 3, "generator": ours, "targets": targets}
    for direction in resolve_likelihood(name).directions(f, Sampling.MC, **options):
        assert torch.equal(direction, REFERENCE_DRAWS[name](f, reference) / math.sqrt(3))


@cases
def test_empirical_direction_is_the_gradient_of_torchs_loss(name, shape):
    f, y = draw(name, shape)
    f.requires_grad_()
    axis = class_axis(name, shape) if name in CATEGORICAL else None
    (expected,) = torch.autograd.grad(loss(name, f, y, axis), f)
    (actual,) = make(name).directions(f.detach(), Sampling.EMPIRICAL, targets=y)
    torch.testing.assert_close(actual, expected)


@cases
@pytest.mark.parametrize("sampling", Sampling)
def test_ignored_positions_have_no_direction(name, shape, sampling):
    if name not in CATEGORICAL:
        return
    f, y = draw(name, shape)
    # Not even where the network says nothing sensible.
    f[0] = math.nan
    axis = class_axis(name, shape)
    ignored = (y == -100).unsqueeze(axis).expand(shape)
    for direction in make(name).directions(f, sampling, targets=y, generator=torch.Generator().manual_seed(0)):
        assert (direction[ignored] == 0).all()
        assert direction.isfinite().all()


@cases
@pytest.mark.parametrize("sampling", Sampling)
def test_nothing_depends_on_values(name, shape, sampling):
    """On torch's meta device there are none: whatever would wait for an accelerator raises."""
    f, y = (t.to("meta") for t in draw(name, shape))
    likelihood = make(name)
    likelihood.check_outputs(f)
    assert likelihood.check_targets(f, y)[0].is_meta
    assert likelihood.statistics(f, y).shape == (2,)
    directions = list(likelihood.directions(f, sampling, mc_samples=2, targets=y))
    assert {(d.shape, d.device.type) for d in directions} == {(f.shape, "meta")}


@pytest.mark.parametrize(
    "likelihood",
    [
        *map(make, dict(CASES)),
        kl.Categorical(ignore_index=255),
        kl.Categorical(ignore_index=0, class_axis=-1),
        kl.Categorical(class_axis=2),
    ],
    ids=str,
)
def test_metadata_round_trip(likelihood):
    restored = Likelihood.from_json(json.loads(json.dumps(likelihood.to_json())))
    assert restored == likelihood
    assert type(restored) is type(likelihood)


def test_metadata_of_earlier_versions_still_loads():
    assert Likelihood.from_json({"name": "Categorical"}) == kl.Categorical(ignore_index=-100, class_axis=None)


def test_only_what_is_special_is_shown():
    assert str(kl.Categorical()) == "Categorical()"
    assert str(kl.Categorical(ignore_index=0, class_axis=-1)) == "Categorical(ignore_index=0, class_axis=-1)"


def test_sample_mean():
    f = torch.randn(5, 4, 6).double()
    torch.testing.assert_close(kl.Categorical(class_axis=1).sample_mean(f), f.softmax(1))
    torch.testing.assert_close(kl.Categorical(class_axis=-1).sample_mean(f), f.softmax(2))
    torch.testing.assert_close(kl.Bernoulli().sample_mean(f), f.sigmoid())
    torch.testing.assert_close(Euclidean().sample_mean(f), f)
    torch.testing.assert_close(HeteroscedasticGaussian().sample_mean(f[:, 0]), f[:, 0, :3])


def test_euclidean_predicts_nothing():
    with pytest.raises(NotImplementedError, match=r"no noise model.*use kl\.Gaussian\(noise_std=...\)"):
        Euclidean().predictive(torch.zeros(2, 1), torch.ones(2, 1), Link.PROBIT, 0, None)
    with pytest.raises(NotImplementedError, match=r"no noise model.*use kl\.Gaussian\(noise_std=...\)"):
        Euclidean().predictive_nll(torch.zeros(2, 1), torch.ones(2, 1))


@pytest.mark.parametrize("likelihood", [kl.Gaussian(), Euclidean(), HeteroscedasticGaussian()])
def test_regression_needs_no_link(likelihood):
    assert likelihood.links == ()


@pytest.mark.parametrize("noise_std", [0, -1.0, math.inf, math.nan, "large"])
def test_noise_must_be_positive(noise_std):
    with pytest.raises(ValueError, match="noise_std must be a positive finite number, got"):
        kl.Gaussian(noise_std=noise_std)


def test_shorthands():
    assert resolve_likelihood("binary") == kl.Bernoulli()
    assert resolve_likelihood("euclidean") == Euclidean()
    assert resolve_likelihood("heteroscedastic") == HeteroscedasticGaussian()
    with pytest.raises(ValueError, match="unknown likelihood 'softmax'; the shorthands are 'classification'"):
        resolve_likelihood("softmax")
    with pytest.raises(TypeError, match="with parentheses"):
        resolve_likelihood(kl.Categorical)
