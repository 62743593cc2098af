"""Hyperparameters by the evidence and by validation, against optimisers and loops of their own."""

import copy
import functools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

import kronlaplace as kl
from kronlaplace.laplace import tuning
from tests.support.output_shapes import problem
from tests.support.posteriors import ESTIMATORS, some_prior
from tests.support.tiers import examples
from tests.support.validation import GRID, PREDICTIVES, shifted

at_the_edge = pytest.mark.filterwarnings("ignore:the evidence is largest at the edge")
EVERY_LIKELIHOOD = ["classification", "binary", "regression", "heteroscedastic"]


@functools.cache
def fitted(network, likelihood, estimator="kfac"):
    return problem(network, likelihood).fitted(estimator)


def evidence_of(posterior):
    """A function of the logarithms of precisions and, in regression, of the noise."""
    noise = isinstance(posterior.likelihood, kl.Gaussian)

    def evidence(logs):
        values = np.exp(np.asarray(logs)).tolist()
        sigma = values.pop() if noise else None
        return float(posterior.log_marginal_likelihood(values if len(values) > 1 else values[0], sigma))

    return evidence


def logs_of(posterior):
    """Where the posterior is, as `evidence_of` takes it."""
    values = posterior.prior_precision.reshape(-1).tolist()
    if isinstance(posterior.likelihood, kl.Gaussian):
        values.append(posterior.likelihood.noise_std)
    return np.log(values)


# -- evidence ------------------------------------------------------------------------------------------------


@pytest.mark.quick(2)
@at_the_edge
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("likelihood", EVERY_LIKELIHOOD)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_scalar_optimum(network, likelihood, estimator):
    """As good as what a grid and golden sections find, or with a noise Nelder and Mead, from anywhere."""
    posterior = problem(network, likelihood).fitted(estimator, prior_precision=123.0).tune("evidence")
    evidence, found = evidence_of(posterior), logs_of(posterior)
    if len(found) == 1:
        grid = np.linspace(*np.log(tuning.PRECISION_BOUNDS), 100)
        center = grid[np.argmax([evidence([u]) for u in grid])]
        best = -minimize_scalar(lambda u: -evidence([u]), bracket=(center - 0.5, center + 0.5), method="golden").fun
    else:
        starts = [found, found + 1, np.zeros(2)]
        options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
        bests = [-minimize(lambda u: -evidence(u), u, method="Nelder-Mead", options=options).fun for u in starts]
        best = max(bests)
    assert float(posterior.log_marginal_likelihood()) >= best - 1e-6


@pytest.mark.quick(1)
@at_the_edge
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("likelihood", EVERY_LIKELIHOOD)
@pytest.mark.parametrize("network", ["mlp", "cnn", "norms"])
def test_layerwise_optimum(network, likelihood, estimator):
    if (network, likelihood) == ("norms", "heteroscedastic"):
        likelihood = "binary"
    posterior = problem(network, likelihood).fitted(estimator).tune(structure="layerwise")
    evidence, found = evidence_of(posterior), logs_of(posterior)
    best = evidence(found)
    low, high = np.log(tuning.PRECISION_BOUNDS)
    for i in range(len(found)):  # concave: no better along any axis is no better at all

        def along(u, i=i):
            logs = found.copy()
            logs[i] = u
            return -evidence(logs)

        bounds = (max(found[i] - 3, low), min(found[i] + 3, high))
        result = minimize_scalar(along, bounds=bounds, method="bounded", options={"xatol": 1e-9})
        assert -result.fun <= best + 1e-6
    options = {"xatol": 1e-7, "fatol": 1e-10, "maxiter": 500}
    assert -minimize(lambda u: -evidence(u), found, method="Nelder-Mead", options=options).fun <= best + 1e-6


