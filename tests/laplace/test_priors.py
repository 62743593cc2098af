"""Priors of every structure and mean, with every likelihood and estimator, against dense algebra in float64.

The dense posterior precision is ``N/τ · F + diag(D)`` with ``F`` from `KroneckerFisher.to_dense` and ``D`` made here; the
Jacobians are autograd's.
"""

import math

import pytest
import torch

import kronlaplace as kl
from tests.support import oracles
from tests.support.networks import CASES
from tests.support.posteriors import (
    ESTIMATORS,
    LARGER,
    LIKELIHOODS,
    NETWORKS,
    RTOL,
    STRUCTURES,
    TEMPERATURE,
    Problem,
    assert_like_dense,
    dense_precision,
    log_likelihood,
    outputs_and_jacobians,
    problem,
    same,
    sizes,
    some_mean,
    some_prior,
    summed_biases,
    weights,
)

# -- evidence, variances, samples ----------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("network", "form"), [("mlp", "dict"), ("cnn", "flat")])
def test_evidence_and_variances_equal_dense(network, form, likelihood, estimator, structure):
    made = problem(network, likelihood)
    precision, D = some_prior(made, structure)
    mean, flat = some_mean(made, form)
    posterior = made.fitted(estimator, prior_precision=precision, prior_mean=mean, temperature=TEMPERATURE)
    assert_like_dense(made, posterior, D, flat, outputs_and_jacobians(network, likelihood)[1])


@pytest.mark.quick(2)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("network", "likelihood", "form"),
    [("norms", "regression", "dict"), ("lstm", "classification", "flat"), ("depthwise", "binary", "number")],
)
def test_evidence_and_variances_of_architectures_equal_dense(network, likelihood, form, estimator, structure):
    made = problem(network, likelihood)
    precision, D = some_prior(made, structure)
    mean, flat = some_mean(made, form)
    posterior = made.fitted(estimator, prior_precision=precision, prior_mean=mean, temperature=TEMPERATURE)
    assert_like_dense(made, posterior, D, flat, outputs_and_jacobians(network, likelihood)[1])


@pytest.mark.parametrize("network", ["mlp", "norms", "lstm", "rnn_tanh", "gru", "language_model"])
def test_a_prior_around_the_trained_weights_costs_nothing(network):
    """With the network's own state dict as the mean no weight deviates, also where two biases act through their sum."""
    made = problem(network)
    precision, D = some_prior(made, "vector")
    posterior = made.fitted(prior_precision=precision, prior_mean=made.model.state_dict())
    expected = log_likelihood(made) - 0.5 * (torch.logdet(dense_precision(posterior, D)) - D.log().sum())
    torch.testing.assert_close(posterior.log_marginal_likelihood(), expected, rtol=RTOL, atol=0)


