"""Output metrics against Hessians by autograd; predictive distributions against sampling."""

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.likelihoods import Euclidean, HeteroscedasticGaussian, Likelihood, Sampling, resolve_likelihood
from kronlaplace.links import Link

NOISE = 0.7

# Name of the likelihood and one shape of outputs that it takes; N is 3, so that no axis is taken for another.
CASES = [
    *itertools.product(["bernoulli", "gaussian", "euclidean"], [(3,), (3, 4), (3, 2, 4), (3, 2, 2, 2)]),
    *itertools.product(["classes"], [(3, 2), (3, 4)]),
    *itertools.product(["pixels"], [(3, 4, 2), (3, 4, 4), (3, 4, 1), (3, 4, 2, 3), (3, 2, 2, 1, 2)]),
    *itertools.product(["tokens"], [(3, 2, 4), (3, 4, 4), (3, 1, 4), (3, 2, 3, 4)]),
    *itertools.product(["inferred"], [(3, 4, 2), (3, 2, 2, 4), (3, 2, 4)]),
    *itertools.product(["heteroscedastic"], [(3, 2), (3, 4), (3, 6)]),
]
CATEGORICAL = ("classes", "pixels", "tokens", "inferred")
cases = pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda value: str(value).replace(" ", ""))


def make(name):
    return {
        "bernoulli": kl.Bernoulli(),
        "gaussian": kl.Gaussian(noise_std=NOISE),
        "euclidean": Euclidean(),
        "heteroscedastic": HeteroscedasticGaussian(),
        "classes": kl.Categorical(),
        "pixels": kl.Categorical(class_axis=1),
        "tokens": kl.Categorical(class_axis=-1),
        "inferred": kl.Categorical(),
    }[name]


def class_axis(name, shape):
    """Here, an axis inferred from the targets is the one with four classes."""
    return {"classes": 1, "pixels": 1, "tokens": len(shape) - 1}.get(name) or shape.index(4)