@pytest.mark.parametrize("sampling", ["exact", "empirical"])
@pytest.mark.filterwarnings("ignore:sampling=.empirical.")
@at_the_edge
def test_optimum_with_every_sampling(sampling):
    """The empirical Fisher goes with another power of the noise."""
    made = problem("mlp", "regression")
    posterior = made.posterior().fit(made.data(), sampling=sampling).tune("evidence")
    evidence, found = evidence_of(posterior), logs_of(posterior)
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    best = -minimize(lambda u: -evidence(u), found + 0.5, method="Nelder-Mead", options=options).fun
    assert evidence(found) >= best - 1e-6


@pytest.mark.grid
@at_the_edge
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diagonal"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_optimum_does_not_depend_on_what_was_there_before(likelihood, structure):
    """Neither on prior precision of any structure nor noise, nor on predictions in between."""
    made = problem("cnn", likelihood)
    expected = logs_of(made.fitted().tune(structure=structure))
    for before in ("scalar", "vector"):
        posterior = made.fitted(prior_precision=some_prior(made, before)[0])
        if likelihood == "regression":
            posterior.likelihood = kl.Gaussian(30.0, noise_known=False)
        posterior.predict(made.inputs)
        np.testing.assert_array_equal(logs_of(posterior.tune(structure=structure)), expected)
        np.testing.assert_array_equal(logs_of(posterior.tune(structure=structure)), expected)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@at_the_edge
def test_optimum_at_another_temperature(temperature):
    made = problem("mlp", "regression")
    posterior = made.fitted(temperature=temperature).tune("evidence")
    evidence, found = evidence_of(posterior), logs_of(posterior)
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    assert -minimize(lambda u: -evidence(u), found + 0.1, method="Nelder-Mead", options=options).fun <= (
        evidence(found) + 1e-6
    )


@settings(max_examples=examples(15))
@given(data=st.data())
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diagonal"])
@pytest.mark.parametrize(("likelihood", "estimator"), [("classification", "kfac"), ("regression", "exact")])
def test_the_evidence_is_concave_in_logarithms(likelihood, estimator, structure, data):
    """Along any line, in precisions and noise at once: the middle is no lower than the mean of the ends."""
    posterior = fitted("mlp", likelihood, estimator)
    shapes = [block.shape for block in posterior.fisher.values()]
    n = {"scalar": 1, "layerwise": len(shapes), "diagonal": sum(map(math.prod, shapes))}[structure]
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    width = data.draw(st.floats(0.01, 8))
    noise = likelihood == "regression"
    a, b = (generator.normal(size=n + noise) * np.array([width] * n + [1] * noise) for _ in range(2))
    evidence = evidence_of(posterior)
    low = (evidence(a) + evidence(b)) / 2
    assert evidence((a + b) / 2) >= low - 1e-9 * abs(low)


@at_the_edge
@settings(max_examples=examples(15))
@given(
    precision=st.floats(-8, 8),
    noise=st.floats(-3, 3),
    structure=st.sampled_from(["scalar", "layerwise"]),
    likelihood=st.sampled_from(EVERY_LIKELIHOOD),
)
def test_tuning_never_loses(precision, noise, structure, likelihood):
    """Whatever was there before (within the bounds)."""
    posterior = problem("cnn", likelihood).fitted(prior_precision=10**precision)
    if likelihood == "regression":
        posterior.likelihood = kl.Gaussian(math.exp(noise))
    before = posterior.log_marginal_likelihood()
    assert posterior.tune(structure=structure).log_marginal_likelihood() >= before - 1e-9