@pytest.mark.quick(3)
@pytest.mark.parametrize("structure", ["layerwise", "dict"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("network", ["mlp", *LARGER])
def test_covariance_of_samples_is_dense(network, estimator, structure):
    """4,000 draws: every entry within six standard errors ``√((Σ_ii Σ_jj + Σ_ij²) / n)``, the mean is the network's."""
    made = problem(network)
    precision, D = some_prior(made, structure)
    posterior = made.fitted(estimator, prior_precision=precision, prior_mean=0.5, temperature=TEMPERATURE)
    n = 4000
    flat = flat_draws(made, posterior.sample(n))
    expected = torch.linalg.inv(dense_precision(posterior, D))
    variance = expected.diagonal()
    standard_error = torch.sqrt((torch.outer(variance, variance) + expected**2) / n)
    assert ((flat.T.cov() - expected).abs() / standard_error).max() < 6
    assert ((flat.mean(0) - weights(made)).abs() / (variance / n).sqrt()).max() < 6


def flat_draws(made, draws):
    """Draws of the parameters as ``(n, P)``; a second bias stays where it is."""
    n = len(next(iter(draws.values())))
    fixed = {name: p.detach().expand(n, *p.shape) for name, p in made.model.named_parameters()}
    values = {**fixed, **draws}
    values |= summed_biases(values, made.blocks)
    columns = [
        torch.cat([values[p].reshape(n, b.q, -1) for p in b.parameters], dim=2).flatten(1) for b in made.blocks.values()
    ]
    return torch.cat(columns, dim=1)


# -- derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "diagonal", "exact"])
def test_gradients_of_the_evidence(estimator, structure):
    """By prior precision of every structure, noise and temperature at once."""
    made = problem("norms" if structure == "scalar" else "mlp", "regression")
    posterior = made.fitted(estimator, prior_mean=0.2)
    precision, _ = some_prior(made, structure)
    noise, temperature = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 1.3))
    names = list(precision) if structure == "dict" else None
    values = list(precision.values()) if names else [torch.as_tensor(precision, dtype=torch.float64)]

    def evidence(noise, temperature, *values):
        given = dict(zip(names, values, strict=True)) if names else values[0]
        return posterior.log_marginal_likelihood(given, noise, temperature)

    values = [v.clone().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(evidence, (noise, temperature, *values))


# -- large layers --------------------------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "ekfac"])
@pytest.mark.parametrize("network", ["cnn", "depthwise", "lstm"])
def test_precisions_of_single_weights_in_large_layers(network, estimator, monkeypatch):
    """Said in a warning to be approximate; the evidence is a lower bound then, and exact where all precisions are equal."""
    made = problem(network)
    _, D = some_prior(made, "vector")
    exact = made.fitted(estimator, prior_precision=D).log_marginal_likelihood()
    monkeypatch.setattr("kronlaplace.damping.plus_diagonal.LARGEST_DENSE", 8)
    posterior = made.fitted(estimator, prior_precision=D)
    bound = posterior.log_marginal_likelihood()
    assert bound < exact
    assert torch.isfinite(bound)
    equal = torch.full_like(D, 0.3)
    torch.testing.assert_close(
        posterior.log_marginal_likelihood(equal), posterior.log_marginal_likelihood(0.3), rtol=1e-10, atol=0
    )
    with pytest.warns(UserWarning, match="precision"):
        posterior.covariance()


@pytest.mark.parametrize("estimator", ["diagonal", "exact"])
def test_diagonal_and_dense_blocks_are_exact_at_any_size(estimator, monkeypatch):
    made = problem("cnn")
    _, D = some_prior(made, "vector")
    monkeypatch.setattr("kronlaplace.damping.plus_diagonal.LARGEST_DENSE", 1)
    posterior = made.fitted(estimator, prior_precision=D)
    assert_like_dense(made, posterior, D, torch.zeros_like(D), outputs_and_jacobians("cnn")[1])


# -- after the fit -------------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hyperparameters_set_after_the_fit(estimator, structure):
    """One by one, each after use: as if the posterior had been made with them."""
    made = problem("cnn", "regression")
    precision, _ = some_prior(made, structure)
    mean, _ = some_mean(made, "dict")
    wanted = {"prior_precision": precision, "prior_mean": mean, "temperature": 2.5}
    posterior = made.fitted(estimator)
    for i, (name, value) in enumerate(wanted.items(), start=1):
        posterior.functional_variance(made.inputs)
        posterior.log_marginal_likelihood()
        setattr(posterior, name, value)
        same(posterior, made.fitted(estimator, **dict(list(wanted.items())[:i])), made)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noise_set_after_the_fit(estimator):
    made = problem("mlp", "regression")
    posterior = made.fitted(estimator)
    posterior.functional_variance(made.inputs)
    posterior.likelihood = kl.Gaussian(1.7)
    other = kl.KronLaplace(made.model, kl.Gaussian(1.7), estimator).fit(made.data())
    same(posterior, other, made, rtol=1e-9)
    assert float(posterior.predict(made.inputs).noise_variance) == 1.7**2


def test_hyperparameters_are_copies():
    """What the user does to a tensor later does not reach the posterior."""
    made = problem("mlp")
    vector, mean = some_prior(made, "vector")[0].clone(), some_mean(made, "flat")[0].clone()
    posterior = made.fitted(prior_precision=vector, prior_mean=mean)
    before = posterior.log_marginal_likelihood()
    vector.zero_()
    mean.zero_()
    posterior.prior_mean.clear()
    assert torch.equal(posterior.log_marginal_likelihood(), before)
    assert torch.equal(
        made.fitted(prior_mean=some_mean(made, "flat")[0]).log_marginal_likelihood(0.4),
        posterior.log_marginal_likelihood(0.4),
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior_precision": [1.0, 2.0, 3.0]}, ValueError, "must be one number, 2 .one per block. or 58"),
        ({"prior_precision": torch.ones(57)}, ValueError, r"got shape \(57,\)"),
        ({"prior_precision": torch.ones(2, 2)}, ValueError, r"got shape \(2, 2\)"),
        ({"prior_precision": [1.0, -1.0]}, ValueError, "positive and finite, got -1.0"),
        ({"prior_precision": float("nan")}, ValueError, "positive and finite, got nan"),
        ({"prior_precision": {"0.weight": torch.ones(6, 4)}}, ValueError, "no entry for the parameter '0.bias'"),
        ({"prior_precision": "high"}, TypeError, "must be a number, one number per block, or one per weight"),
        ({"prior_mean": torch.ones(57)}, ValueError, "one number or 58 .one per weight., got 57"),
        ({"prior_mean": {"0.weight": torch.ones(4, 6)}}, ValueError, r"'0.weight' must be a tensor of shape \(6, 4\)"),
        ({"prior_mean": [1.0, 2.0]}, TypeError, "must be a number, a flat tensor"),
        ({"prior_mean": float("inf")}, ValueError, "NaN or infinite"),
        ({"temperature": 0}, ValueError, "temperature must be a positive finite number"),
        ({"temperature": "cold"}, TypeError, "temperature must be a number"),
    ],
)
def test_bad_hyperparameters_are_refused(options, error, message):
    """By the constructor and after the fit, where the posterior stays as it was."""
    made = problem("mlp")
    with pytest.raises(error, match=message):
        made.posterior(**options)
    posterior = made.fitted()
    before = posterior.log_marginal_likelihood()
    (name, value), *_ = options.items()
    with pytest.raises(error, match=message):
        setattr(posterior, name, value)
    assert torch.equal(posterior.log_marginal_likelihood(), before)


