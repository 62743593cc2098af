"""Our posterior beside laplace-torch's own."""

import math

import pytest
import torch

import kronlaplace as kl
from tests.support.laplace_torch import NETWORKS, PRIORS, assert_close, double, fitted, predictive, problem, separate


@pytest.mark.quick(1)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_parity_in_classification(network, subset):
    """`KronLaplace` and ``Laplace(..., "kron")`` with its default backend, on networks without biases.

    Theirs keeps the Kronecker factors of the sum over the data and calls the prior precision's parameter groups what are
    our layers; ours keeps means over examples and multiplies by ``N``. Both predictives are linearised, both probit links
    use the marginal variances. With biases the posteriors differ: joint blocks here, separate ones there (see
    `test_parity_with_biases`).
    """
    model, x, _, data = problem(NETWORKS[network](bias=False))
    last = [name for name, _ in model.named_modules()][-1]
    ours = kl.KronLaplace(model, "classification", layers=None if subset == "all" else [last]).fit(data)
    theirs = fitted(model, data, subset=subset, backend=None)
    layerwise = [0.1 * (i + 1) for i in range(len(ours.fisher))]
    for prior in [*PRIORS, layerwise]:
        for temperature in (1.0, 0.3):
            ours.prior_precision = prior
            ours.temperature = theirs.temperature = temperature
            theirs.prior_precision = double(prior)
            torch.testing.assert_close(
                ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), rtol=1e-10, atol=1e-8
            )
            torch.testing.assert_close(ours.predict(x, link="probit"), predictive(theirs, x), rtol=1e-9, atol=1e-12)


@pytest.mark.quick(1)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_parity_in_regression(network, subset):
    """The same in regression.

    Theirs halves the squared error's second derivative, which leaves the Fisher of unit noise, and rescales it by
    ``sigma_noise``; ours is estimated with one noise and rescaled to another in the same way. The variance that theirs
    returns is of the function, without noise: `Prediction.variance`, not ``total_variance``.
    """
    model, x, _, data = problem(NETWORKS[network](bias=False), "regression")
    last = [name for name, _ in model.named_modules()][-1]
    ours = kl.KronLaplace(model, kl.Gaussian(noise_std=0.7), layers=None if subset == "all" else [last]).fit(data)
    theirs = fitted(model, data, "regression", subset, backend=None)
    for noise in (0.1, 1.0, 3.0):
        for prior in PRIORS:
            torch.testing.assert_close(
                ours.log_marginal_likelihood(prior, noise),
                theirs.log_marginal_likelihood(double(prior), double(noise)),
                rtol=1e-10,
                atol=1e-8,
            )
            ours.prior_precision, ours.likelihood = prior, kl.Gaussian(noise_std=noise)
            mean, covariance = theirs(x)
            prediction = ours.predict(x)
            torch.testing.assert_close(prediction.mean, mean, rtol=1e-12, atol=0)
            torch.testing.assert_close(prediction.variance, covariance.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(ours.functional_variance(x), covariance, rtol=1e-8, atol=1e-9)


@pytest.mark.quick(2)
@pytest.mark.parametrize("estimator", ["kfac", "tkfac"])
@pytest.mark.parametrize("network", NETWORKS)
def test_parity_with_biases(network, estimator):
    """Our posterior's Fisher, with weights and biases taken apart, is theirs through our backend; so is the evidence.

    The evidences themselves differ: ours also has the terms between a layer's weights and its bias.
    """
    model, _, _, data = problem(NETWORKS[network]())
    ours = kl.KronLaplace(model, "classification", estimator).fit(data)
    theirs = fitted(model, data, estimator=estimator)
    fisher = separate(ours.fisher, model)
    assert_close(theirs.H_facs.to_matrix(), fisher, 1e-12)
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    for prior in PRIORS[1:]:
        log_det = torch.logdet(fisher + prior * torch.eye(len(fisher)).double()) - len(fisher) * math.log(prior)
        log_likelihood = ours.likelihood.log_likelihood(ours.fisher.statistics)
        evidence = log_likelihood - 0.5 * (log_det + prior * parameters.square().sum())
        apart = theirs.log_marginal_likelihood(double(prior))
        torch.testing.assert_close(apart, evidence, rtol=1e-10, atol=1e-8)
        if prior < 100:
            assert float((ours.log_marginal_likelihood(prior) - apart).abs()) > 1e-3
