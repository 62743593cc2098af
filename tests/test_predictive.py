"""Predictions of every kind against dense algebra and loops in float64: joint, by position, differentiable, streamed."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from kronlaplace.links import Link
from kronlaplace.observer import NetworkObserver
from tests import oracles
from tests.architectures import case
from tests.networks import Residual
from tests.test_leaves_no_trace import assert_unchanged, everything
from tests.test_priors import Problem, dense_precision, some_prior
from tests.test_priors import problem as problem_of

RTOL = 1e-8
GLM_LINKS = [Link.PROBIT, Link.CENTERED_PROBIT, Link.MC, Link.BRIDGE]


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
    """As in `tests.test_priors`, and more networks."""
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


def assert_close(actual, expected, rtol=RTOL):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


# -- several inputs at once ----------------------------------------------------------------------------------

JOINT = ["linear", "mlp", "cnn", "sequence", "depthwise", "norms", "lstm", "reused", "segmentation", "tokens", "flat"]


@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "exact", "diagonal"])
@pytest.mark.parametrize("network", JOINT)
def test_joint_covariance_equals_dense(network, estimator):
    """Of all outputs of all examples, examples in front."""
    made = problem(network, "regression")
    posterior = made.fitted(estimator, prior_precision=0.5, temperature=0.8)
    outputs, expected = outputs_and_covariance(made, posterior)
    joint = posterior.functional_variance(made.inputs, joint=True)
    assert_close(joint, expected.reshape(outputs.numel(), outputs.numel()))
    assert_close(posterior.functional_variance(made.inputs), within(expected))
    prediction = posterior.predict(made.inputs, joint=True)
    assert isinstance(prediction, kl.JointPrediction)
    assert_close(prediction.covariance, joint, 1e-12)
    noise = 0.36 * torch.eye(outputs.numel(), dtype=torch.float64)
    assert_close(prediction.total_covariance, joint + noise, 1e-12)
    marginal = posterior.predict(made.inputs)
    for name in ("mean", "variance", "total_variance", "noise_variance"):
        assert getattr(prediction, name).shape == getattr(marginal, name).shape
        assert_close(getattr(prediction, name), getattr(marginal, name))


@pytest.mark.parametrize("structure", ["layerwise", "vector"])
@pytest.mark.parametrize("layers", [None, "last", ["0"]])
def test_joint_covariance_with_other_priors_and_layers(layers, structure):
    made = problem("mlp", "regression")
    kept = {"last": ["2"], None: ["0", "2"]}.get(layers, layers) if not isinstance(layers, list) else layers
    part = dataclasses.replace(made, blocks={name: made.blocks[name] for name in kept})
    precision, D = some_prior(part, structure)
    posterior = made.fitted(layers=layers, prior_precision=precision)
    _, expected = outputs_and_covariance(made, posterior, D)
    assert_close(posterior.functional_variance(made.inputs, joint=True), expected.reshape(28, 28))


@pytest.mark.parametrize("estimator", ["kfac", "exact"])
def test_joint_prediction_with_predicted_noise(estimator):
    """Covariances of the means only; the noise is the expected one, ``exp(s + var s / 2)``."""
    made = problem("mlp", "heteroscedastic")
    posterior = made.fitted(estimator)
    f, covariance = outputs_and_covariance(made, posterior)
    n = len(f)
    prediction = posterior.predict(made.inputs, joint=True)
    assert_close(prediction.covariance, covariance[:, :2, :, :2].reshape(2 * n, 2 * n))
    variance = within(covariance).diagonal(dim1=1, dim2=2)
    noise = torch.exp(f[:, 2:] + variance[:, 2:] / 2)
    assert_close(prediction.noise_variance, noise)
    assert_close(prediction.total_covariance, prediction.covariance + torch.diag(noise.flatten()), 1e-12)
    assert_close(prediction.mean, f[:, :2])
    assert_close(prediction.variance, variance[:, :2])
    assert_close(posterior.functional_variance(made.inputs, joint=True), covariance.reshape(4 * n, 4 * n))


def test_joint_does_not_depend_on_chunks(monkeypatch):
    made = problem("sequence", "regression")
    posterior = made.fitted()
    expected = posterior.functional_variance(made.inputs, joint=True)
    monkeypatch.setattr("kronlaplace.laplace.terms.BUDGET", 1)
    monkeypatch.setattr("kronlaplace.laplace.functional._FIRST_CHUNK", 1)
    assert_close(posterior.functional_variance(made.inputs, joint=True), expected, 1e-12)


def test_joint_is_refused_where_it_has_no_meaning():
    made, classifier = problem("mlp", "regression"), problem("mlp")
    posterior = made.fitted()
    with pytest.raises(ValueError, match=r"joint=True is for regression.*use functional_variance\(x, joint=True\)"):
        classifier.fitted().predict(classifier.inputs, joint=True)
    for call in (
        lambda: posterior.predict(made.data(), joint=True),
        lambda: posterior.predict(made.inputs, joint=True, method="sample"),
    ):
        with pytest.raises(ValueError, match="inputs that come at once"):
            call()
    with pytest.raises(ValueError, match="needs the inputs at once"):
        posterior.functional_variance(made.data(), joint=True)
    with pytest.raises(ValueError, match="diagonal=True is variances only"):
        posterior.functional_variance(made.inputs, joint=True, diagonal=True)


# -- outputs with positions ----------------------------------------------------------------------------------

POSITIONS = [
    ("tokens", "classification", 2),
    ("segmentation", "classification", 1),
    ("tokens", "binary", None),
    ("single-tokens", "binary", None),
    ("segmentation", "binary", None),
    ("tokens", "regression", None),
    ("segmentation", "regression", None),
    ("flat", "regression", None),
    ("flat", "binary", None),
]


@pytest.mark.parametrize("estimator", ["kfac", "exact"])
@pytest.mark.parametrize(("network", "likelihood", "axis"), POSITIONS)
def test_variances_of_outputs_with_positions_equal_dense(network, likelihood, axis, estimator):
    """All axes behind the first count as one, row-major; alone the variances keep their shape."""
    made = problem(network, likelihood)
    posterior = made.fitted(estimator, prior_precision=0.5)
    f, covariance = outputs_and_covariance(made, posterior)
    assert_close(posterior.functional_variance(made.inputs), within(covariance))
    variance = within(covariance).diagonal(dim1=1, dim2=2)
    shape = (len(f), 1) if network == "flat" else made.model(made.inputs).shape
    assert_close(posterior.functional_variance(made.inputs, diagonal=True), variance.reshape(shape))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("network", "likelihood", "axis"), POSITIONS)
def test_predictions_go_position_by_position(network, likelihood, axis, diagonal):
    """A loop over positions that asks the likelihood with the dense covariance of that position's outputs."""
    made = problem(network, likelihood)
    posterior = made.fitted(prior_precision=0.5)
    _, covariance = outputs_and_covariance(made, posterior)
    covariance = within(covariance)
    outputs = made.model(made.inputs).detach()
    n, links = len(outputs), made.likelihood.links or (None,)
    for link in links:
        draws = {"n_samples": 4000} if link is Link.MC else {}
        p = posterior.predict(made.inputs, link=link, diagonal=diagonal and link in (Link.MC, Link.BRIDGE), **draws)
        parts = [p] if isinstance(p, torch.Tensor) else [p.mean, p.variance]
        assert all(part.shape == outputs.shape for part in parts)
        index = torch.arange(outputs[0].numel()).view(outputs.shape[1:])
        groups = index.reshape(-1, 1) if axis is None else index.movedim(axis - 1, -1).reshape(-1, outputs.shape[axis])
        for group in groups:
            mean, block = outputs.reshape(n, -1)[:, group], covariance[:, group][:, :, group]
            # The centred link has a variance for each class whatever is asked; it is not that of the class alone.
            block = block.diagonal(dim1=1, dim2=2) if diagonal and link is not Link.CENTERED_PROBIT else block
            expected = made.likelihood.predictive(
                mean, block, link or Link.PROBIT, 4000, torch.Generator().manual_seed(7)
            )
            expected = [expected] if isinstance(expected, torch.Tensor) else [expected.mean, expected.variance]
            for actual, wanted in zip(parts, expected, strict=True):
                # Two sets of 4,000 draws of numbers between 0 and 1, within six standard errors of at most ½ √(2/n).
                atol = 3 * math.sqrt(2 / 4000) if link is Link.MC else RTOL
                torch.testing.assert_close(actual.reshape(n, -1)[:, group], wanted, rtol=RTOL, atol=atol)
        if axis is not None:
            torch.testing.assert_close(p.sum(axis), torch.ones_like(p.sum(axis)))