def test_last_layer():
    """``layers="last"`` is the posterior over the layer whose output is the network's."""
    made = problem("cnn")
    posterior, other = made.fitted(layers="last"), made.fitted(layers=["5"])
    assert list(posterior.fisher) == ["5"]
    same(posterior, other, made)
    assert list(problem("lstm").fitted(layers="last").fisher) == ["head"]


# -- more data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "diagonal", "exact"])
@pytest.mark.parametrize(
    ("network", "likelihood"), [("mlp", "heteroscedastic"), ("cnn", "regression"), ("lstm", "classification")]
)
def test_fit_to_more_data_equals_one_fit(network, likelihood, estimator, saved, tmp_path):
    made = problem(network, likelihood)
    precision, _ = some_prior(made, "vector")
    posterior = made.posterior(estimator, prior_precision=precision, prior_mean=0.1, temperature=TEMPERATURE)
    posterior.fit(made.data(0, 2))
    if saved:
        posterior.save(tmp_path / "p")
        posterior = kl.KronLaplace.load(tmp_path / "p", made.model)
    assert posterior.fit(made.data(2), add=True) is posterior
    assert posterior.fisher.n_examples == len(made.targets)
    whole = made.fitted(estimator, prior_precision=precision, prior_mean=0.1, temperature=TEMPERATURE)
    same(posterior, whole, made, rtol=1e-9)


def test_the_first_fit_may_be_an_addition():
    made = problem("mlp")
    posterior = made.posterior()
    for start, stop in ((0, 3), (3, 4), (4, None)):
        posterior.fit(made.data(start, stop), add=True)
    same(posterior, made.fitted(), made, rtol=1e-9)


def test_a_finished_fisher_may_be_an_addition():
    made = problem("mlp")
    fisher = kl.estimate_fisher(made.model, made.data(3), made.likelihood, "kfac", sampling="exact")
    same(made.posterior().fit(made.data(0, 3)).fit(fisher=fisher, add=True), made.fitted(), made, rtol=1e-9)


def test_fit_to_more_data_after_the_noise_was_tuned():
    """The noise that predictions use is not that of the first fit any more; the curvature is rescaled, so both fit."""
    made = problem("mlp", "regression")
    posterior = made.posterior().fit(made.data(0, 3))
    posterior.likelihood = kl.Gaussian(1.7)
    posterior.fit(made.data(3), add=True)
    whole = made.fitted()
    whole.likelihood = kl.Gaussian(1.7)
    same(posterior, whole, made, rtol=1e-9)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (kl.KFOC(), "nearest to the Fisher of all data"),
        (kl.KFOC(aggregation="running"), "nearest to the Fisher of all data"),
        (kl.EKFAC(), "the eigenbasis of their own data"),
        (kl.SUA(), "products of the channels' means"),
    ],
)
def test_more_data_are_refused_where_blocks_do_not_add_up(estimator, message):
    made = problem("cnn")
    posterior = made.posterior(estimator).fit(made.data(0, 3))
    before = posterior.functional_variance(made.inputs)
    with pytest.raises(NotImplementedError, match=message):
        posterior.fit(made.data(3), add=True)
    assert posterior.fisher.n_examples == 3
    assert torch.equal(posterior.functional_variance(made.inputs), before)