def draw(name, shape, seed=0, spread=1.0):
    """Outputs and targets; in classification the first example ignores all its positions, the others some."""
    generator = torch.Generator().manual_seed(seed)
    f = spread * torch.randn(shape, generator=generator).double()
    if name in CATEGORICAL:
        axis = class_axis(name, shape)
        y = torch.randint(shape[axis], shape[:axis] + shape[axis + 1 :], generator=generator)
        y[torch.rand(y.shape, generator=generator) < 0.3] = -100
        y[0] = -100
        return f, y
    if name == "heteroscedastic":
        return f, torch.randn(shape[0], shape[1] // 2, generator=generator).double()
    y = torch.randn(shape, generator=generator).double()
    return f, torch.sigmoid(y) if name == "bernoulli" else y


def loss(name, f, y, axis=None):
    """The negative log-likelihood of a batch, summed, by torch's own losses."""
    if name in CATEGORICAL:
        return F.cross_entropy(f.movedim(axis, 1), y, reduction="sum")
    if name == "bernoulli":
        return F.binary_cross_entropy_with_logits(f, y, reduction="sum")
    if name == "euclidean":
        return 0.5 * F.mse_loss(f, y, reduction="sum")
    if name == "gaussian":
        return F.gaussian_nll_loss(f, y, torch.full_like(f, NOISE**2), full=True, reduction="sum")
    mean, log_variance = f.tensor_split(2, dim=1)
    return F.gaussian_nll_loss(mean, y, log_variance.exp(), full=True, reduction="sum", eps=0)


def hessians(name, f, y):
    """Of each example's loss by its flattened outputs, (N, c, c)."""
    axis = class_axis(name, f.shape) if name in CATEGORICAL else None
    size = f[0].numel()
    return torch.stack(
        [
            torch.autograd.functional.hessian(partial(loss, name, y=y[n : n + 1], axis=axis), f[n : n + 1]).reshape(
                size, size
            )
            for n in range(len(f))
        ]
    )


def expected_metric(name, f, y):
    """The Fisher: the Hessian itself where it has no targets in it, else its mean over them by quadrature."""
    if name != "heteroscedastic":
        return hessians(name, f, y)
    # The Hessian is quadratic in y: five nodes of Gauss and Hermite integrate it exactly. The targets are independent,
    # and each entry of the Hessian has one of them only, so all may move together.
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    mean, log_variance = f.tensor_split(2, dim=1)
    at_nodes = [hessians(name, f, mean + (0.5 * log_variance).exp() * z) for z in nodes]
    return sum(w * h for w, h in zip(weights / weights.sum(), at_nodes, strict=True))


def metric(likelihood, f, sampling, **options):
    directions = torch.stack(list(likelihood.directions(f, sampling, **options)))
    directions = directions.reshape(len(directions), len(f), -1)
    return torch.einsum("vni,vnj->nij", directions, directions)


@cases
@given(seed=st.integers(0, 1000), spread=st.floats(0.1, 30))
def test_exact_directions_are_a_square_root_of_the_hessian(name, shape, seed, spread):
    if name == "heteroscedastic":
        spread = min(spread, 3.0)  # a log-variance
    f, y = draw(name, shape, seed, spread)
    actual = metric(make(name), f, Sampling.EXACT, targets=y)
    torch.testing.assert_close(actual, expected_metric(name, f, y), rtol=1e-9, atol=1e-13)


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


def log_prob(name, f, y):
    """By torch.distributions, example by example and position by position."""
    distributions = torch.distributions
    if name in CATEGORICAL:
        moved = f.movedim(class_axis(name, f.shape), -1)
        kept = y != -100
        return distributions.Categorical(logits=moved[kept]).log_prob(y[kept]).sum()
    if name == "bernoulli":
        return distributions.Bernoulli(logits=f, validate_args=False).log_prob(y).sum()
    if name == "gaussian":
        return distributions.Normal(f, NOISE).log_prob(y).sum()
    if name == "euclidean":  # of unit noise, without the normaliser
        return (distributions.Normal(f, 1.0).log_prob(y) + 0.5 * math.log(2 * math.pi)).sum()
    mean, log_variance = f.tensor_split(2, dim=1)
    return distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(y).sum()


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
    ("outputs", "targets", "axis"),
    [
        ((5, 4), (5,), 1),
        ((5, 4, 2), (5, 2), 1),
        ((5, 4, 2), (5, 4), 2),
        ((5, 4, 1), (5, 1), 1),
        ((5, 1, 4), (5, 1), 2),
        ((5, 4, 2, 3), (5, 2, 3), 1),
        ((5, 4, 2, 3), (5, 4, 2), 3),
        ((5, 4, 2, 3), None, 1),
        ((5, 4, 2, 3, 2), None, 1),
        ((5, 4), None, 1),
    ],
)
def test_class_axis_is_inferred_where_shapes_tell(outputs, targets, axis):
    f = torch.randn(outputs).double()
    y = None if targets is None else torch.zeros(targets, dtype=torch.long)
    likelihood = kl.Categorical()
    likelihood.check_outputs(f)
    if y is None:
        torch.testing.assert_close(likelihood.sample_mean(f), f.softmax(axis))
    else:
        assert likelihood.check_targets(f, y)[0]
        (direction,) = likelihood.directions(f, Sampling.EMPIRICAL, targets=y)
        torch.testing.assert_close(direction.argmin(axis), y)
    for sampling in Sampling:
        if y is not None or sampling is not Sampling.EMPIRICAL:
            for d in likelihood.directions(f, sampling, targets=y):
                torch.testing.assert_close(d.sum(axis), torch.zeros(d.sum(axis).shape).double())


