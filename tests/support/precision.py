"""Networks in half precision beside the same ones in float32."""

import copy

import torch
from torch import nn

import kronlaplace as kl
from tests.support.architectures import Cells, Recurrent
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
LINKS = ("margin", "probit", "centered-probit", "mc", "bridge")


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