@pytest.mark.parametrize("network", ["tokens", "segmentation"])
@pytest.mark.parametrize("method", ["glm", "sample"])
def test_the_fit_tells_where_the_classes_are(network, method, tmp_path):
    """Targets tell it, and predictions have none: so it is remembered, in files, too."""
    made = problem(network)
    axis = {"tokens": -1, "segmentation": 1}[network]
    posterior = kl.KronLaplace(made.model, kl.Categorical())
    assert posterior.likelihood.class_axis is None
    posterior.fit(made.data())
    assert posterior.likelihood == kl.Categorical(class_axis=axis)
    posterior.save(tmp_path / "p")
    given = kl.KronLaplace(made.model, kl.Categorical(class_axis=axis)).fit(made.data())
    for other in (posterior, kl.KronLaplace.load(tmp_path / "p", made.model)):
        p = other.predict(made.inputs, method=method)
        torch.testing.assert_close(p.sum(axis), torch.ones_like(p.sum(axis)))
        assert_close(p, given.predict(made.inputs, method=method))


# -- where the last layer's output is the network's ----------------------------------------------------------


def hidden(made):
    """The same network with its last layer hidden."""
    model = Hidden(copy.deepcopy(made.model))
    return Problem(model, made.inputs, made.targets, made.name, oracles.blocks(model))