@pytest.mark.quick(1)
@at_the_edge
@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "diagonal", "exact"])
@pytest.mark.parametrize(
    ("network", "likelihood"), [("mlp", "classification"), ("mlp", "regression"), ("norms", "binary")]
)
def test_more_freedom_is_more_evidence(network, likelihood, estimator):
    """Weight by weight ≥ layer by layer ≥ one for all, if the layers' optimum is within the range of the weights'."""
    made = problem(network, likelihood)
    tuned = {s: made.fitted(estimator).tune(structure=s) for s in ("scalar", "layerwise", "diagonal")}
    assert tuned["diagonal"].prior_precision.shape == (
        sum(math.prod(b.shape) for b in tuned["scalar"].fisher.values()),
    )
    value = {s: float(posterior.log_marginal_likelihood()) for s, posterior in tuned.items()}
    assert value["layerwise"] >= value["scalar"] - 1e-9
    assert value["diagonal"] >= value["scalar"] - 1e-9
    center = float(tuned["scalar"].prior_precision)
    ratios = tuned["diagonal"].prior_precision / center
    limit = tuning.DIAGONAL_RANGE * (1 + 1e-9)
    assert 1 / limit <= float(ratios.min()) and float(ratios.max()) <= limit
    layers = tuned["layerwise"].prior_precision / center
    if 1 / limit <= float(layers.min()) and float(layers.max()) <= limit:
        assert value["diagonal"] >= value["layerwise"] - 1e-6


def test_weight_by_weight_optimum():
    """Of a diagonal Fisher every weight has a problem of its own, solved by golden sections in the same range."""
    made = problem("mlp")
    scalar = float(made.fitted("diagonal").tune().prior_precision)
    posterior = made.fitted("diagonal").tune(structure="diagonal")
    values = torch.cat([b.values.flatten() for b in posterior.fisher.values()]).numpy() * posterior.fisher.n_examples
    theta = np.concatenate(
        [
            torch.cat([made.model[i].weight, made.model[i].bias[:, None]], dim=1).detach().flatten().numpy()
            for i in (0, 2)
        ]
    )
    edge = math.log(tuning.DIAGONAL_RANGE)
    bounds = (math.log(scalar) - edge, math.log(scalar) + edge)

    def loss(u, value, weight):
        return 0.5 * (math.exp(u) * weight**2 + math.log1p(value / math.exp(u)))

    best = sum(
        min(
            minimize_scalar(loss, bounds=bounds, args=pair, method="bounded", options={"xatol": 1e-10}).fun,
            *(loss(u, *pair) for u in bounds),
        )
        for pair in zip(values, theta, strict=True)
    )
    outputs = made.model(made.inputs).detach()
    fit = -float(torch.nn.functional.cross_entropy(outputs, made.targets, reduction="sum"))
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(fit - best, abs=2e-3)


# -- a noise that is known -----------------------------------------------------------------------------------


@at_the_edge
@pytest.mark.filterwarnings("ignore:sampling=.empirical.")
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diagonal"])
@pytest.mark.parametrize(("sampling", "temperature"), [("exact", 1.0), ("empirical", 0.5)])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 8.0])
def test_with_a_known_noise_only_the_prior_is_tuned(sigma, sampling, temperature, structure):
    """The gradient of the evidence in the precisions vanishes there, by autograd, or points out of the bounds."""
    made = problem("mlp", "regression")
    posterior = made.posterior(temperature=temperature).fit(made.data(), sampling=sampling)
    posterior.likelihood = kl.Gaussian(sigma)  # not that of the fit
    posterior.tune("evidence", structure)
    assert posterior.likelihood == kl.Gaussian(sigma)
    logs = posterior.prior_precision.log().requires_grad_()
    evidence = posterior.log_marginal_likelihood(logs.exp())
    (gradient,) = torch.autograd.grad(evidence, logs)
    low, high = (torch.tensor(bound, dtype=torch.float64).log() for bound in tuning.PRECISION_BOUNDS)
    if structure == "diagonal":
        center = made.posterior(temperature=temperature).fit(fisher=posterior.fisher)
        center.likelihood = kl.Gaussian(sigma)
        middle = center.tune("evidence").prior_precision.log()
        low, high = middle - math.log(tuning.DIAGONAL_RANGE), middle + math.log(tuning.DIAGONAL_RANGE)
    inside = ((logs > low + 1e-6) | (gradient > 0)) & ((logs < high - 1e-6) | (gradient < 0))
    assert float((gradient * inside).abs().max()) < (1e-2 if structure == "diagonal" else 1e-4)
    if structure == "scalar":
        assert posterior.tune("evidence", noise="tuned").likelihood != kl.Gaussian(sigma)  # it is another problem


