"""More networks for predictions: outputs with positions, hidden last layers; the covariance of all outputs at once."""

import copy
import functools

import torch
from torch import nn

from kronlaplace.likelihoods.links import Link
from tests.support import oracles
from tests.support.posteriors import Problem, dense_precision
from tests.support.posteriors import problem as problem_of

RTOL = 1e-8
GLM_LINKS = [Link.MARGIN, Link.PROBIT, Link.CENTERED_PROBIT, Link.MC, Link.BRIDGE]


class Tokens(nn.Module):
    """The last layer is the output, at four positions, (N, T, C)."""

    def __init__(self, outputs):
        super().__init__()
        self.token = nn.Linear(3, 5)
        self.head = nn.Linear(5, outputs)

    def forward(self, x):
        h = torch.tanh(self.token(x))
        return self.head(h + h.mean(1, keepdim=True))


class Squeezed(nn.Module):
    """Without the last axis."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).squeeze(-1)


class Hidden(nn.Module):
    """The same function, with an operation behind the network that hides its last layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0


def made_of(model, inputs, targets, likelihood):
    model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return Problem(model, inputs.double(), targets, likelihood, oracles.blocks(model))


OWN = {
    "linear": lambda: (nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), (5, 3)),
    "tokens": lambda: (Tokens(3), torch.randn(5, 4, 3), (5, 4, 3)),
    "single-tokens": lambda: (Squeezed(Tokens(1)), torch.randn(5, 4, 3), (5, 4)),
    "flat": lambda: (Squeezed(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))), torch.randn(5, 4), (5,)),
}


@functools.cache
def problem(network, likelihood="classification"):
    """As in `tests.support.posteriors`, and more networks."""
    if network not in OWN:
        return problem_of(network, likelihood)
    torch.manual_seed(0)
    model, inputs, shape = OWN[network]()
    targets = {
        "classification": lambda: torch.randint(3, shape[:-1]),
        "binary": lambda: torch.randint(2, shape).double(),
        "regression": lambda: torch.randn(shape, dtype=torch.float64),
    }[likelihood]()
    return made_of(model, inputs, targets, likelihood)


def outputs_and_covariance(made, posterior, D=None):
    """Dense: the outputs of all examples flattened, (N, M), and their covariance over the batch, (N, M, N, M)."""
    D = torch.full((len(posterior.fisher.to_dense()),), float(posterior.prior_precision)).double() if D is None else D
    rows = [oracles.weight_gradients(made.model, oracles.example(made.inputs, n)) for n in range(len(made.targets))]
    layers = list(posterior.fisher)
    J = torch.stack([torch.cat([row[name].flatten(1) for name in layers], dim=1) for row in rows])
    covariance = torch.einsum("ncp,pq,mdq->ncmd", J, torch.linalg.inv(dense_precision(posterior, D)), J)
    outputs = made.model(made.inputs).detach()
    return outputs.reshape(len(outputs), -1), covariance


def within(covariance):
    """The examples' own blocks, (N, M, M)."""
    return torch.stack([covariance[n, :, n] for n in range(len(covariance))])


def hidden(made):
    """The same network with its last layer hidden."""
    model = Hidden(copy.deepcopy(made.model))
    return Problem(model, made.inputs, made.targets, made.name, oracles.blocks(model))


def assert_close(actual, expected, rtol=RTOL):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