ENDS_WITH_LAYER = ["linear", "mlp", "cnn", "sequence", "residual", "transformer", "lstm", "norms", "tokens", "gru"]


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


# -- differentiable ------------------------------------------------------------------------------------------

DIFFERENTIABLE = ["linear", "mlp", "cnn", "sequence", "residual", "norms", "gru", "tokens", "segmentation"]
QUESTIONS = {
    "covariance": lambda p, x, **d: p.functional_variance(x, **d),
    "variances": lambda p, x, **d: p.functional_variance(x, diagonal=True, **d),
    "joint": lambda p, x, **d: p.functional_variance(x, joint=True, **d),
    "probit": lambda p, x, **d: p.predict(x, **d),
    "mc": lambda p, x, **d: p.predict(x, link="mc", n_samples=5, **d),
    "mc, diagonal": lambda p, x, **d: p.predict(x, link="mc", n_samples=5, diagonal=True, **d),
    "bridge": lambda p, x, **d: p.predict(x, link="bridge", **d),
    "sample": lambda p, x, **d: p.predict(x, method="sample", n_samples=3, **d),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("network", DIFFERENTIABLE)
def test_derivatives_by_the_inputs(network, question, monkeypatch):
    """In two chunks; the values are those of the plain mode."""
    monkeypatch.setattr("kronlaplace.laplace.functional._FIRST_CHUNK", 1)
    made = problem(network)
    posterior = made.fitted(prior_precision=0.5)
    x = made.inputs[:2].clone().requires_grad_()
    ask = QUESTIONS[question]
    assert_close(ask(posterior, x, differentiable=True).detach(), ask(posterior, x), 1e-10)
    assert not ask(posterior, x).requires_grad
    assert torch.autograd.gradcheck(lambda x: ask(posterior, x, differentiable=True), x, fast_mode=True)


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


@pytest.mark.parametrize("link", ["probit", "centered-probit", "mc", "bridge"])
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


@pytest.mark.parametrize("link", ["probit", "centered-probit", "mc", "bridge"])
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


def test_draws_of_the_outputs_are_continuous_in_the_inputs():
    """The same draws for inputs that are next to each other: no jumps where eigenvectors change their sign or order."""
    made = problem("mlp")
    posterior = made.fitted(prior_precision=0.5)
    path = made.inputs[:1] + torch.linspace(0, 2, 401, dtype=torch.float64)[:, None]
    p = torch.cat([posterior.predict(x, link="mc", n_samples=5) for x in path.split(1)])
    assert (p[1:] - p[:-1]).abs().max() < 0.02


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


# -- loaders -------------------------------------------------------------------------------------------------


def streams(x, y):
    data = TensorDataset(x, y)
    return {
        "loader with targets": lambda: DataLoader(data, batch_size=3),
        "loader without targets": lambda: DataLoader(TensorDataset(x), batch_size=4),
        "pairs": lambda: list(zip(x.split(2), y.split(2), strict=True)),
        "generator": lambda: (part for part in x.split(3)),
        "one batch": lambda: [(x, y)],
    }


@pytest.mark.parametrize("stream", streams(torch.zeros(1), torch.zeros(1)))
@pytest.mark.parametrize(
    ("network", "likelihood"),
    [("mlp", "classification"), ("segmentation", "classification"), ("mlp", "heteroscedastic"), ("flat", "regression")],
)
def test_batches_equal_the_whole(network, likelihood, stream):
    made = problem(network, likelihood)
    posterior = made.fitted()
    make = streams(made.inputs, made.targets)[stream]
    asked = [{}, {"method": "sample", "n_samples": 3}] + [{"link": "bridge"}] * (likelihood == "classification")
    for options in asked:
        whole, parts = posterior.predict(made.inputs, **options), posterior.predict(make(), **options)
        if isinstance(whole, torch.Tensor):
            assert_close(parts, whole, 1e-10)
            continue
        for name in ("mean", "variance", "noise_variance", "total_variance"):
            assert_close(getattr(parts, name), getattr(whole, name), 1e-10)
    for diagonal in (False, True):
        whole = posterior.functional_variance(made.inputs, diagonal)
        assert_close(posterior.functional_variance(make(), diagonal), whole, 1e-10)


def test_more_examples_than_one_chunk():
    made = problem("mlp")
    posterior = made.fitted()
    x = torch.randn(300, 4).double()
    one_by_one = torch.cat([posterior.functional_variance(part) for part in x.split(1)])
    assert_close(posterior.functional_variance(x), one_by_one, 1e-10)
    assert_close(posterior.predict(iter(x.split(7))), posterior.predict(x), 1e-10)


@pytest.mark.parametrize("own", [False, True])
def test_random_states_are_left_alone(own):
    """The global one, and that of a loader which shuffles by itself."""
    made = problem("mlp")
    posterior = made.fitted()
    generator = torch.Generator().manual_seed(3) if own else None
    loader = DataLoader(TensorDataset(made.inputs, made.targets), 2, shuffle=True, generator=generator)
    generators = [torch.default_generator, *([generator] if own else [])]
    states = [g.get_state() for g in generators]
    posterior.predict(loader)
    posterior.predict(loader, link="mc")
    posterior.predict(loader, method="sample", n_samples=2)
    posterior.functional_variance(loader)
    posterior.sample(2)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))