@at_the_edge
def test_a_known_noise_in_a_linear_model_is_bayesian_linear_regression():
    """The exact marginal likelihood of ``y ~ N(0, σ² I + X Xᵀ / δ)``, over ``δ`` alone."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    y = y + 0.3 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    sigma = 0.5

    def negative_evidence(u):
        covariance = sigma**2 * torch.eye(40, dtype=torch.float64) + x @ x.T / math.exp(u)
        return -float(torch.distributions.MultivariateNormal(torch.zeros(40).double(), covariance).log_prob(y[:, 0]))

    expected = minimize_scalar(negative_evidence, bounds=(-10, 10), method="bounded", options={"xatol": 1e-10}).x
    model = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False)).double()
    log = 0.0
    for _ in range(40):  # the mode goes with the prior precision, and that with the mode
        ridge = x.T @ x + sigma**2 * math.exp(log) * torch.eye(3, dtype=torch.float64)
        with torch.no_grad():
            model[0].weight.copy_(torch.linalg.solve(ridge, x.T @ y).T)
        posterior = kl.KronLaplace(model, kl.Gaussian(sigma)).fit([(x, y)]).tune("evidence")
        log = math.log(posterior.prior_precision)
    assert log == pytest.approx(expected, abs=1e-4)  # 1e-9 nats, at which tuning stops
    assert posterior.likelihood.noise_std == sigma


@pytest.mark.quick(1)
@at_the_edge
@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diagonal"])
@pytest.mark.parametrize("name", ["default", "sample"])
def test_validation_with_a_known_noise(name, structure):
    """Picks the best of the grid at that noise, whatever the training error."""
    predictive = PREDICTIVES[name]
    made = problem("mlp", "regression")
    x, y = shifted(made)
    fisher = made.fitted().fisher
    sigma = 0.8

    def with_noise(**options):
        posterior = made.posterior(**options).fit(fisher=fisher)
        posterior.likelihood = kl.Gaussian(sigma)
        return posterior

    base = 1.0 if structure == "scalar" else with_noise().tune("evidence", structure).prior_precision

    def loss(factor):
        p = with_noise(prior_precision=base * factor).predict(
            x, method=predictive.method, n_samples=predictive.n_samples, seed=predictive.seed
        )
        return -kl.metrics.gaussian_log_likelihood(p.mean, p.total_variance, y)

    best = min(GRID, key=loss)
    posterior = with_noise().tune("validation", structure, [(x, y)], predictive=predictive, grid=GRID)
    assert posterior.likelihood == kl.Gaussian(sigma)
    torch.testing.assert_close(posterior.prior_precision, torch.as_tensor(base * best, dtype=torch.float64))


def test_training_with_a_known_noise():
    made = problem("mlp", "regression")
    trained = kl.train_by_evidence(copy.deepcopy(made.model), made.data(), kl.Gaussian(0.6), epochs=4, every=2)
    assert [record.likelihood for record in trained.history] == [kl.Gaussian(0.6)] * 2
    assert trained.posterior.likelihood == kl.Gaussian(0.6)
    assert len({float(record.prior_precision.sum()) for record in trained.history}) == 2


@pytest.mark.parametrize("likelihood", ["classification", "binary", "heteroscedastic"])
def test_a_noise_that_is_not_there_cannot_be_fixed(likelihood):
    made = problem("mlp", likelihood)
    with pytest.raises(ValueError, match=r'noise="fixed" would have no effect: .* has no noise_std'):
        made.fitted().tune(noise="fixed")
    with pytest.raises(ValueError, match='noise="fixed" would have no effect'):
        kl.train_by_evidence(made.model, made.data(), made.likelihood, noise="fixed")
    with pytest.raises(ValueError, match="unknown noise 'known'; allowed are 'tuned', 'fixed'"):
        made.fitted().tune(noise="known")


# -- noise and training error --------------------------------------------------------------------------------


def interpolating(n):
    """Noisy data and the features whose least squares fit goes through (nearly) all of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 20, generator=generator, dtype=torch.float64)
    y = x[:, :1] + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Linear(20, 1, bias=False)).double()
    with torch.no_grad():
        ridge = x.T @ x + 1e-3 * torch.eye(20, dtype=torch.float64)
        model[0].weight.copy_(torch.linalg.solve(ridge, x.T @ y).T)
    return model, x, y


