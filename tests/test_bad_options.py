"""Bad options and arguments get one clear error."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.bad_input import NAN, X, Y, mlp32, poisoned

OPTIONS = {
    "estimator": ({"estimator": "kfax"}, ValueError, "unknown estimator 'kfax'; the shorthands are 'kfac', 'kfc'"),
    "estimator class": ({"estimator": kl.KFAC}, TypeError, r"estimator must be an instance such as KFAC\(\)"),
    "likelihood": ({"likelihood": "softmax"}, ValueError, "unknown likelihood 'softmax'"),
    "sampling": ({"sampling": "all"}, ValueError, "unknown sampling 'all'; allowed are 'exact', 'mc', 'empirical'"),
    "no samples": ({"mc_samples": 0}, ValueError, "mc_samples must be at least 1, got 0"),
    "samples of what is exact": (
        {"sampling": "exact", "mc_samples": 5},
        ValueError,
        "mc_samples=5 only applies when sampling=\"mc\" \\(got sampling='exact'\\)",
    ),
    "no seed": ({"seed": None}, TypeError, "seed must be an integer, got None"),
    "negative seed": ({"seed": -1}, ValueError, "seed must be from 0"),
    "half a sample": ({"mc_samples": 0.5}, TypeError, "mc_samples must be an integer, got 0.5"),
    "not a model": ({"model": len}, TypeError, "model must be a torch.nn.Module, got builtin_function_or_method"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options_of_the_fisher(name):
    options, error, message = OPTIONS[name]
    call = {"model": mlp32(), "data": [(X, Y)], "likelihood": "classification"} | options
    with pytest.raises(error, match=message):
        kl.estimate_fisher(**call)


POSTERIOR_OPTIONS = {
    "negative prior": ({"prior_precision": -1.0}, "prior_precision must be positive and finite, got -1.0"),
    "NaN prior": ({"prior_precision": [1.0, NAN]}, "prior_precision must be positive and finite"),
    "wrong number": (
        {"prior_precision": [1.0, 1.0, 1.0]},
        r"one number, 2 \(one per block\) or 43 \(one per weight\), got shape \(3,\)",
    ),
    "temperature": ({"temperature": 0.0}, "temperature must be a positive finite number, got 0.0"),
}


@pytest.mark.parametrize("name", POSTERIOR_OPTIONS)
def test_bad_options_of_the_posterior(name):
    options, message = POSTERIOR_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        kl.KronLaplace(mlp32(), "classification", **options)


CALLS = {
    "method": (lambda p: p.predict(X, method="map"), "unknown method 'map'; allowed are 'glm', 'sample'"),
    "link": (
        lambda p: p.predict(X, link="logit"),
        r"unknown link 'logit'; allowed are 'margin', 'probit', 'centered-probit', 'mc', 'bridge'",
    ),
    "link of samples": (
        lambda p: p.predict(X, method="sample", link="mc"),
        "link='mc' would have no effect: method=\"sample\" needs none",
    ),
    "samples of a closed form": (lambda p: p.predict(X, n_samples=5), "n_samples=5 would have no effect"),
    "no samples": (lambda p: p.predict(X, link="mc", n_samples=0), "n_samples must be at least 1, got 0"),
    "no inputs": (lambda p: p.predict(X[:0]), r"at least one example on its first axis, .*; got shape \(0, 4\)"),
    "not a tensor": (lambda p: p.predict(X.numpy()), "at least one example on its first axis, .*; got ndarray"),
    "NaN inputs": (lambda p: p.predict(poisoned(0)), "the inputs contain NaN or infinite values"),
    "sample none": (lambda p: p.sample(0), "n must be at least 1, got 0"),
    "tune method": (
        lambda p: p.tune(method="magic"),
        "unknown method 'magic'; allowed are 'evidence', 'exact-evidence', 'v",
    ),
    "tune structure": (lambda p: p.tune(structure="full"), "unknown structure 'full'; allowed are"),
    "noise": (lambda p: p.log_marginal_likelihood(noise_std=1.0), "noise_std only applies to the Gaussian likelihood"),
    "prior": (lambda p: p.log_marginal_likelihood(prior_precision=0.0), "prior_precision must be positive"),
}


@pytest.mark.quick(12)
@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_of_a_fitted_posterior(name):
    call, message = CALLS[name]
    posterior = kl.KronLaplace(mlp32(), "classification").fit([(X, Y)])
    with pytest.raises(ValueError, match=message):
        call(posterior)


def test_bridge_needs_classes():
    posterior = kl.KronLaplace(nn.Linear(4, 1), "binary").fit([X])
    with pytest.raises(ValueError, match=r"link 'bridge' is not for Bernoulli\(\); allowed are \['probit', 'mc'\]"):
        posterior.predict(X, link="bridge")


def test_evidence_needs_targets():
    posterior = kl.KronLaplace(mlp32(), "classification").fit([X])
    with pytest.raises(ValueError, match="the evidence needs targets"):
        posterior.tune()


def test_fit_takes_data_or_a_fisher():
    posterior = kl.KronLaplace(mlp32(), "classification")
    with pytest.raises(TypeError, match="either data or fisher=, exactly one"):
        posterior.fit()
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    fisher = kl.estimate_fisher(other, [X], "classification")
    with pytest.raises(ValueError, match=r"belongs to a different network: its block for layer '0' .* \(7, 5\) matrix"):
        posterior.fit(fisher=fisher)
    with pytest.raises(
        ValueError, match=r"the fisher has no blocks for the layers \['0'\] of the posterior, only for \['2'\]"
    ):
        posterior.fit(fisher=kl.estimate_fisher(posterior.model, [X], "classification", layers=["2"]))
    fisher = kl.estimate_fisher(posterior.model, [X], "regression")
    with pytest.raises(ValueError, match=r"estimated with Gaussian.*the posterior has Categorical"):
        posterior.fit(fisher=fisher)


CALLS_BY_TYPE = {
    "grid": (
        lambda p: p.tune("validation", data=[(X, Y)], grid=5.0),
        r"grid must be a list of prior precisions.*got 5.0",
    ),
    "predictive": (
        lambda p: p.tune("validation", data=[(X, Y)], predictive="mc"),
        r"predictive must be a kl.Predictive, .*got 'mc'",
    ),
    "inverting a Fisher": (
        lambda p: kl.damping.Tikhonov(1.0).invert(p.fisher),
        r"invert takes a single block.*invert_all",
    ),
    "inverting all of a block": (
        lambda p: kl.damping.Tikhonov(1.0).invert_all(p.fisher["0"]),
        r"invert_all takes a Fisher or a dict of blocks; got KroneckerBlock",
    ),
}


@pytest.mark.parametrize("name", CALLS_BY_TYPE)
def test_arguments_of_another_type(name):
    call, message = CALLS_BY_TYPE[name]
    with pytest.raises(TypeError, match=message):
        call(kl.KronLaplace(mlp32(), "classification").fit([(X, Y)]))


def test_a_gradient_without_the_bias():
    posterior = kl.KronLaplace(mlp32(), "classification").fit([(X, Y)])
    q, p = posterior.fisher["0"].shape
    with pytest.raises(ValueError, match=rf"must have shape \(..., {q}, {p}\).* bias as the last column"):
        posterior.covariance()["0"].solve(torch.zeros(q, p - 1))


def test_noise_of_a_classifier():
    posterior = kl.KronLaplace(mlp32(), "classification").fit([(X, Y)])
    with pytest.raises(ValueError, match="noise_std only applies to the Gaussian likelihood"):
        posterior.hyperparameters = kl.Hyperparameters(kl.IsotropicPrior(1.0), noise_std=1.0)


@pytest.mark.parametrize("call", ["tune", "log_marginal_likelihood", "covariance", "predict"])
def test_changed_weights_are_an_error_everywhere(call):
    model = mlp32()
    posterior = kl.KronLaplace(model, "classification").fit([(X, Y)])
    posterior.covariance()
    with torch.no_grad():
        model[0].weight.add_(0.1)
    arguments = (X,) if call == "predict" else ()
    with pytest.raises(RuntimeError, match="changed after the posterior was fitted"):
        getattr(posterior, call)(*arguments)
