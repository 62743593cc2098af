"""Divergences against torch.distributions, and gradients that cannot be those of a likelihood."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

import kronlaplace as kl
from kronlaplace.likelihoods import Euclidean, HeteroscedasticGaussian
from tests.support.likelihoods import CATEGORICAL, NOISE, cases, class_axis, draw, loss, make

INFERRED = "inferred"  # without targets its class axis may be ambiguous


def expected_divergence(name, f, g, y):
    if name in CATEGORICAL:
        axis = class_axis(name, f.shape)
        if (y == -100).all():
            return torch.zeros(()).double()
        one, other = (Categorical(logits=t.movedim(axis, -1)[y != -100]) for t in (f, g))
    elif name == "bernoulli":
        one, other = (Categorical(logits=torch.stack([t, torch.zeros_like(t)], -1)) for t in (f, g))
    elif name == "heteroscedastic":
        one, other = (Normal(t.tensor_split(2, 1)[0], (0.5 * t.tensor_split(2, 1)[1]).exp()) for t in (f, g))
    else:
        noise = NOISE if name == "gaussian" else 1.0
        one, other = Normal(f, noise), Normal(g, noise)
    return kl_divergence(one, other).sum()


@cases
@given(seed=st.integers(0, 1000), size=st.floats(0.1, 20))
def test_divergence_is_that_of_torchs_distributions(name, shape, seed, size):
    f, y = draw(name, shape, seed)
    g = f + size * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    expected = expected_divergence(name, f, g, y)
    torch.testing.assert_close(make(name).divergence(f, g, y), expected, rtol=1e-9, atol=1e-12)


@cases
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_small_divergences_keep_their_digits_in_single_precision(name, shape, size):
    """Where the sum of π (log π − log π') would be rounding only."""
    f, y = (t.float() if t.is_floating_point() else t for t in draw(name, shape))
    g = f + size * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    change = (g.double() - f.double()).clone()
    expected = 0.5 * (change * make(name).metric_product(f.double(), change, y)).sum()
    torch.testing.assert_close(make(name).divergence(f, g, y).double(), expected, rtol=4 * size + 1e-3, atol=0)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_equal_outputs(name, shape, dtype):
    f, y = draw(name, shape)
    f = f.to(dtype)
    found = make(name).divergence(f, f.clone(), y)
    assert (found.shape, found.dtype, found.item()) == ((), torch.promote_types(dtype, torch.float32), 0.0)


def test_impossible_classes_and_large_logits():
    inf = float("inf")
    f = torch.tensor([[0.0, -inf, 3.0], [0.0, 1.0, 2.0], [0.0, 900.0, 0.0]]).double()
    g = torch.tensor([[1.0, -inf, 3.0], [0.0, 1.0, 2.0], [0.0, 0.0, 900.0]]).double()
    one, other = Categorical(logits=f[0, [0, 2]]), Categorical(logits=g[0, [0, 2]])
    torch.testing.assert_close(kl.Categorical().divergence(f, g), kl_divergence(one, other) + 900.0)
    assert kl.Categorical().divergence(f * float("nan"), g).isnan()


@cases
def test_what_a_loss_changes_by_without_targets(name, shape):
    """For canonical links ``h(f') − h(f) = r · (f' − f) + KL``, whatever the targets."""
    if name == "heteroscedastic":
        return
    f, y = draw(name, shape)
    g = f + torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    axis = class_axis(name, shape) if name in CATEGORICAL else None
    f.requires_grad_()
    before = loss(name, f, y, axis)
    (r,) = torch.autograd.grad(before, f)
    change = (r * (g - f)).sum() + make(name).divergence(f.detach(), g, y)
    torch.testing.assert_close(loss(name, g, y, axis), (before + change).detach())


@cases
def test_the_most_by_which_a_loss_can_decrease(name, shape):
    """The loss without the entropy of soft targets, which outputs can meet; a square loss needs no bound."""
    f, y = draw(name, shape)
    axis = class_axis(name, shape) if name in CATEGORICAL else None
    f.requires_grad_()
    before = loss(name, f, y, axis)
    (r,) = torch.autograd.grad(before, f)
    if name in ("gaussian", "euclidean", "heteroscedastic"):
        assert make(name).largest_decrease(f.detach(), r) is None
    elif name != INFERRED:
        entropy = 0.0 if name in CATEGORICAL else -(torch.xlogy(y, y) + torch.xlogy(1 - y, 1 - y)).sum()
        torch.testing.assert_close(make(name).largest_decrease(f.detach(), r), before.detach() - entropy)


@given(seed=st.integers(0, 1000), size=st.floats(0.1, 50))
def test_soft_targets_keep_their_entropy(seed, size):
    generator = torch.Generator().manual_seed(seed)
    f, t = (size * torch.randn(6, 4, generator=generator).double() for _ in range(2))
    t = t.softmax(1)
    expected = F.kl_div(f.log_softmax(1), t, reduction="sum")
    torch.testing.assert_close(kl.Categorical().largest_decrease(f, f.softmax(1) - t), expected, rtol=1e-7, atol=1e-9)
    two, ones = f[:, :1], t[:, :1]
    both = torch.cat([torch.zeros_like(two), two], 1)
    expected = F.kl_div(both.log_softmax(1), torch.cat([1 - ones, ones], 1), reduction="sum")
    actual = kl.Bernoulli().largest_decrease(two, two.sigmoid() - ones)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_an_impossible_class_and_rounding_leave_a_number():
    f = torch.tensor([[0.0, -torch.inf, 1.0], [1e4, 0.0, -1e4]])
    y = torch.tensor([2, 0])
    r = f.softmax(1) - F.one_hot(y, 3)
    actual = kl.Categorical().largest_decrease(f, r)
    torch.testing.assert_close(actual, F.cross_entropy(f, y, reduction="sum").double(), rtol=1e-5, atol=1e-6)
    assert float(kl.Bernoulli().largest_decrease(torch.tensor([[1e4]]), torch.tensor([[1.0]]))) == pytest.approx(1e4)


# -- gradients -----------------------------------------------------------------------------------------------


def check(name, f, r, y=None):
    allowed, message = make(name).check_gradient(f, r, y)
    assert allowed.shape == ()
    assert allowed.dtype == torch.bool
    for cause in ('reduction="sum"', "class weights", "GradScaler", "another loss"):
        assert cause in message
    return bool(allowed)


def gradient(name, f, y, dtype):
    f = f.to(dtype).requires_grad_()
    axis = class_axis(name, f.shape) if name in CATEGORICAL else None
    y = y.to(dtype) if y.is_floating_point() else y
    return f.detach(), torch.autograd.grad(loss(name, f, y, axis), f)[0], y


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_torchs_losses_are_accepted(name, shape, dtype):
    f, y = draw(name, shape)
    if dtype is torch.bfloat16 and name == "heteroscedastic":  # torch's loss is too coarse
        return
    f, r, y = gradient(name, f, y, dtype)
    assert check(name, f, r, y)
    assert name == INFERRED or check(name, f, r)


@cases
def test_sums_in_place_of_means_are_not(name, shape):
    """With examples on the first axis, N times a mean's gradient is what the sum would give N times over."""
    f, r, y = gradient(name, *draw(name, shape), torch.float32)
    for factor in (len(f), 2.0**16, -1.0):
        assert not check(name, f, factor * r, y)
    # Soft targets may explain a small factor, and a square loss has every gradient.
    assert name in (INFERRED, "gaussian", "euclidean") or not check(name, f, 2.0**16 * r)


def test_other_losses_are_not():
    f = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.tensor([0, 1, 2, 1, 0])
    for other, allowed in (
        (F.cross_entropy(f, y, label_smoothing=0.1, reduction="sum"), True),
        (F.cross_entropy(f, y, weight=torch.tensor([1.0, 30.0, 1.0]), reduction="sum"), False),
        (F.mse_loss(f, F.one_hot(y).float(), reduction="sum"), False),
        (F.multi_margin_loss(f, y, reduction="sum"), False),
    ):
        (r,) = torch.autograd.grad(other, f, retain_graph=True)
        assert check("classes", f.detach(), r) is allowed


def test_probabilities_of_targets_sum_to_one():
    """Those of independent logits, as in binary cross-entropy, do not."""
    f = torch.zeros(2, 3)
    assert not check("classes", f, torch.tensor([[0.1, 0.1, 0.1], [0.0, 0.0, 0.0]]))
    assert check("classes", f, torch.tensor([[0.1, -0.2, 0.1], [0.0, 0.0, 0.0]]))


def test_what_is_not_a_number_says_nothing_about_the_loss():
    f = torch.full((2, 3), float("nan"))
    assert check("classes", f, f)


def test_gradients_of_any_square_loss_are_possible():
    f = torch.randn(4, 2)
    for likelihood in (kl.Gaussian(), Euclidean()):
        assert likelihood.check_gradient(f, 1e6 * f)[0]


@pytest.mark.parametrize("method", ["divergence", "check_gradient"])
def test_shapes_are_checked(method):
    with pytest.raises(ValueError, match=r"must have the shape of the outputs, \(4, 3\); got \(4, 2\)"):
        getattr(kl.Categorical(), method)(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"outputs of shape \(N, 2C\)"):
        getattr(HeteroscedasticGaussian(), method)(torch.zeros(4, 3), torch.zeros(4, 3))


@cases
def test_nothing_waits_for_values(name, shape):
    f, y = (t.to("meta") for t in draw(name, shape))
    assert make(name).divergence(f, f, y).is_meta
    assert make(name).check_gradient(f, f, y)[0].is_meta