def test_streamed_predictions_can_be_differentiated():
    made = problem("mlp")
    posterior = made.fitted()
    x = made.inputs.clone().requires_grad_()
    whole = torch.autograd.grad(posterior.predict(x, differentiable=True).square().sum(), x)[0]
    parts = torch.autograd.grad(posterior.predict(iter(x.split(2)), differentiable=True).square().sum(), x)[0]
    assert_close(parts, whole, 1e-10)


def test_bad_streams_are_refused():
    posterior = problem("mlp").fitted()
    with pytest.raises(ValueError, match="the data is empty"):
        posterior.predict([])
    with pytest.raises(TypeError, match="batch 0: expected a pair"):
        posterior.predict([1, 2])
    with pytest.raises(ValueError, match="inputs must be a tensor with at least one example"):
        posterior.predict(3)
    with pytest.raises(ValueError, match="NaN or infinite"):
        posterior.predict(iter([torch.full((2, 4), math.nan)]))


# -- draws in mirrored pairs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["kfac", "exact"])
@pytest.mark.parametrize("network", ["mlp", "lstm", "norms"])
def test_antithetic_draws_mirror_each_other(network, estimator):
    """About the trained weights, two by two; each is a draw of its own."""
    made = problem(network)
    posterior = made.fitted(estimator, prior_precision=some_prior(made, "vector")[0])
    draws = posterior.sample(6, antithetic=True, seed=5)
    for name, draw in draws.items():
        assert draw.shape == (6, *made.model.get_parameter(name).shape)
        trained = made.model.get_parameter(name).detach().expand(3, *draw.shape[1:])
        torch.testing.assert_close((draw[::2] + draw[1::2]) / 2, trained, rtol=1e-12, atol=1e-12)
        assert not torch.equal(draw[0], draw[2])
        assert torch.equal(posterior.sample(6, antithetic=True, seed=5)[name], draw)
        assert torch.equal(posterior.sample(3, seed=5)[name], draw[::2])


