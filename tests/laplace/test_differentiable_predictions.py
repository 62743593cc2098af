"""Derivatives of predictions by the inputs."""

import pytest
import torch
from torch import nn

from tests.support.output_shapes import assert_close, made_of, problem
from tests.support.posteriors import some_prior
from tests.support.unchanged import assert_unchanged, everything

DIFFERENTIABLE = ["linear", "mlp", "cnn", "sequence", "residual", "norms", "gru", "tokens", "segmentation"]


QUESTIONS = {
    "covariance": lambda p, x, **d: p.functional_variance(x, **d),
    "variances": lambda p, x, **d: p.functional_variance(x, diagonal=True, **d),
    "joint": lambda p, x, **d: p.functional_variance(x, joint=True, **d),
    "margin": lambda p, x, **d: p.predict(x, **d),
    "probit": lambda p, x, **d: p.predict(x, link="probit", **d),
    "mc": lambda p, x, **d: p.predict(x, link="mc", n_samples=5, **d),
    "mc, diagonal": lambda p, x, **d: p.predict(x, link="mc", n_samples=5, diagonal=True, **d),
    "bridge": lambda p, x, **d: p.predict(x, link="bridge", **d),
    "sample": lambda p, x, **d: p.predict(x, method="sample", n_samples=3, **d),
}


@pytest.mark.quick(2, grid=40)
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("network", DIFFERENTIABLE)
def test_derivatives_by_the_inputs(network, question, monkeypatch):
    """In two chunks; the values are those of the plain mode."""
    monkeypatch.setattr("kronlaplace.laplace.linearized._FIRST_CHUNK", 1)
    made = problem(network)
    posterior = made.fitted(prior_precision=0.5)
    x = made.inputs[:2].clone().requires_grad_()
    ask = QUESTIONS[question]
    assert_close(ask(posterior, x, differentiable=True).detach(), ask(posterior, x), 1e-10)
    assert not ask(posterior, x).requires_grad
    assert torch.autograd.gradcheck(lambda x: ask(posterior, x, differentiable=True), x, fast_mode=True)


@pytest.mark.quick(2)
@pytest.mark.parametrize("options", [{}, {"joint": True}, {"method": "sample", "n_samples": 4}])
@pytest.mark.parametrize(
    ("network", "likelihood"), [("mlp", "regression"), ("tokens", "regression"), ("mlp", "heteroscedastic")]
)
def test_derivatives_of_regression_by_the_inputs(network, likelihood, options):
    made = problem(network, likelihood)
    posterior = made.fitted(prior_precision=5.0)
    x = made.inputs[:2].clone().requires_grad_()

    def parts(x, **differentiable):
        p = posterior.predict(x, **options, **differentiable)
        return p.mean, p.variance, p.total_variance, *([p.total_covariance] if "joint" in options else [])

    for ours, plain in zip(parts(x, differentiable=True), parts(x), strict=True):
        assert_close(ours.detach(), plain, 1e-10)
    assert torch.autograd.gradcheck(lambda x: parts(x, differentiable=True), x, fast_mode=True)


@pytest.mark.quick(2)
@pytest.mark.parametrize("estimator", ["ekfac", "diagonal", "exact"])
@pytest.mark.parametrize("network", ["cnn", "sequence"])
def test_derivatives_with_every_kind_of_block(network, estimator):
    made = problem(network)
    posterior = made.fitted(estimator, prior_precision=some_prior(made, "vector")[0])
    x = made.inputs[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: posterior.predict(x, differentiable=True), x, fast_mode=True)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def test_derivatives_through_attention():
    """Whose fused kernels have no second derivatives."""
    torch.manual_seed(0)
    made = made_of(Encoder(), torch.randn(3, 4, 4), torch.randint(3, (3,)), "classification")
    posterior = made.fitted(prior_precision=0.5)
    x = made.inputs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: posterior.predict(x, differentiable=True), x, fast_mode=True)


def test_derivatives_by_one_of_several_inputs():
    """Tokens have none, the numbers beside them have."""
    made = problem("from_dict")
    posterior = made.fitted(prior_precision=0.5)
    extra = made.inputs["extra"].clone().requires_grad_()

    def probabilities(extra):
        return posterior.predict({**made.inputs, "extra": extra}, differentiable=True)

    assert torch.autograd.gradcheck(probabilities, extra, fast_mode=True)


