"""Hyperparameters by the evidence and by validation, against optimisers and loops of their own."""

import copy
import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from kronlaplace.laplace import tuning
from tests.support.output_shapes import problem
from tests.support.posteriors import ESTIMATORS, STRUCTURES, some_prior

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


@at_the_edge
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("likelihood", EVERY_LIKELIHOOD)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_scalar_optimum(network, likelihood, estimator):
    """As good as what a grid and golden sections find, or with a noise Nelder and Mead, from anywhere."""
    posterior = problem(network, likelihood).fitted(estimator, prior_precision=123.0).tune()
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
    posterior = made.posterior().fit(made.data(), sampling=sampling).tune()
    evidence, found = evidence_of(posterior), logs_of(posterior)
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    best = -minimize(lambda u: -evidence(u), found + 0.5, method="Nelder-Mead", options=options).fun
    assert evidence(found) >= best - 1e-6


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
            posterior.likelihood = kl.Gaussian(30.0)
        posterior.predict(made.inputs)
        np.testing.assert_array_equal(logs_of(posterior.tune(structure=structure)), expected)
        np.testing.assert_array_equal(logs_of(posterior.tune(structure=structure)), expected)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@at_the_edge
def test_optimum_at_another_temperature(temperature):
    made = problem("mlp", "regression")
    posterior = made.fitted(temperature=temperature).tune()
    evidence, found = evidence_of(posterior), logs_of(posterior)
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    assert -minimize(lambda u: -evidence(u), found + 0.1, method="Nelder-Mead", options=options).fun <= (
        evidence(found) + 1e-6
    )


@settings(max_examples=15)
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
@settings(max_examples=15)
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
    posterior.tune(structure=structure, noise="fixed")
    assert posterior.likelihood == kl.Gaussian(sigma)
    logs = posterior.prior_precision.log().requires_grad_()
    evidence = posterior.log_marginal_likelihood(logs.exp())
    (gradient,) = torch.autograd.grad(evidence, logs)
    low, high = (torch.tensor(bound, dtype=torch.float64).log() for bound in tuning.PRECISION_BOUNDS)
    if structure == "diagonal":
        center = made.posterior(temperature=temperature).fit(fisher=posterior.fisher)
        center.likelihood = kl.Gaussian(sigma)
        middle = center.tune(noise="fixed").prior_precision.log()
        low, high = middle - math.log(tuning.DIAGONAL_RANGE), middle + math.log(tuning.DIAGONAL_RANGE)
    inside = ((logs > low + 1e-6) | (gradient > 0)) & ((logs < high - 1e-6) | (gradient < 0))
    assert float((gradient * inside).abs().max()) < (1e-2 if structure == "diagonal" else 1e-4)
    if structure == "scalar":
        assert posterior.tune().likelihood != kl.Gaussian(sigma)  # and with the noise it is another problem


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
        posterior = kl.KronLaplace(model, kl.Gaussian(sigma)).fit([(x, y)]).tune(noise="fixed")
        log = math.log(posterior.prior_precision)
    assert log == pytest.approx(expected, abs=1e-4)  # 1e-9 nats, at which tuning stops
    assert posterior.likelihood.noise_std == sigma


@at_the_edge
@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diagonal"])
@pytest.mark.parametrize("name", ["probit", "sample"])
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

    base = 1.0 if structure == "scalar" else with_noise().tune(structure=structure, noise="fixed").prior_precision

    def loss(factor):
        p = with_noise(prior_precision=base * factor).predict(
            x, method=predictive.method, n_samples=predictive.n_samples, seed=predictive.seed
        )
        return -kl.metrics.gaussian_log_likelihood(p.mean, p.total_variance, y)

    best = min(GRID, key=loss)
    posterior = with_noise().tune("validation", structure, [(x, y)], noise="fixed", predictive=predictive, grid=GRID)
    assert posterior.likelihood == kl.Gaussian(sigma)
    torch.testing.assert_close(posterior.prior_precision, torch.as_tensor(base * best, dtype=torch.float64))


