"""Half precision: weights in bfloat16 and float16, and autocast. The same numbers in float32, where all draws are the same,
are the oracle."""

import copy
import math

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.likelihoods import Euclidean, HeteroscedasticGaussian, Sampling
from kronlaplace.precision import alike, callers_autocast, without_autocast
from tests.support.architectures import ARCHITECTURES, Cells, Recurrent
from tests.support.cases import select
from tests.support.networks import Attentive, Pooled

HALF = [torch.bfloat16, torch.float16]
ROUNDINGS = 12
"""Relative errors may be this many times the dtype's eps: a path through a network rounds forward and backward in every
layer, half an eps each, and a covariance is of second order in it."""

ESTIMATORS = {
    "kfac": kl.KFAC(),
    "sua": kl.SUA(),
    "tkfac": kl.TKFAC(),
    "uncorrelated": kl.TKFAC(spatial="uncorrelated"),
    "sweeps": kl.KFOC(),
    "running": kl.KFOC(aggregation="running", rank=2),
    "approx": kl.KFOC(aggregation="approx"),
    "full": kl.KFOC(aggregation="full"),
    "ekfac": kl.EKFAC(),
    "diagonal": kl.Diagonal(),
    "exact": kl.ExactBlock(),
}
LINKS = ("probit", "centered-probit", "mc", "bridge")


class Convolved(nn.Module):
    """A convolution, a norm behind it, an activation, the mean over pixels, a head."""

    def __init__(self, convolution, norm=None):
        super().__init__()
        self.body = nn.Sequential(convolution, norm or nn.Identity(), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x).flatten(2).mean(2))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.root = nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.root(torch.tanh(self.norm(self.embedding(x))))).mean(1))


KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "shared": (lambda: Pooled(3), (4, 3)),
    "conv1d": (lambda: Convolved(nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")), (2, 6)),
    "conv2d": (lambda: Convolved(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)), (2, 4, 5)),
    "grouped": (lambda: Convolved(nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4)), (2, 4, 5)),
    "conv3d": (lambda: Convolved(nn.Conv3d(2, 4, 2), nn.InstanceNorm3d(4, affine=True)), (2, 3, 3, 3)),
    "tokens": (Tokens, None),
    "rnn": (lambda: Recurrent(nn.RNN(2, 3), 3), (4, 2)),
    "gru": (lambda: Recurrent(nn.GRU(2, 3, bidirectional=True), 3), (4, 2)),
    "lstm": (lambda: Recurrent(nn.LSTM(2, 3), 3), (4, 2)),
    "cells": (lambda: Cells(3), (3, 2)),
    "attention": (Attentive, (3, 4)),
}


def converted(inputs, dtype):
    if isinstance(inputs, dict):
        return {key: converted(value, dtype) for key, value in inputs.items()}
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def problem(kind, dtype=torch.bfloat16, n=6):
    """A network with weights that the dtype can hold, inputs that it can hold, labels; the first two in float32."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model = make().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    inputs = torch.randint(5, (n, 4)) if shape is None else torch.randn(n, *shape).to(dtype).float()
    return model.to(dtype).float(), inputs, torch.randint(3, (n,))


def batches(inputs, targets, size=2):
    return [(select(inputs, part), targets[part]) for part in torch.arange(len(targets)).split(size)]


def fitted(model, inputs, targets, likelihood="classification", estimator="kfac"):
    return kl.KronLaplace(model, likelihood, estimator).fit(batches(inputs, targets))


def error(found, expected):
    return float(
        torch.linalg.vector_norm(found.double() - expected.double()) / torch.linalg.vector_norm(expected.double())
    )


def assert_close(found, expected, dtype, roundings=ROUNDINGS):
    assert found.dtype is torch.float32
    assert error(found, expected) < roundings * torch.finfo(dtype).eps


def in_half(kind, dtype, estimator="kfac"):
    """The posteriors in half precision and in float32, with inputs for each."""
    model, inputs, targets = problem(kind, dtype)
    half = copy.deepcopy(model).to(dtype), converted(inputs, dtype)
    return [(fitted(m, x, targets, estimator=estimator), x) for m, x in (half, (model, inputs))]


def operations(model, inputs):
    """How many operations lead to the outputs: a path rounds in each, forward and backward."""
    seen, todo = set(), [model(inputs).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return sum(node.name() != "torch::autograd::AccumulateGrad" for node in seen)


def assert_posteriors_agree(half, x, exact, y, dtype, fisher_roundings=ROUNDINGS):
    for block, expected in zip(half.fisher.values(), exact.fisher.values(), strict=True):
        assert block.dtype is torch.float32
        difference = torch.linalg.matrix_norm(block.to_dense().double() - expected.to_dense())
        assert difference < fisher_roundings * torch.finfo(dtype).eps * exact.fisher.frobenius_norm()
    assert_close(half.functional_variance(x), exact.functional_variance(y), dtype)
    assert_close(half.functional_variance(x, diagonal=True), exact.functional_variance(y, diagonal=True), dtype)
    assert_close(half.functional_variance(x, joint=True), exact.functional_variance(y, joint=True), dtype)
    for link in LINKS:
        assert_close(half.predict(x, link=link), exact.predict(y, link=link), dtype)
    evidence = half.log_marginal_likelihood()
    assert evidence.dtype is torch.float64
    assert error(evidence, exact.log_marginal_likelihood()) < ROUNDINGS * torch.finfo(dtype).eps


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


# -- autocast ------------------------------------------------------------------------------------------------


class InAutocast(nn.Module):
    """The network with an autocast of its own: what autocast of the caller must come to, if our algebra is out of it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *args):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return self.network(*args)