@pytest.mark.parametrize("sampling", Sampling)
@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        ((5, 4, 4), (5, 4), r"targets of shape \(5, 4\) fit both"),
        ((5, 2, 2, 2), (5, 2, 2), r"targets of shape \(5, 2, 2\) fit both"),
        ((5, 4, 2), None, "there are no targets whose shape could tell"),
    ],
)
def test_ambiguous_class_axis(outputs, targets, message, sampling):
    message = rf"Categorical cannot tell.*{message}.*kl\.Categorical\(class_axis=1\).*kl\.Categorical\(class_axis=-1\)"
    f, likelihood = torch.randn(outputs), kl.Categorical()
    likelihood.check_outputs(f)
    if targets is None and sampling is Sampling.EMPIRICAL:
        message = "none were given"
    y = None if targets is None else torch.zeros(targets, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        list(likelihood.directions(f, sampling, targets=y))
    if sampling is Sampling.EXACT:
        with pytest.raises(ValueError, match=message):
            likelihood.n_directions(f, sampling, 1, y)
    if y is not None:
        with pytest.raises(ValueError, match=message):
            likelihood.check_targets(f, y)
        with pytest.raises(ValueError, match=message):
            likelihood.statistics(f, y)


OTHERS = [kl.Bernoulli(), kl.Gaussian(), Euclidean(), HeteroscedasticGaussian()]


@pytest.mark.parametrize(
    ("class_axis", "outputs", "axis"),
    [
        (None, (5, 4), 1),
        (1, (5, 4), 1),
        (-1, (5, 4), 1),
        (None, (5, 4, 2, 3), 1),
        (1, (5, 4, 2), 1),
        (1, (5, 2, 2, 4), 1),
        (-1, (5, 4, 2), 2),
        (2, (5, 4, 2), 2),
        (-1, (5, 4, 2, 3), 3),
        (3, (5, 4, 2, 3), 3),
        (4, (5, 4, 2, 3, 2), 4),
    ],
)
def test_class_axis_of_outputs(class_axis, outputs, axis):
    """And the probabilities sum to one over it."""
    likelihood, f = kl.Categorical(class_axis=class_axis), torch.randn(outputs).double()
    assert likelihood.class_axis_of(f) == likelihood.class_axis_of(f.to("meta")) == axis
    torch.testing.assert_close(likelihood.sample_mean(f), f.softmax(axis))


@pytest.mark.parametrize("likelihood", OTHERS, ids=str)
def test_outputs_of_other_likelihoods_have_no_class_axis(likelihood):
    assert likelihood.class_axis_of(torch.zeros(5, 4)) is None
    assert likelihood.class_axis_of(torch.zeros(5)) is None


@pytest.mark.parametrize(
    ("class_axis", "outputs", "message"),
    [
        (None, (5, 4, 2), "cannot tell.*there are no targets whose shape could tell"),
        (None, (5,), r"needs one logit per class.*returned \(5,\)"),
        (1, (5, 1, 2), "needs one logit per class"),
        (2, (5, 4), "class_axis=2 is not the last axis"),
        (2, (5, 4, 2, 3), "class_axis=2 is not the last axis"),
    ],
)
def test_class_axis_of_outputs_that_do_not_tell(class_axis, outputs, message):
    with pytest.raises(ValueError, match=message):
        kl.Categorical(class_axis=class_axis).class_axis_of(torch.zeros(outputs))


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 4, 4), (3, 2, 3, 4)])
@pytest.mark.parametrize("sampling", Sampling)
def test_last_axis_by_its_number(shape, sampling):
    f, y = draw("tokens", shape)
    by_number, expected = kl.Categorical(class_axis=len(shape) - 1), kl.Categorical(class_axis=-1)
    assert by_number.check_targets(f, y)[0]
    assert torch.equal(by_number.statistics(f, y), expected.statistics(f, y))
    options = {"mc_samples": 2, "targets": y}
    ours, reference = (
        list(likelihood.directions(f, sampling, generator=torch.Generator().manual_seed(0), **options))
        for likelihood in (by_number, expected)
    )
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)


@pytest.mark.parametrize("sampling", [Sampling.EXACT, Sampling.EMPIRICAL])
def test_axis_that_is_not_last_is_refused_wherever_it_is_used(sampling):
    likelihood, f, y = kl.Categorical(class_axis=2), torch.zeros(3, 2, 4, 2), torch.zeros(3, 2, 2, dtype=torch.long)
    for use in (
        lambda: likelihood.check_targets(f, y),
        lambda: likelihood.statistics(f, y),
        lambda: list(likelihood.directions(f, sampling, targets=y)),
        lambda: likelihood.sample_mean(f),
        lambda: likelihood.predictive_nll(f, y),
    ):
        with pytest.raises(ValueError, match="class_axis=2 is not the last axis"):
            use()


@pytest.mark.parametrize(
    ("outputs", "targets", "axis"),
    [
        ((5, 4), (5,), None),
        ((5, 4), None, None),
        ((5, 4, 2), (5, 2), 1),
        ((5, 4, 2), (5, 4), -1),
        ((5, 1, 4), (5, 1), -1),
        ((5, 4, 2), None, None),
        ((5, 4, 2, 3), (5, 2, 3), 1),
        ((5, 4, 2, 3), (5, 4, 2), -1),
        ((5, 4, 2, 3), None, 1),
    ],
)
def test_targets_teach_the_class_axis(outputs, targets, axis):
    f, y = torch.randn(outputs), None if targets is None else torch.zeros(targets, dtype=torch.long)
    informed = kl.Categorical(ignore_index=7).informed_by(f, y)
    assert informed == kl.Categorical(ignore_index=7, class_axis=axis)
    assert informed.informed_by(f, y) is informed
    if len(outputs) == 2 or axis is not None:  # now it needs no targets
        assert informed.class_axis_of(f) == (len(outputs) - 1 if axis == -1 else 1)


