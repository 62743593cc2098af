"""Half precision: weights in bfloat16 and float16, and autocast. The same numbers in float32, where all draws are the same,
are the oracle."""

import copy

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.likelihoods import Euclidean, HeteroscedasticGaussian, Sampling
from tests.support.architectures import ARCHITECTURES
from tests.support.precision import (
    ESTIMATORS,
    HALF,
    KINDS,
    ROUNDINGS,
    assert_close,
    assert_posteriors_agree,
    batches,
    both_ways,
    converted,
    error,
    fitted,
    in_half,
    operations,
    problem,
)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_posteriors_in_half_precision_are_those_of_the_same_weights(kind, dtype):
    (half, x), (exact, y) = in_half(kind, dtype)
    assert_posteriors_agree(half, x, exact, y, dtype)
    draws = half.sample(3)
    assert {draw.dtype for draw in draws.values()} == {dtype}
    assert_close(
        half.predict(x, method="sample", n_samples=50), exact.predict(y, method="sample", n_samples=50), dtype, 64
    )


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped"])
def test_estimators_in_half_precision(kind, estimator, dtype):
    (half, x), (exact, y) = in_half(kind, dtype, ESTIMATORS[estimator])
    assert_close(half.functional_variance(x), exact.functional_variance(y), dtype)


LIKELIHOODS = {
    "classification": kl.Categorical(),
    "binary": kl.Bernoulli(),
    "regression": kl.Gaussian(0.5),
    "heteroscedastic": HeteroscedasticGaussian(),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sampling", Sampling)
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.filterwarnings("ignore:sampling=")
def test_likelihoods_in_half_precision(name, sampling, dtype):
    torch.manual_seed(1)
    likelihood = LIKELIHOODS[name]
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 4)).to(dtype).float()
    x = torch.randn(6, 2, 6).to(dtype).float()
    y = {
        "classification": torch.randint(4, (6,)),
        "binary": torch.randint(2, (6, 4)).float(),
        "regression": torch.randn(6, 4),
        "heteroscedastic": torch.randn(6, 2),
    }[name]
    results = []
    for some, inputs in ((copy.deepcopy(model).to(dtype), x.to(dtype)), (model, x)):
        posterior = kl.KronLaplace(some, likelihood).fit(batches(inputs, y), sampling=sampling)
        posterior.tune()
        glm, sampled = posterior.predict(inputs), posterior.predict(inputs, method="sample", n_samples=50)
        if isinstance(glm, kl.Prediction):
            results.append([t.expand(len(x), -1) if t.ndim else t for p in (glm, sampled) for t in vars(p).values()])
            results[-1].append(posterior.predict(inputs, joint=True).sample(2).mean())
        else:
            results.append([glm, sampled, *(posterior.predict(inputs, link=link) for link in likelihood.links)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype is torch.float32
        assert error(found, expected) < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF)
def test_targets_are_not_rounded_to_the_dtype_of_the_outputs(dtype):
    """Near a large output, half precision does not tell an error from none."""
    f, y = torch.full((1, 1), 256.0, dtype=dtype), torch.full((1, 1), 256.05)
    for likelihood in (kl.Gaussian(), Euclidean()):
        (direction,) = likelihood.directions(f, Sampling.EMPIRICAL, targets=y)
        assert direction.dtype is dtype
        torch.testing.assert_close(direction.float(), torch.full((1, 1), -0.05), rtol=0.01, atol=0)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["conv2d", "lstm", "tokens"])
def test_posteriors_move_to_half_precision_and_come_back_from_files(kind, dtype, tmp_path):
    model, inputs, targets = problem(kind, dtype)
    exact = fitted(copy.deepcopy(model), inputs, targets)
    moved = fitted(model, inputs, targets).to(dtype)
    x = converted(inputs, dtype)
    assert_posteriors_agree(moved, x, exact, inputs, dtype)
    moved.save(tmp_path / "posterior.safetensors")
    loaded = kl.KronLaplace.load(tmp_path / "posterior.safetensors", moved.model)
    torch.testing.assert_close(loaded.functional_variance(x), moved.functional_variance(x), rtol=1e-5, atol=0)
    moved.fisher.save(tmp_path / "fisher.safetensors")
    again = kl.KronLaplace(moved.model, "classification").fit(
        fisher=kl.KroneckerFisher.load(tmp_path / "fisher.safetensors")
    )
    torch.testing.assert_close(again.functional_variance(x), moved.functional_variance(x), rtol=1e-5, atol=0)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped", "gru"])
def test_gradients_of_variances_in_half_precision(kind, dtype):
    gradients = []
    for posterior, x in in_half(kind, dtype):
        x = x.clone().requires_grad_()
        variance = posterior.functional_variance(x, diagonal=True, differentiable=True)
        gradients.append(torch.autograd.grad(variance.sum(), x)[0])
    assert gradients[0].dtype is dtype
    assert error(*gradients) < 2 * ROUNDINGS * torch.finfo(dtype).eps


def test_a_norm_of_zeros_is_no_false_alarm_in_half_precision():
    """The input is zero and the normalised input is not: the gradient of the scale is rounded none the less."""
    torch.manual_seed(0)
    case = ARCHITECTURES["resnet18"]()
    model = case.model.to(torch.bfloat16)
    kl.estimate_fisher(model, [(case.inputs.to(torch.bfloat16)[:2], case.targets[:2])], "classification")


def architecture(name, dtype):
    torch.manual_seed(0)
    case = ARCHITECTURES[name]()
    return case.model.to(dtype).float(), converted(converted(case.inputs, dtype), torch.float32), case.targets


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["depthwise", "transformer", "cells", "language_model"])
def test_architectures_in_bfloat16(name):
    model, inputs, targets = architecture(name, torch.bfloat16)
    half = fitted(copy.deepcopy(model).to(torch.bfloat16), converted(inputs, torch.bfloat16), targets)
    assert_posteriors_agree(
        half, converted(inputs, torch.bfloat16), fitted(model, inputs, targets), inputs, torch.bfloat16
    )


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["kfac", "sweeps", "ekfac"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_architectures_in_half_precision(name, dtype, estimator):
    """Six norms on few numbers, one behind the other, amplify one another's roundings: there one eps for each operation."""
    model, inputs, targets = architecture(name, dtype)
    half = fitted(copy.deepcopy(model).to(dtype), converted(inputs, dtype), targets, estimator=ESTIMATORS[estimator])
    exact = fitted(model, inputs, targets, estimator=ESTIMATORS[estimator])
    bound = operations(model, inputs) if name == "norms" else ROUNDINGS
    assert_posteriors_agree(half, converted(inputs, dtype), exact, inputs, dtype, bound)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of its RMSNorm
@pytest.mark.parametrize("estimator", ["kfac", "sweeps", "ekfac"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "lstm"])
def test_all_architectures_under_autocast(name, estimator):
    model, inputs, targets = architecture(name, torch.bfloat16)
    under, outside = both_ways(model, inputs, targets, ESTIMATORS[estimator])
    assert all(torch.equal(found, expected) for found, expected in zip(under, outside, strict=True))
