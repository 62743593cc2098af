"""Norms that torch differentiates wrongly in some memory layouts; the same norms as plain arithmetic are the oracle."""

import itertools

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace._replica import Replica

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CHANNELS_LAST = {2: [torch.channels_last], 3: [torch.channels_last_3d]}


class Arithmetic(nn.Module):
    """A norm written out, constants and all."""

    def __init__(self, norm):
        super().__init__()
        self.norm = [norm]

    def forward(self, x):
        (norm,) = self.norm
        shape = (1, -1, *[1] * (x.ndim - 2))
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            mean, variance = norm.running_mean.view(shape), norm.running_var.view(shape)
        else:
            pixels = tuple(range(2, x.ndim))
            mean, variance = x.mean(pixels, keepdim=True), x.var(pixels, keepdim=True, correction=0)
        scaled = (x - mean) / (variance + norm.eps).sqrt()
        return scaled * norm.weight.detach().view(shape) + norm.bias.detach().view(shape)


class Rearranged(nn.Module):
    """What users do behind a norm."""

    def __init__(self, rearrangement):
        super().__init__()
        self.rearrangement = rearrangement

    def forward(self, x):
        if self.rearrangement == "permute":
            return x.movedim(1, -1)
        return x.transpose(1, 2) if self.rearrangement == "transpose" else x


def norm(dims, kind, channels=3):
    module = {"batch": BATCH_NORMS, "instance": INSTANCE_NORMS}[kind][dims](channels, affine=True).double().eval()
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    if kind == "batch":
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    return module


def layouts(tensor):
    """The same numbers in every order of the axes in memory."""
    for order in itertools.permutations(range(tensor.ndim)):
        inverse = [order.index(axis) for axis in range(tensor.ndim)]
        yield tensor.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 3, 4, 5), (2, 3, 1, 5), (2, 3, 5, 1), (1, 2, 2, 3, 2)])
def test_norms_of_a_replica_are_differentiated_correctly_in_every_layout(kind, shape):
    torch.manual_seed(0)
    module = norm(len(shape) - 2, kind, shape[1])
    values, direction = torch.randn(shape).double(), torch.randn(shape).double()

    def gradient(network, x, direction):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(network(x), x, direction)[0]

    expected = gradient(Arithmetic(module), values, direction)
    network = Replica(module).model
    inputs = [
        values,
        values.movedim(1, -1).contiguous().movedim(-1, 1),
        values.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    for x, g in itertools.product(inputs, layouts(direction)):
        torch.testing.assert_close(gradient(network, x, g), expected)
    assert not module._forward_hooks and not module._forward_pre_hooks


def network(dims, activation, rearrangement, kind, written_out=False):
    torch.manual_seed(dims)
    normalisation = norm(dims, kind)
    body = [CONVOLUTIONS[dims](2, 3, 2), Arithmetic(normalisation) if written_out else normalisation]
    features = 3 * 3**dims
    return nn.Sequential(*body, Rearranged(rearrangement), activation(), nn.Flatten(), nn.Linear(features, 2)).double()


CASES = [
    (dims, activation, rearrangement, kind)
    for dims in CONVOLUTIONS
    for activation, rearrangement in [(nn.Tanh, "none"), (nn.Softplus, "permute"), (nn.GELU, "transpose")]
    for kind in ("batch", "instance")
]


@pytest.mark.quick(2)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("dims", "activation", "rearrangement", "kind"), CASES)
def test_variances_and_their_gradients_are_those_of_the_norm_written_out(dims, activation, rearrangement, kind, n):
    models = [network(dims, activation, rearrangement, kind, written_out) for written_out in (False, True)]
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    data = torch.randn(4, 2, *[4] * dims).double()
    x = torch.randn(n, 2, *[4] * dims).double()
    memory_formats = [torch.contiguous_format, *CHANNELS_LAST.get(dims, ())]
    weights = torch.randn(n, 2, 2).double()
    results = []
    for model, memory_format in itertools.product(models, memory_formats):
        posterior = kl.KronLaplace(model.eval(), "regression", layers=["0", "5"])
        posterior.fit([(row[None], torch.zeros(1, 2).double()) for row in data])
        inputs = x.clone(memory_format=memory_format).requires_grad_()
        covariance = posterior.functional_variance(inputs, differentiable=True)
        (gradient,) = torch.autograd.grad((covariance * weights).sum(), inputs)
        results.append((posterior.functional_variance(x), covariance.detach(), gradient))
    for result in results[:-1]:
        for found, expected in zip(result, results[-1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("dims", CONVOLUTIONS)
def test_gradients_of_variances_with_the_norms_own_blocks_are_finite_differences(dims, kind, n):
    model = network(dims, nn.Tanh, "permute", kind).eval()
    posterior = kl.KronLaplace(model, "regression").fit([(torch.randn(4, 2, *[4] * dims).double(), torch.zeros(4, 2))])
    x = torch.randn(n, 2, *[4] * dims).double().requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(posterior.functional_variance(x, diagonal=True, differentiable=True).sum(), x)
    step = 1e-5
    with torch.no_grad():
        ends = [posterior.functional_variance(x + s * direction, diagonal=True).sum() for s in (step, -step)]
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("estimator", ["kfac", "exact"])
def test_group_norm_in_every_layout(estimator, memory_format):
    """Torch's own gradients of its parameters alone crash the process with channels-last inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(60, 2)).double()
    x = torch.randn(4, 3, 4, 5).double()
    posteriors = [
        kl.KronLaplace(model, "regression", estimator).fit([(inputs, torch.zeros(4, 2))])
        for inputs in (x.contiguous(memory_format=memory_format), x)
    ]
    for name, block in posteriors[1].fisher.items():
        torch.testing.assert_close(posteriors[0].fisher[name].to_dense(), block.to_dense())
    found = posteriors[0].functional_variance(x.contiguous(memory_format=memory_format))
    torch.testing.assert_close(found, posteriors[1].functional_variance(x))