def everything(model, inputs, targets, estimator):
    posterior = fitted(model, inputs, targets, estimator=estimator)
    results = [t for block in posterior.fisher.values() for t in block.to_tensors().values() if t.is_floating_point()]
    results += [posterior.predict(inputs, link=link) for link in LINKS]
    results += [posterior.functional_variance(inputs, diagonal=d, joint=j) for d, j in ((0, 0), (0, 1), (1, 0))]
    results += posterior.sample(2).values()
    results += [posterior.predict(inputs, method="sample", n_samples=2), posterior.log_marginal_likelihood()]
    ones = {name: torch.ones(block.shape) for name, block in posterior.fisher.items()}
    results += posterior.fisher.matmul(ones).values()
    results += [inverse.solve(ones[name]) for name, inverse in posterior.covariance().items()]
    return results


def both_ways(model, inputs, targets, estimator="kfac"):
    """Results under the caller's autocast, and of a network that switches it on by itself."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = everything(model, inputs, targets, estimator)
    return under, everything(InAutocast(model), inputs, targets, estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped"])
def test_under_autocast_only_the_network_is_rounded(kind, estimator):
    model, inputs, targets = problem(kind)
    under, outside = both_ways(model, inputs, targets, ESTIMATORS[estimator])
    for found, expected in zip(under, outside, strict=True):
        assert found.dtype in (torch.float32, torch.float64)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lstm"])  # torch's LSTM fails under autocast itself
def test_layers_under_autocast(kind):
    model, inputs, targets = problem(kind)
    under, outside = both_ways(model, inputs, targets)
    assert all(torch.equal(found, expected) for found, expected in zip(under, outside, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = fitted(model, inputs, targets)
        found = posterior.functional_variance(inputs)
    exact = fitted(model, inputs, targets)
    assert_close(found, exact.functional_variance(inputs), torch.bfloat16)


@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "exact"])
def test_blocks_under_autocast_are_in_full_precision(estimator):
    model, inputs, targets = problem("conv2d")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = fitted(model, inputs, targets, estimator=ESTIMATORS[estimator])
        block = posterior.fisher["body.0"]
        dense, m = block.to_dense(), torch.randn(2, *block.shape)
        exact = dense.double()
        assert error(block.matmul(m), (m.double().flatten(1) @ exact).view_as(m)) < 1e-5
        inverse = kl.damping.Tikhonov(1e-2).invert(block)
        damped = exact + 1e-2 * torch.eye(len(exact)).double()
        assert error(inverse.solve(m), torch.linalg.solve(damped, m.double().flatten(1).T).T.reshape(m.shape)) < 1e-3
        assert error(inverse.diagonal(), damped.inverse().diagonal().view(block.shape)) < 1e-3
        back = block.from_eigenbasis(block.to_eigenbasis(m))
        assert error(back, m.double()) < 1e-5
        errors = kl.relative_error(posterior.fisher, model, batches(inputs, targets))
    assert errors == pytest.approx(
        kl.relative_error(posterior.fisher, InAutocast(model).network, batches(inputs, targets)), abs=0.1
    )


def test_autocast_is_the_callers_again_whatever_happens():
    def states():
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()

    seen = []

    class Network(nn.Linear):
        def forward(self, x):
            seen.append(states()[:2])
            if len(x) == 3:
                raise RuntimeError("three")
            return super().forward(x)

    model = nn.Sequential(nn.Linear(2, 2), Network(2, 2).requires_grad_(False))
    posterior = kl.KronLaplace(model, "regression").fit([(torch.randn(2, 2), torch.randn(2, 2))])
    assert set(seen) == {(False, states()[1])}
    with torch.autocast("cpu", dtype=torch.float16):
        before, seen[:] = states(), []
        posterior.predict(torch.randn(2, 2))
        with pytest.raises(RuntimeError, match="three"):
            posterior.predict(torch.randn(3, 2))
        assert states() == before
        assert set(seen) == {(True, torch.float16)}
        with without_autocast():
            assert not torch.is_autocast_enabled("cpu")
            with callers_autocast():
                assert states() == (True, torch.float16, False)
            assert not torch.is_autocast_enabled("cpu")
        assert states() == before
    with callers_autocast():
        assert not torch.is_autocast_enabled("cpu")


class WithoutKernel(nn.Linear):
    def forward(self, x):
        if torch.is_grad_enabled() or x.dtype is torch.float32:
            return super().forward(x)
        raise NotImplementedError("\"linear_cpu\" not implemented for 'Half'")


def test_kernels_that_torch_does_not_have_are_told_with_a_way_out():
    model = nn.Sequential(nn.Linear(2, 2), WithoutKernel(2, 2).requires_grad_(False)).half()
    posterior = kl.KronLaplace(model, "regression").fit([(torch.randn(2, 2).half(), torch.randn(2, 2))])
    message = r"no kernel for what module '1' \(WithoutKernel\) does in half precision.*posterior.to\(torch.float32\)"
    with pytest.raises(NotImplementedError, match=message):
        posterior.predict(torch.randn(2, 2).half(), method="sample")
    posterior.to(torch.float32).predict(torch.randn(2, 2), method="sample")


class RoundedByBatch(nn.Module):
    """Two inputs, and a rounding that depends on the number of examples, as that of kernels on accelerators does."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x, scale):
        f = self.network(x * scale)
        return f + (len(x) % 2) * torch.finfo(f.dtype).eps * f.detach().abs().max()


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_not_taken_for_examples_that_mix(dtype):
    torch.manual_seed(0)
    model, x, scale = RoundedByBatch().to(dtype), torch.randn(6, 4).to(dtype), torch.randn(6, 1).to(dtype)
    targets = torch.randint(3, (6,))
    kl.estimate_fisher(model, [((x, scale), targets)], "classification")
    with torch.autocast("cpu", dtype=dtype):
        kl.estimate_fisher(model.float(), [((x.float(), scale.float()), targets)], "classification")


def test_rounding_that_is_alike_is_that_of_the_dtype():
    x = torch.tensor([1.0, 1e-3, math.nan])
    close, far = x + torch.tensor([0.0, 0.01, 0.0]), x + torch.tensor([0.0, 0.1, 0.0])
    assert not alike(close, x, rtol=1e-3)
    assert alike(close.bfloat16(), x.bfloat16(), rtol=1e-3)
    assert not alike(far.bfloat16(), x.bfloat16(), rtol=1e-3)
    assert not alike(close.half(), x.half(), rtol=1e-3)
    assert not alike(x[:2], x, rtol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16), without_autocast():
        assert alike(close, x, rtol=1e-3)
    index = torch.arange(3)
    assert alike(index, index, rtol=1e-3)
    assert not alike(index + 1, index, rtol=1e-3)


# -- the architectures ---------------------------------------------------------------------------------------


def architecture(name, dtype):
    torch.manual_seed(0)
    case = ARCHITECTURES[name]()
    return case.model.to(dtype).float(), converted(converted(case.inputs, dtype), torch.float32), case.targets


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
