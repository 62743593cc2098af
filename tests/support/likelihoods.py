"""Every likelihood with every shape of outputs that it takes, and its Fisher by autograd."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kronlaplace as kl
from kronlaplace.likelihoods import Euclidean, HeteroscedasticGaussian

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