@at_the_edge
@pytest.mark.parametrize(("n", "suspicious"), [(20, True), (22, False), (200, False)])
def test_a_noise_that_training_errors_do_not_show_is_said(n, suspicious):
    """With as many weights as targets the errors vanish and say nothing of the noise; ``σ² = SSE / (n − γ)``."""
    model, x, y = interpolating(n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = kl.KronLaplace(model, "regression", "exact").fit([(x, y)]).tune("evidence")
    error = float((model(x) - y).square().mean().sqrt().detach())
    ratio = posterior.likelihood.noise_std / error
    said = [w for w in caught if "noise_std" in str(w.message)]
    assert (ratio > 4) == suspicious == bool(said)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x) / posterior.likelihood.noise_std**2
    effective = float((eigenvalues / (eigenvalues + posterior.prior_precision)).sum())
    assert ratio == pytest.approx((1 - effective / n) ** -0.5, rel=1e-3)
    for w in said:
        assert w.filename == __file__
        assert f"is {ratio:.3g} times the network's root mean square error on the training data" in str(w.message)
        assert "if the noise is known set it" in str(w.message)


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
def test_validation_errors_far_from_those_of_training_are_said():
    model, x, y = interpolating(60)
    posterior = kl.KronLaplace(model, "regression").fit([(x, y)])
    with pytest.warns(UserWarning, match="the tuned noise_std, .* errors on the validation data are so much larger"):
        posterior.tune("validation", data=[(x, 1000 * y)], grid=[1.0])
    posterior.tune("validation", data=[(x, y)], grid=[1.0])
    posterior.tune("validation", data=[(x, 1000 * y)], grid=[1.0], noise="fixed")


@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_zero_weights_are_at_the_edge(structure):
    """The data say nothing of how small they are: infinitely precise, and said so at the line that asked."""
    made = problem("mlp")
    posterior = made.fitted(prior_mean=made.model.state_dict())
    with pytest.warns(UserWarning, match="at the edge of the range searched for: prior precision") as caught:
        posterior.tune(structure=structure)
    assert caught[0].filename == __file__
    assert (posterior.prior_precision > 1e6).all()


def test_a_better_prior_mean_is_more_evidence():
    """Weights near the prior mean: a larger precision and a higher evidence than around zero."""
    made = problem("mlp")
    near = {name: p + 0.1 * torch.randn_like(p) for name, p in made.model.state_dict().items()}
    zero, other = made.fitted().tune(), made.fitted(prior_mean=near).tune()
    assert other.prior_precision > zero.prior_precision
    assert other.log_marginal_likelihood() > zero.log_marginal_likelihood()


def test_the_evidence_takes_no_data():
    posterior = fitted("mlp", "classification")
    for options in ({"data": [], "logit_scale": "fixed"}, {"grid": [1.0]}, {"predictive": kl.Predictive()}):
        with pytest.raises(TypeError, match="the evidence does not use them"):
            posterior.tune(**options)
    with pytest.raises(ValueError, match="unknown method 'marglik'; allowed are 'evidence', 'exact-evidence', 'valid"):
        posterior.tune("marglik")
    with pytest.raises(ValueError, match="unknown structure 'all'"):
        posterior.tune(structure="all")
    made = problem("mlp")
    with pytest.raises(ValueError, match="the evidence needs targets"):
        made.posterior().fit([x for x, _ in made.data()]).tune()
