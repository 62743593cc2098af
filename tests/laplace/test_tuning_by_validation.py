"""Hyperparameters by validation, against loops of their own."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from tests.support.output_shapes import problem
from tests.support.posteriors import STRUCTURES, some_prior
from tests.support.validation import GRID, PREDICTIVES, independent_nll, shifted

# -- validation, classification ------------------------------------------------------------------------------


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.quick(1)
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
    view = kl.KronLaplace.with_hyperparameters

    def with_hyperparameters(self, new):
        current["delta"] = float(new.prior.precision)
        return view(self, new)

    def predictive_nll(self, prediction, targets):
        sums = original(self, prediction, targets)
        return sums * value if current["delta"] in bad else sums

    monkeypatch.setattr(kl.KronLaplace, "with_hyperparameters", with_hyperparameters)
    monkeypatch.setattr(kl.Categorical, "predictive_nll", predictive_nll)


@pytest.mark.quick(1)
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


@pytest.mark.grid
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


@pytest.mark.grid
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


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("name", ["default", "sample"])
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
        posterior = kl.KronLaplace(made.model, kl.Gaussian(noise, noise_known=False)).fit(made.data())
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
        posterior.prior_precision = value
        posterior.hyperparameters = dataclasses.replace(posterior.hyperparameters, noise_std=0.9)
        assert posterior.likelihood == kl.Gaussian(0.9)
        assert float(posterior.prior_precision.mean()) == pytest.approx(
            float(D.mean()) if structure != "layerwise" else np.mean(value)
        )