# -- dtypes and files ----------------------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "diagonal", "exact"])
@pytest.mark.parametrize("network", ["mlp", "lstm", "depthwise", "language_model"])
def test_to_another_dtype_and_back(network, estimator, structure):
    """Network, blocks and predictions follow; back in float64 all is as before up to float32 rounding."""
    torch.manual_seed(0)
    made = NETWORKS[network]()
    made = Problem(made.model, made.inputs, made.targets, "classification", oracles.blocks(made.model))
    precision, _ = some_prior(made, structure)
    posterior = made.fitted(estimator, prior_precision=precision, prior_mean=0.1)
    before = posterior.log_marginal_likelihood(), posterior.functional_variance(made.inputs)
    for dtype in (torch.float32, torch.float64):
        assert posterior.to(dtype) is posterior
        x = made.inputs.to(dtype) if made.inputs.is_floating_point() else made.inputs
        assert {p.dtype for p in made.model.parameters()} == {dtype}
        assert {block.dtype for block in posterior.fisher.values()} == {dtype}
        assert {mean.dtype for mean in posterior.prior_mean.values()} == {dtype}
        assert {draw.dtype for draw in posterior.sample(2).values()} == {dtype}
        assert posterior.prior_precision.dtype == posterior.log_marginal_likelihood().dtype == torch.float64
        assert posterior.functional_variance(x).dtype == dtype
        for options in ({}, {"link": "mc"}, {"link": "bridge"}, {"method": "sample", "n_samples": 3}):
            assert posterior.predict(x, **options).dtype == dtype
        after = posterior.log_marginal_likelihood(), posterior.functional_variance(x)
        for new, old in zip(after, before, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4, check_dtype=False)
        with torch.no_grad():
            next(iter(made.model.parameters())).add_(0)  # looked at again, and unchanged
    with torch.no_grad():
        next(iter(made.model.parameters())).add_(1)
    for call in (lambda: posterior.predict(x), lambda: posterior.to(torch.float32), lambda: posterior.sample(1)):
        with pytest.raises(RuntimeError, match="changed after the posterior was fitted"):
            call()


def test_an_unfitted_posterior_goes_to_another_dtype():
    torch.manual_seed(0)
    made = CASES["mlp"]()
    posterior = kl.KronLaplace(made.model, "classification", prior_mean=0.1).to(torch.float32)
    posterior.fit([(made.inputs.float(), made.targets)])
    assert posterior.functional_variance(made.inputs.float()).dtype == torch.float32


@pytest.mark.quick(3)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("form", ["number", "flat", "dict"])
@pytest.mark.parametrize(
    ("network", "likelihood", "estimator"),
    [
        ("mlp", "heteroscedastic", "kfac"),
        ("lstm", "classification", "ekfac"),
        ("depthwise", "regression", "exact"),
        ("norms", "binary", "diagonal"),
    ],
)
def test_files_keep_the_prior(network, likelihood, estimator, form, structure, tmp_path):
    made = problem(network, likelihood)
    precision, _ = some_prior(made, structure)
    mean, _ = some_mean(made, form)
    posterior = made.fitted(estimator, prior_precision=precision, prior_mean=mean, temperature=TEMPERATURE)
    posterior.save(tmp_path / "p")
    loaded = kl.KronLaplace.load(tmp_path / "p", made.model)
    assert loaded.temperature == TEMPERATURE
    assert loaded.likelihood == posterior.likelihood
    assert torch.equal(loaded.prior_precision, posterior.prior_precision)
    for name, matrix in posterior.prior_mean.items():
        assert torch.equal(loaded.prior_mean[name], matrix)
    same(loaded, posterior, made, rtol=1e-9)


def test_representation_of_every_structure():
    made = problem("mlp")
    shown = {s: repr(made.posterior(prior_precision=some_prior(made, s)[0])) for s in STRUCTURES}
    assert "prior_precision=0.4," in shown["scalar"]
    assert "prior_precision=[0.3, 0.5]" in shown["layerwise"]
    assert shown["vector"].replace(" values", "").count(f"prior_precision={sum(sizes(made))}") == 1
    assert math.prod(made.model[0].weight.shape) < sum(sizes(made))
