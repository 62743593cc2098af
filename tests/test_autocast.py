"""Under autocast the network is rounded, and nothing else."""

import math

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace._precision import alike, callers_autocast, without_autocast
from tests.support.precision import (
    ESTIMATORS,
    HALF,
    KINDS,
    InAutocast,
    assert_close,
    batches,
    both_ways,
    error,
    fitted,
    problem,
)


@pytest.mark.quick(1)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["linear", "conv2d", "grouped"])
def test_under_autocast_only_the_network_is_rounded(kind, estimator):
    model, inputs, targets = problem(kind)
    under, outside = both_ways(model, inputs, targets, ESTIMATORS[estimator])
    for found, expected in zip(under, outside, strict=True):
        assert found.dtype in (torch.float32, torch.float64)
        assert torch.equal(found, expected)


@pytest.mark.quick(1)
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