@pytest.mark.parametrize("targets", [(5, 4), (5, 4, 4)])
def test_targets_that_fit_both_axes_or_none_teach_nothing(targets):
    f, y = torch.randn(5, 4, 4), torch.zeros(targets, dtype=torch.long)
    with pytest.raises(ValueError) as refused:
        kl.Categorical().check_targets(f, y)
    with pytest.raises(ValueError) as taught:
        kl.Categorical().informed_by(f, y)
    assert str(taught.value) == str(refused.value)


@pytest.mark.parametrize("likelihood", [*OTHERS, *(kl.Categorical(class_axis=axis) for axis in (1, -1, 2))], ids=str)
@pytest.mark.parametrize("with_targets", [True, False])
def test_others_have_nothing_to_learn(likelihood, with_targets):
    assert likelihood.informed_by(torch.zeros(5, 4, 2), torch.zeros(5, 4, 2) if with_targets else None) is likelihood


class Moved(torch.nn.Module):
    """Classes of tokens, ``(N, T, C)``, on another axis."""

    def __init__(self, axis):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.axis = torch.nn.Linear(3, 4), axis

    def forward(self, x):
        return self.linear(x).movedim(-1, self.axis)


def batches(*positions):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, *shape, 3, generator=generator), torch.randint(4, (5, *shape), generator=generator))
        for shape in positions
    ]


@pytest.mark.parametrize("estimator", ["kfac", "kfoc"])
@pytest.mark.parametrize(
    ("axis", "positions", "taught"),
    [(1, [(2,), (2,)], 1), (-1, [(2,), (2,)], -1), (1, [(2, 3)], 1), (-1, [(2, 3)], -1), (-1, [(), ()], None)],
)
def test_a_fisher_knows_the_class_axis(axis, positions, taught, estimator, tmp_path):
    model, data = Moved(axis).eval(), batches(*positions)
    fisher = kl.estimate_fisher(model, data, kl.Categorical(ignore_index=9), estimator, sampling="exact")
    assert fisher.metadata.likelihood == kl.Categorical(ignore_index=9, class_axis=taught)
    fisher.save(tmp_path / "fisher.safetensors")
    restored = kl.KroneckerFisher.load(tmp_path / "fisher.safetensors")
    assert restored.metadata.likelihood == fisher.metadata.likelihood


def test_the_first_batch_tells_the_class_axis_for_those_that_fit_both():
    """As a sequence as long as there are classes does."""
    model, data = Moved(-1).eval(), batches((2,), (4,))
    fisher = kl.estimate_fisher(model, data, "classification", sampling="exact")
    expected = kl.estimate_fisher(model, data, kl.Categorical(class_axis=-1), sampling="exact")
    torch.testing.assert_close(fisher["linear"].to_dense(), expected["linear"].to_dense(), rtol=0, atol=0)
    assert fisher.metadata.likelihood == expected.metadata.likelihood
    with pytest.raises(ValueError, match="batch 0: Categorical cannot tell"):
        kl.estimate_fisher(model, data[::-1], "classification", sampling="exact")


@pytest.mark.parametrize("likelihood", [kl.Bernoulli(), kl.Gaussian(noise_std=0.5), Euclidean()], ids=str)
def test_a_fisher_leaves_other_likelihoods_alone(likelihood):
    data = [(x, torch.zeros(5, 2, 4)) for x, _ in batches((2,))]
    fisher = kl.estimate_fisher(Moved(-1).eval(), data, likelihood)
    assert fisher.metadata.likelihood is likelihood


@pytest.mark.parametrize("name", ["classification", "binary", "regression", "euclidean", "heteroscedastic"])
def test_empirical_needs_targets(name):
    with pytest.raises(ValueError, match='sampling="empirical" is made of the data\'s targets and none were given'):
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


def test_euclidean_predicts_nothing():
    with pytest.raises(NotImplementedError, match=r"no noise model.*Use kl\.Gaussian\(noise_std=...\)"):
        Euclidean().predictive(torch.zeros(2, 1), torch.ones(2, 1), Link.PROBIT, 0, None)
    with pytest.raises(NotImplementedError, match=r"no noise model.*Use kl\.Gaussian\(noise_std=...\)"):
        Euclidean().predictive_nll(torch.zeros(2, 1), torch.ones(2, 1))


@pytest.mark.parametrize("likelihood", [kl.Gaussian(), Euclidean(), HeteroscedasticGaussian()])
def test_regression_needs_no_link(likelihood):
    assert likelihood.links == ()


@pytest.mark.parametrize("noise_std", [0, -1.0, math.inf, math.nan, "large", None])
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
