"""Predictions of every kind against dense algebra and loops in float64: joint, by position, differentiable, streamed."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from kronlaplace.blocks.basis import Basis
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.likelihoods.links import Link
from tests.support import oracles
from tests.support.cases import case
from tests.support.networks import Residual
from tests.support.output_shapes import RTOL, assert_close, outputs_and_covariance, problem, within
from tests.support.posteriors import Problem, some_prior

# -- several inputs at once ----------------------------------------------------------------------------------

JOINT = ["linear", "mlp", "cnn", "sequence", "depthwise", "norms", "lstm", "reused", "segmentation", "tokens", "flat"]


@pytest.mark.quick(1)
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
    monkeypatch.setattr("kronlaplace.laplace.layer_covariance.BUDGET", 1)
    monkeypatch.setattr("kronlaplace.laplace.linearized._FIRST_CHUNK", 1)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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
            # The links of differences have a variance for each class whatever is asked; it is not that of the class alone.
            alone = link not in (Link.MARGIN, Link.CENTERED_PROBIT)
            block = block.diagonal(dim1=1, dim2=2) if diagonal and alone else block
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


@pytest.mark.quick(3)
@pytest.mark.parametrize("layers", [None, "last"])
@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "exact", "diagonal"])
@pytest.mark.parametrize("network", ["mlp", "cnn", "tokens", "segmentation"])
def test_variances_of_margins_equal_dense(network, estimator, layers):
    """Of every class less the most probable one, another at every position: the dense covariance between contrasts."""
    made = problem(network)
    posterior = made.fitted(estimator, prior_precision=0.5, layers=layers)
    _, covariance = outputs_and_covariance(made, posterior)
    f, actual = posterior._predictor().outputs_and_covariance(made.inputs, OutputCovariance.MARGIN_VARIANCES)
    axis = posterior.likelihood.class_axis_of(f)
    index = torch.arange(f[0].numel()).view(f.shape[1:])
    expected = torch.zeros_like(f).flatten(1)
    for group in index.movedim(axis - 1, -1).reshape(-1, f.shape[axis]):
        for n, row in enumerate(f.flatten(1)[:, group]):
            A = torch.eye(len(row), dtype=torch.float64)
            A[:, int(row.argmax())] -= 1
            expected[n, group] = (A @ covariance[n, group][:, n, group] @ A.T).diagonal()
    assert_close(actual, expected.view(f.shape))


def test_variances_of_margins_withstand_a_shift_of_all_outputs():
    """The data say nothing of a shift common to all classes, so its variance can exceed all others by far."""
    columns = torch.cat([torch.ones(4, 1), torch.randn(4, 3)], dim=1).double()
    basis = torch.linalg.qr(columns).Q  # its first column is the shift
    spread = torch.rand(5, 1, 4).double()
    spread[..., 0] = 1e8
    covariance = (basis[:, 1:] * spread[..., 1:]) @ basis[:, 1:].T  # margins have nothing of the shift
    top = torch.tensor([0, 3, 1, 2, 3])
    A = torch.eye(4).double() - torch.nn.functional.one_hot(top, 4).unsqueeze(1)
    expected = (A @ covariance @ A.mT).diagonal(dim1=1, dim2=2)
    for dtype, difference in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        s, Q = spread.to(dtype), basis.to(dtype)
        actual = Basis(Q.unsqueeze(0)).margin_variances(s, s @ (Q - Q.mean(0)).square().T, top.unsqueeze(1))
        assert_close(actual.squeeze(1).double(), expected, difference)


def test_the_default_links():
    for likelihood, link in (("classification", "margin"), ("binary", "probit")):
        made = problem("mlp", likelihood)
        posterior = made.fitted()
        assert_close(posterior.predict(made.inputs), posterior.predict(made.inputs, link=link), 0)


@pytest.mark.quick(1)
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


@pytest.mark.quick(2)
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


@pytest.mark.grid
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


@pytest.mark.quick(3)
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


@pytest.mark.grid
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
    """Residual with random running statistics, as in `tests.support.networks`, of all outputs at once."""
    torch.manual_seed(1)
    made = case(Residual(), torch.randn(4, 2, 4, 5), 4)
    problem = Problem(made.model, made.inputs, made.targets, "classification", oracles.blocks(made.model))
    posterior = problem.fitted()
    _, covariance = outputs_and_covariance(problem, posterior)
    assert_close(posterior.functional_variance(made.inputs, joint=True), covariance.reshape(16, 16))


@pytest.mark.quick(1)
@pytest.mark.parametrize("diagonal", [False, True])
def test_draws_of_the_outputs_take_bounded_memory(diagonal, monkeypatch):
    """As many draws at a time as the budget allows; the average is over all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5)).double()
    x = torch.randn(10, 4, dtype=torch.float64)
    posterior = kl.KronLaplace(model, "classification").fit([(x, torch.randint(5, (10,)))])
    predictive = {"link": "mc", "n_samples": 20_000, "diagonal": diagonal}
    whole = posterior.predict(x, **predictive)
    monkeypatch.setattr("kronlaplace.likelihoods.links._BUDGET", 3 * 50 + 1)
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
