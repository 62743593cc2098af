"""Predictions where the last layer's output is the network's, or is not."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.likelihoods.links import Link
from kronlaplace.network.observer import NetworkObserver
from kronlaplace.testing import temporary_registrations
from tests.support.output_shapes import (
    GLM_LINKS,
    Hidden,
    assert_close,
    hidden,
    made_of,
    outputs_and_covariance,
    problem,
    within,
)
from tests.support.posteriors import some_prior

ENDS_WITH_LAYER = ["linear", "mlp", "cnn", "sequence", "residual", "transformer", "lstm", "norms", "tokens", "gru"]


@pytest.mark.quick(1, grid=20)
@pytest.mark.parametrize("structure", ["scalar", "vector"])
@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "diagonal", "exact"])
@pytest.mark.parametrize("network", ENDS_WITH_LAYER)
def test_the_output_layer_needs_no_gradients(network, estimator, structure):
    """Whether it is seen to be the network's last operation, or not, is the same in all that is asked."""
    first = problem(network)
    second = hidden(first)
    precision, _ = some_prior(first, structure)
    seen, unseen = (made.fitted(estimator, prior_precision=precision) for made in (first, second))
    x = first.inputs
    for options in ({}, {"diagonal": True}, {"joint": True}):
        assert_close(seen.functional_variance(x, **options), unseen.functional_variance(x, **options), 1e-10)
    for options in (
        {},
        {"link": "probit"},
        {"link": "centered-probit"},
        {"link": "bridge"},
        {"link": "mc"},
        {"link": "mc", "diagonal": True},
    ):
        actual, expected = (p.predict(x, **options) for p in (seen, unseen))
        # The root of a covariance is not unique where eigenvalues are close.
        assert_close(actual, expected, 0.5 if options == {"link": "mc"} else 1e-10)


@pytest.mark.parametrize("network", ["linear", "mlp", "tokens"])
def test_the_output_layer_alone_takes_no_backward_pass(network, monkeypatch):
    made = problem(network)
    posterior = made.fitted(layers="last")
    other = hidden(made).fitted(layers=[f"inner.{name}".rstrip(".") for name in posterior.layers])

    def refuse(*args, **kwargs):
        raise AssertionError("a backward pass")

    monkeypatch.setattr(NetworkObserver, "backward", refuse)
    posterior.functional_variance(made.inputs, diagonal=True)
    for link in GLM_LINKS:
        posterior.predict(made.inputs, link=link)
    with pytest.raises(AssertionError, match="a backward pass"):
        other.functional_variance(made.inputs, diagonal=True)


class Conv1D(nn.Module):
    """The linear layer of GPT-2: its weight is transposed."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_nor_does_one_of_a_registered_type(monkeypatch):
    with temporary_registrations():
        kl.register_layer(Conv1D, "linear", transposed=True)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Conv1D(5, 3)).double().eval()
        x = torch.randn(6, 4, dtype=torch.float64)
        posterior = kl.KronLaplace(model, "classification", layers="last").fit([(x, torch.arange(6) % 3)])
        general = kl.KronLaplace(Hidden(model), "classification", layers=["inner.2"]).fit([(x, torch.arange(6) % 3)])
        expected = general.functional_variance(x)
        monkeypatch.setattr(NetworkObserver, "backward", None)
        assert_close(posterior.functional_variance(x), expected, 1e-10)


def doubled(f):
    f *= 2
    return f


ENDINGS = {
    "in place": lambda head, h: doubled(head(h)),
    "in-place activation": lambda head, h: torch.tanh_(head(h)),
    "through a view": lambda head, h: doubled(head(h).view(-1)).view(len(h), -1),
    "a view that is changed": lambda head, h: (f := head(h), f[:, 0].mul_(3))[0],
    "a view": lambda head, h: head(h).view(len(h), -1),
    "used twice": lambda head, h: head(torch.tanh(head(h))),
    "used twice and added": lambda head, h: head(h) + head(h.flip(1)),
    "the first of two calls": lambda head, h: (head(h), head(h.flip(1)))[0],
    "the second of two calls": lambda head, h: (head(h.flip(1)), head(h))[1],
    "one output from each call": lambda head, h: torch.cat([head(h)[:, :1], head(h.flip(1))[:, 1:]], dim=1),
    "untouched": lambda head, h: head(h),
    "used elsewhere, too": lambda head, h: (f := head(h), f.detach().sum())[0],
}


class Ending(nn.Module):
    def __init__(self, ending):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.head = nn.Linear(3, 3)
        self.ending = ending

    def forward(self, x):
        return self.ending(self.head, torch.tanh(self.first(x)))


@pytest.mark.parametrize("layers", [None, ["head"]])
@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_happens_behind_the_last_layer(ending, layers):
    """Changed in place, seen through a view, used twice: the Jacobians are those of the network."""
    torch.manual_seed(0)
    made = made_of(Ending(ENDINGS[ending]), torch.randn(5, 4), torch.randint(3, (5,)), "classification")
    posterior = made.fitted(prior_precision=0.5, layers=layers)
    _, covariance = outputs_and_covariance(made, posterior)
    assert_close(posterior.functional_variance(made.inputs), within(covariance))
    diagonal = within(covariance).diagonal(dim1=1, dim2=2)
    assert_close(posterior.functional_variance(made.inputs, diagonal=True), diagonal)
    assert_close(posterior.functional_variance(made.inputs, joint=True), covariance.reshape(15, 15))
    expected = kl.Categorical().predictive(made.model(made.inputs).detach(), within(covariance), Link.BRIDGE, 0, None)
    assert_close(posterior.predict(made.inputs, link="bridge"), expected)