def test_training_with_a_known_noise():
    made = problem("mlp", "regression")
    trained = kl.train_by_evidence(
        copy.deepcopy(made.model), made.data(), kl.Gaussian(0.6), noise="fixed", epochs=4, every=2
    )
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
        posterior = kl.KronLaplace(model, "regression", "exact").fit([(x, y)]).tune()
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
        assert 'tune with noise="fixed"' in str(w.message)


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
    for options in ({"data": []}, {"grid": [1.0]}, {"predictive": kl.Predictive()}):
        with pytest.raises(TypeError, match="the evidence needs none of them"):
            posterior.tune(**options)
    with pytest.raises(ValueError, match="unknown method 'marglik'; allowed are 'evidence', 'validation'"):
        posterior.tune("marglik")
    with pytest.raises(ValueError, match="unknown structure 'all'"):
        posterior.tune(structure="all")
    made = problem("mlp")
    with pytest.raises(ValueError, match="the evidence needs targets"):
        made.posterior().fit([x for x, _ in made.data()]).tune()


# -- validation, classification ------------------------------------------------------------------------------


def shifted(made, seed=5, n=9):
    """Validation data: other inputs, other targets."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(made.targets), (n,), generator=generator)
    x = made.inputs[index] + 0.3 * torch.randn(n, *made.inputs.shape[1:], generator=generator, dtype=torch.float64)
    y = made.targets[torch.randint(len(made.targets), (n,), generator=generator)]
    return x, y


def independent_nll(made, precision, x, y, predictive, **options):
    """Mean negative log-likelihood of a posterior made with this precision, with nothing of the library's scores."""
    posterior = made.fitted(prior_precision=precision, **options)
    p = posterior.predict(
        x,
        method=predictive.method,
        link=predictive.link,
        n_samples=predictive.n_samples,
        diagonal=predictive.diagonal,
        antithetic=predictive.antithetic,
        seed=predictive.seed,
    )
    if isinstance(p, kl.Prediction):
        return -kl.metrics.gaussian_log_likelihood(p.mean, p.total_variance, y)
    if made.name == "binary":
        return float(torch.nn.functional.binary_cross_entropy(p, y))
    if p.ndim == 2:
        return kl.metrics.negative_log_likelihood(p, y)
    flat, labels = p.reshape(-1, p.shape[-1]), y.flatten()
    keep = labels != -100
    return kl.metrics.negative_log_likelihood(flat[keep], labels[keep])