@pytest.mark.parametrize("link", ["margin", "probit", "centered-probit", "mc", "bridge"])
@pytest.mark.parametrize(("units", "outputs"), [(1, 3), (1, 5), (2, 4)])
def test_derivatives_where_the_covariance_is_singular(units, outputs, link):
    """More outputs than hidden units, of which only the first layer is uncertain; against differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, units), nn.Tanh(), nn.Linear(units, outputs))
    made = made_of(model, torch.randn(6, 3), torch.randint(outputs, (6,)), "classification")
    posterior = made.fitted(layers=["0"])

    def total(x):
        return posterior.predict(x, link=link, differentiable=True)[:, 0].sum()

    x, step = made.inputs.clone().requires_grad_(), 1e-4 * torch.randn(6, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(total(x), x)
    difference = (total(x + step) - total(x - step)) / 2
    torch.testing.assert_close((gradient * step).sum(), difference.detach(), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("link", ["margin", "probit", "centered-probit", "mc", "bridge"])
def test_derivatives_where_the_covariance_is_zero(link):
    """All units of the layer that is uncertain are dead: there is nothing to average over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    made = made_of(model, torch.randn(6, 3), torch.randint(3, (6,)), "classification")
    with torch.no_grad():
        model[0].bias -= 100
    posterior = made.fitted(layers=["0"])
    x = made.inputs.clone().requires_grad_()
    prediction = posterior.predict(x, link=link, differentiable=True)
    assert torch.isfinite(prediction).all()
    assert torch.equal(torch.autograd.grad(prediction[:, 0].sum(), x)[0], torch.zeros_like(x))
    assert_close(prediction.detach(), model(made.inputs).detach().softmax(1))


@pytest.mark.grid
def test_draws_of_the_outputs_are_continuous_in_the_inputs():
    """The same draws for inputs that are next to each other: no jumps where eigenvectors change their sign or order."""
    made = problem("mlp")
    posterior = made.fitted(prior_precision=0.5)
    path = made.inputs[:1] + torch.linspace(0, 2, 401, dtype=torch.float64)[:, None]
    p = torch.cat([posterior.predict(x, link="mc", n_samples=5) for x in path.split(1)])
    assert (p[1:] - p[:-1]).abs().max() < 0.02


@pytest.mark.quick(2)
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("network", ["mlp", "residual", "gru"])
def test_differentiable_predictions_leave_no_trace(network, question):
    """Nothing is accumulated before the user asks for it, and what was asked for can be had after the model moved on."""
    made = problem(network)
    posterior = made.fitted()
    before = everything(made.model)
    x = made.inputs.clone().requires_grad_()
    result = QUESTIONS[question](posterior, x, differentiable=True)
    assert x.grad is None
    assert_unchanged(made.model, before)
    posterior.predict(made.inputs)
    made.model(x)
    (gradient,) = torch.autograd.grad(result.square().sum(), x, retain_graph=True)
    assert_unchanged(made.model, before)
    result.square().sum().backward(inputs=[x])
    assert torch.equal(x.grad, gradient)
    assert_unchanged(made.model, before)
    again = QUESTIONS[question](posterior, x, differentiable=True)
    assert_close(torch.autograd.grad(again.square().sum(), x)[0], gradient, 1e-10)


def test_differentiable_wherever_the_caller_is():
    """Gradients are on for the prediction, also under ``torch.no_grad()``."""
    made = problem("mlp", "regression")
    posterior = made.fitted()
    x = made.inputs.clone().requires_grad_()
    with torch.no_grad():
        prediction = posterior.predict(x, differentiable=True)
        covariance = posterior.functional_variance(x, differentiable=True)
    assert prediction.mean.requires_grad and prediction.variance.requires_grad and covariance.requires_grad


def test_differentiable_needs_inputs_with_gradients():
    made = problem("mlp")
    for options in ({}, {"method": "sample"}):
        with pytest.raises(ValueError, match=r"differentiable=True needs inputs.*requires_grad_"):
            made.fitted().predict(made.inputs, differentiable=True, **options)
    tokens = problem("lstm")
    with pytest.raises(ValueError, match="differentiable=True needs inputs"):
        tokens.fitted().functional_variance(tokens.inputs, differentiable=True)


def test_differentiable_inputs_may_come_from_a_network():
    """Part of a larger graph, such as an encoder in front."""
    made = problem("mlp")
    posterior = made.fitted()
    encoder = nn.Linear(2, 4).double()
    z = torch.randn(5, 2).double()
    posterior.predict(encoder(z), differentiable=True).square().sum().backward()
    assert encoder.weight.grad.abs().max() > 0