@pytest.mark.parametrize("n", [2, 6])
def test_antithetic_predictions_of_a_linear_network_have_the_exact_mean(n):
    """Linear in the parameters of its last layer: what is odd cancels, whatever is drawn."""
    made = problem("mlp", "regression")
    posterior = made.fitted(layers=["2"])
    prediction = posterior.predict(made.inputs, method="sample", n_samples=n, antithetic=True)
    torch.testing.assert_close(prediction.mean, made.model(made.inputs).detach(), rtol=1e-12, atol=1e-12)
    plain = posterior.predict(made.inputs, method="sample", n_samples=n)
    assert (plain.mean - prediction.mean).abs().max() > 1e-3


def test_variance_of_few_antithetic_samples_is_unbiased():
    """One pair at a time: the mean over 500 seeds is the variance, within six standard errors."""
    made = problem("mlp", "regression")
    posterior = made.fitted(layers=["2"])
    x = made.inputs[:1]
    few = [
        posterior.predict(x, method="sample", n_samples=2, antithetic=True, seed=seed).variance for seed in range(500)
    ]
    torch.testing.assert_close(
        torch.stack(few).mean(0), posterior.predict(x).variance, rtol=6 * math.sqrt(2 / 500), atol=0
    )


def test_odd_numbers_of_antithetic_draws_are_refused():
    made = problem("mlp")
    posterior = made.fitted()
    with pytest.raises(ValueError, match="antithetic draws come in pairs: n must be even, got 3"):
        posterior.sample(3, antithetic=True)
    with pytest.raises(ValueError, match="antithetic draws come in pairs: n_samples must be even, got 5"):
        posterior.predict(made.inputs, method="sample", antithetic=True, n_samples=5)


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["mc", "bridge"])
@pytest.mark.parametrize("network", ["mlp", "tokens"])
def test_links_with_variances_only(network, link):
    made = problem(network)
    posterior = made.fitted()
    draws = {"n_samples": 50} if link == "mc" else {}
    actual = posterior.predict(made.inputs, link=link, diagonal=True, seed=11, **draws)
    f = made.model(made.inputs).detach()
    variance = posterior.functional_variance(made.inputs, diagonal=True)
    generator = torch.Generator().manual_seed(11)
    assert_close(actual, made.likelihood.predictive(f, variance, Link(link), 50, generator), 1e-10)
    assert (actual - posterior.predict(made.inputs, link=link, seed=11, **draws)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sample", "link": "mc"}, "link='mc' would have no effect: method=\"sample\" needs none"),
        ({"n_samples": 5}, "n_samples=5 would have no effect"),
        ({"link": "probit", "n_samples": 5}, "n_samples=5 would have no effect"),
        ({"antithetic": True}, "antithetic=True would have no effect"),
        ({"link": "mc", "antithetic": True}, "antithetic=True would have no effect"),
        ({"method": "sample", "diagonal": True}, "diagonal=True would have no effect"),
        ({"diagonal": True}, "diagonal=True would have no effect"),
        ({"method": "lla"}, "unknown method 'lla'"),
        ({"link": "softmax"}, "unknown link 'softmax'"),
        ({"method": "sample", "n_samples": 0}, "n_samples must be at least 1"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    made = problem("mlp")
    posterior = made.fitted()
    for call in (lambda: posterior.predict(made.inputs, **options), lambda: kl.Predictive(**options)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("likelihood", "link", "message"),
    [
        ("regression", "probit", "link='probit' would have no effect: Gaussian"),
        ("heteroscedastic", "mc", "link='mc' would have no effect: Hetero"),
        ("binary", "bridge", r"link 'bridge' is not for Bernoulli\(\); allowed are \['probit', 'mc'\]"),
    ],
)
def test_links_of_other_likelihoods_are_refused(likelihood, link, message):
    made = problem("mlp", likelihood)
    with pytest.raises(ValueError, match=message):
        made.fitted().predict(made.inputs, link=link)


def test_in_place_activations_right_behind_a_layer():
    """Residual with random running statistics, as in `tests.networks`, of all outputs at once."""
    torch.manual_seed(1)
    made = case(Residual(), torch.randn(4, 2, 4, 5), 4)
    problem = Problem(made.model, made.inputs, made.targets, "classification", oracles.blocks(made.model))
    posterior = problem.fitted()
    _, covariance = outputs_and_covariance(problem, posterior)
    assert_close(posterior.functional_variance(made.inputs, joint=True), covariance.reshape(16, 16))


@pytest.mark.parametrize("diagonal", [False, True])
def test_draws_of_the_outputs_take_bounded_memory(diagonal, monkeypatch):
    """As many draws at a time as the budget allows; the average is over all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5)).double()
    x = torch.randn(10, 4, dtype=torch.float64)
    posterior = kl.KronLaplace(model, "classification").fit([(x, torch.randint(5, (10,)))])
    predictive = {"link": "mc", "n_samples": 20_000, "diagonal": diagonal}
    whole = posterior.predict(x, **predictive)
    monkeypatch.setattr("kronlaplace.links._BUDGET", 3 * 50 + 1)
    shapes = []
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: shapes.append(size) or draw(*size, **options))
    parts = posterior.predict(x, **predictive)
    assert {size[0] for size in shapes} == {3, 20_000 % 3}
    assert sum(size[0] for size in shapes) == 20_000
    torch.testing.assert_close(parts, whole, atol=0.02, rtol=0)  # other draws: 0.5 / sqrt(20,000) is a standard error


def test_draws_of_a_joint_prediction():
    """Their covariance is the joint covariance, also where that is singular: more inputs than weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 2)).double()
    x = torch.randn(5, 1, dtype=torch.float64)
    posterior = kl.KronLaplace(model, "regression").fit([(x, torch.randn(5, 2, dtype=torch.float64))])
    joint = posterior.predict(x, joint=True)
    n = 20_000
    draws = joint.sample(n, seed=1)
    assert draws.shape == (n, 5, 2)
    variance = joint.covariance.diagonal()
    error = torch.sqrt((torch.outer(variance, variance) + joint.covariance**2) / n)
    assert ((draws.flatten(1).T.cov() - joint.covariance).abs() / error).max() < 6
    assert ((draws.mean(0) - joint.mean).flatten().abs() / (variance / n).sqrt()).max() < 6
    assert torch.equal(draws, joint.sample(n, seed=1))