PREDICTIVES = {
    "probit": kl.Predictive(),
    "mc": kl.Predictive(link="mc", n_samples=30, seed=2),
    "mc, diagonal": kl.Predictive(link="mc", n_samples=30, diagonal=True),
    "bridge": kl.Predictive(link="bridge"),
    "sample": kl.Predictive(method="sample", n_samples=6, seed=3),
    "antithetic": kl.Predictive(method="sample", n_samples=6, antithetic=True),
}
GRID = [1e-2, 0.1, 0.5, 2.0, 10.0, 100.0, 1e4]


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("name", PREDICTIVES)
@pytest.mark.parametrize(
    ("network", "likelihood"),
    [("mlp", "classification"), ("cnn", "classification"), ("mlp", "binary"), ("tokens", "classification")],
)
def test_validation_picks_the_best_of_the_grid(network, likelihood, name):
    """In one batch, so that draws are the same; of tokens some have no label."""
    predictive = PREDICTIVES[name]
    if likelihood == "binary" and name == "bridge":
        predictive = kl.Predictive(link="probit")
    made = problem(network, likelihood)
    x, y = shifted(made)
    if network == "tokens":
        y = y.clone()
        y[0], y[1:, 2] = -100, -100
    losses = [independent_nll(made, delta, x, y, predictive) for delta in GRID]
    posterior = made.fitted(prior_precision=7.0)
    assert posterior.tune("validation", data=[(x, y)], predictive=predictive, grid=GRID[::-1]) is posterior
    assert float(posterior.prior_precision) == GRID[int(np.argmin(losses))]
    torch.testing.assert_close(
        posterior.predict(x), made.fitted(prior_precision=float(posterior.prior_precision)).predict(x)
    )


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("network", ["mlp", "tokens"])
def test_validation_weighs_targets_not_batches(network):
    """One batch with few labels, which are wrong, and one with many, which are right: as if they had come in one."""
    made = problem(network)
    x = torch.cat([made.inputs] * 4)
    outputs = made.model(x).detach()
    y = outputs.argmax(-1)
    y[0] = outputs[0].argmin(-1)
    if network == "tokens":
        y[0, 1:] = -100
    grid = np.logspace(-3, 3, 16).tolist()
    tuned = [
        float(made.fitted().tune("validation", data=data, grid=grid).prior_precision)
        for data in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])], DataLoader(TensorDataset(x, y), 3, shuffle=True))
    ]
    assert tuned[0] == tuned[1] == tuned[2]
    halves = [
        sum(independent_nll(made, d, x[part], y[part], kl.Predictive()) for part in (slice(1), slice(1, None)))
        for d in grid
    ]
    assert grid[int(np.argmin(halves))] != tuned[0]


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge", "ignore:the evidence is largest")
@pytest.mark.parametrize("structure", ["layerwise", "diagonal"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_validation_keeps_the_ratios_that_the_evidence_prefers(structure, likelihood):
    made = problem("cnn", likelihood)
    x, y = shifted(made)
    by_evidence = made.fitted().tune(structure=structure).prior_precision
    posterior = made.fitted().tune("validation", structure, [(x, y)], grid=[0.1, 1.0, 10.0])
    ratios = posterior.prior_precision / by_evidence
    torch.testing.assert_close(ratios, ratios[0].expand_as(ratios), rtol=1e-10, atol=0)
    if likelihood == "classification":
        losses = [independent_nll(made, by_evidence * f, x, y, kl.Predictive()) for f in (0.1, 1.0, 10.0)]
        assert float(ratios[0]) == pytest.approx([0.1, 1.0, 10.0][int(np.argmin(losses))])


def test_validation_says_when_it_is_at_the_edge():
    made = problem("mlp")
    x = made.inputs
    confident = [(x, made.model(x).argmax(1))]
    with pytest.warns(UserWarning, match="smallest at the edge of the grid, for the prior precision 100") as caught:
        made.fitted().tune("validation", data=confident, grid=[1.0, 10.0, 100.0])
    assert caught[0].filename == __file__
    made.fitted().tune("validation", data=confident, grid=[3.0])  # one point is no search


def broken_at(monkeypatch, bad, value):
    """The loss is ``value`` where the prior precision is in ``bad``."""
    original, current = kl.Categorical.predictive_nll, {}
    setter = kl.KronLaplace.set_hyperparameters

    def set_hyperparameters(self, prior_precision, noise_std=None):
        current["delta"] = float(prior_precision)
        setter(self, prior_precision, noise_std)

    def predictive_nll(self, prediction, targets):
        sums = original(self, prediction, targets)
        return sums * value if current["delta"] in bad else sums

    monkeypatch.setattr(kl.KronLaplace, "set_hyperparameters", set_hyperparameters)
    monkeypatch.setattr(kl.Categorical, "predictive_nll", predictive_nll)


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_passed_over(value, monkeypatch):
    made = problem("mlp")
    x, y = shifted(made)
    losses = {delta: independent_nll(made, delta, x, y, kl.Predictive()) for delta in GRID}
    best, second = sorted(GRID[1:], key=losses.get)[:2]
    assert float(made.fitted().tune("validation", data=[(x, y)], grid=GRID[1:]).prior_precision) == best
    broken_at(monkeypatch, {GRID[0], best}, value)
    assert float(made.fitted().tune("validation", data=[(x, y)], grid=GRID).prior_precision) == second


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("broken", ["nan", "interrupt", "targets"])
def test_a_validation_that_fails_leaves_the_posterior(likelihood, broken, monkeypatch):
    made = problem("mlp", likelihood)
    posterior = made.fitted(prior_precision=[0.3, 0.6])
    before = posterior.functional_variance(made.inputs), posterior.likelihood, posterior.prior_precision
    x, y = shifted(made)
    data, error, message = [(x, y)], KeyboardInterrupt, None
    if broken == "nan":
        original = type(made.model).forward
        monkeypatch.setattr(type(made.model), "forward", lambda self, x: original(self, x) * math.nan)
        error, message = ValueError, "NaN or infinite at all 21 points"
    elif broken == "targets":
        data, error, message = [(x, y), x], TypeError, "needs data with targets"
    else:

        class Interrupted:
            def __iter__(self):
                yield x, y
                raise KeyboardInterrupt

        data = Interrupted()
    with pytest.raises(error, match=message):
        posterior.tune("validation", data=data)
    monkeypatch.undo()
    assert posterior.likelihood == before[1]
    assert torch.equal(posterior.prior_precision, before[2])
    assert torch.equal(posterior.functional_variance(made.inputs), before[0])


def test_labels_are_checked():
    made = problem("mlp")
    x, y = shifted(made)
    with pytest.raises(ValueError, match="class labels must lie in 0 … 3"):
        made.fitted().tune("validation", data=[(x, y), (x, y + 7)])
    y = problem("mlp", "regression").targets
    with pytest.raises(ValueError, match=r"Gaussian targets must have the shape of the network's outputs"):
        problem("mlp", "regression").fitted().tune("validation", data=[(made.inputs, y[:, 0])])


def test_missing_data_are_refused():
    made = problem("mlp")
    posterior, data = made.fitted(), made.data()
    for options, got in (
        ({}, "got none"),
        ({"data": iter(data)}, "an iterator, which can be read only once"),
        ({"data": (pair for pair in data)}, "an iterator"),
    ):
        with pytest.raises(TypeError, match=got):
            posterior.tune("validation", **options)
    with pytest.raises(ValueError, match="grid is empty"):
        posterior.tune("validation", data=data, grid=[])
    with pytest.raises(ValueError, match="grid must be a positive finite number, got 0"):
        posterior.tune("validation", data=data, grid=[0, 1])
    with pytest.raises(ValueError, match="the data is empty"):
        posterior.tune("validation", data=[])
    with pytest.raises(ValueError, match=r"link 'bridge' is not for Bernoulli"):
        problem("mlp", "binary").fitted().tune("validation", data=data, predictive=PREDICTIVES["bridge"])


# -- validation, regression ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge", "ignore:sampling=.empirical.")
@pytest.mark.parametrize("sampling", ["exact", "empirical"])
@pytest.mark.parametrize("network", ["mlp", "cnn", "tokens"])
def test_prior_and_noise_are_found_together(network, sampling):
    """No worse than any point of a grid in ratio of noise and prior, and noise, made point by point with new posteriors."""
    made = problem(network, "regression")
    x, y = shifted(made)
    power = {"exact": 2, "empirical": 4}[sampling]

    def loss_of(posterior):
        p = posterior.predict(x)
        return -kl.metrics.gaussian_log_likelihood(p.mean, p.total_variance, y)

    posterior = made.posterior().fit(made.data(), sampling=sampling)
    posterior.tune("validation", data=[(x, y)], grid=GRID[:4])
    found = loss_of(posterior)
    sigma_0 = float((made.model(made.inputs) - made.targets).square().mean().sqrt().detach())
    ratio = float(posterior.prior_precision) * (posterior.likelihood.noise_std / sigma_0) ** power
    assert min(abs(math.log(ratio / point)) for point in GRID[:4]) < 1e-9
    losses = []
    for delta, sigma in itertools.product(GRID[:4], np.geomspace(0.05, 20, 25).tolist()):
        other = made.posterior(prior_precision=delta * (sigma_0 / sigma) ** power).fit(fisher=posterior.fisher)
        other.likelihood = kl.Gaussian(sigma)
        losses.append(loss_of(other))
    assert found <= min(losses) + 1e-9
    assert found > min(losses) - 0.05


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
def test_prior_and_noise_are_found_together_by_sampling():
    """Draws are the same for all noises, and the search is coarse: near the best of a grid."""
    made = problem("mlp", "regression")
    x, y = shifted(made)
    predictive = kl.Predictive(method="sample", n_samples=20, seed=1)
    posterior = made.fitted().tune("validation", data=[(x, y)], predictive=predictive, grid=GRID)
    sigma_0 = float((made.model(made.inputs) - made.targets).square().mean().sqrt().detach())

    def loss(delta, sigma):
        other = made.posterior(prior_precision=delta * (sigma_0 / sigma) ** 2).fit(fisher=posterior.fisher)
        other.likelihood = kl.Gaussian(sigma)
        p = other.predict(x, method="sample", n_samples=20, seed=1)
        return -kl.metrics.gaussian_log_likelihood(p.mean, p.total_variance, y)

    sigma = posterior.likelihood.noise_std
    found = loss(float(posterior.prior_precision) * (sigma / sigma_0) ** 2, sigma)
    best = min(loss(d, s) for d, s in itertools.product(GRID, np.geomspace(0.3, 6, 15).tolist()))
    assert found <= best + 1e-2


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("name", ["probit", "sample"])
def test_validation_with_predicted_noise(name):
    """There is no noise to find; picks the best of the grid."""
    predictive = PREDICTIVES[name]
    made = problem("mlp", "heteroscedastic")
    x, y = shifted(made)
    losses = [independent_nll(made, delta, x, y, predictive) for delta in GRID]
    posterior = made.fitted().tune("validation", data=[(x, y)], predictive=predictive, grid=GRID)
    assert float(posterior.prior_precision) == GRID[int(np.argmin(losses))]
    assert posterior.likelihood == kl.HeteroscedasticGaussian()


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
def test_validation_does_not_depend_on_the_noise_before():
    made = problem("mlp", "regression")
    x, y = shifted(made)
    tuned = []
    for noise in (1.0, 0.1, 10.0):
        posterior = kl.KronLaplace(made.model, kl.Gaussian(noise)).fit(made.data())
        posterior.tune("validation", data=[(x, y)], grid=GRID)
        tuned.append([float(posterior.prior_precision), posterior.likelihood.noise_std])
    np.testing.assert_allclose(tuned[1:], tuned[:-1], rtol=1e-4)


@pytest.mark.parametrize("unit", [1.0, 1e-5, 1e5])
@pytest.mark.filterwarnings(
    "ignore:the validation loss is smallest at the edge of the grid, for the prior precision",
    "ignore:the tuned noise_std",
)
def test_validation_does_not_depend_on_the_unit_of_the_targets(unit):
    """Nor on the noise that was there: with targets in millimetres it is a thousand times as large, or it is said."""
    made = problem("mlp", "regression")
    x, y = shifted(made)
    posterior = made.fitted()
    mean = made.model(x).detach()
    y = mean + unit * (y - mean)
    posterior.tune("validation", data=[(x, y)], grid=[1e9, 1e10, 1e11])
    squared = float((y - mean).square().mean())
    assert posterior.likelihood.noise_std == pytest.approx(math.sqrt(squared), rel=0.05)


@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
def test_random_states_are_left_alone():
    """The global one, and that of a loader which shuffles by itself."""
    made = problem("mlp")
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*shifted(made)), 2, shuffle=True, generator=generator)
    states = torch.get_rng_state(), generator.get_state()
    made.fitted().tune("validation", data=loader, grid=GRID, predictive=PREDICTIVES["mc"])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])


def test_structures_are_those_of_the_prior():
    """What tuning sets can be set by hand, saved and read."""
    made = problem("mlp", "regression")
    for structure in STRUCTURES:
        value, D = some_prior(made, structure)
        posterior = made.fitted()
        posterior.set_hyperparameters(value, 0.9)
        assert posterior.likelihood == kl.Gaussian(0.9)
        assert float(posterior.prior_precision.mean()) == pytest.approx(
            float(D.mean()) if structure != "layerwise" else np.mean(value)
        )
