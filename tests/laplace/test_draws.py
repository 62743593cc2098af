"""Draws of outputs against the moments of dense algebra, and what follows from them against torch's distributions."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from tests.support.output_shapes import outputs_and_covariance, problem, within

N = 4000
SIGMAS = 5.5


def assert_moments(draws, mean, covariance):
    """Whether draws ``(n, K)`` have this mean and covariance, within the statistical error of each entry."""
    n = len(draws)
    variance = covariance.diagonal()
    assert ((draws.mean(0) - mean).abs() <= SIGMAS * (variance / n).sqrt() + 1e-12).all()
    spread = ((torch.outer(variance, variance) + covariance.square()) / n).sqrt()
    assert ((draws.T.cov() - covariance).abs() <= SIGMAS * spread + 1e-12).all()


NETWORKS = [
    ("mlp", "classification"),
    ("tokens", "classification"),
    ("segmentation", "classification"),
    ("cnn", "binary"),
    ("flat", "regression"),
    ("mlp", "heteroscedastic"),
]


@pytest.mark.quick(3)
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("network", "likelihood"), NETWORKS)
def test_moments_of_linearized_draws_equal_dense(network, likelihood, joint):
    """Of all examples together; by default draws of different examples are independent."""
    made = problem(network, likelihood)
    posterior = made.fitted(prior_precision=0.5)
    mean, covariance = outputs_and_covariance(made, posterior)
    if not joint:
        covariance = torch.stack([torch.diag_embed(block) for block in within(covariance).permute(1, 2, 0)]).permute(
            2, 0, 3, 1
        )
    draws = posterior.draw(made.inputs, N, joint=joint)
    assert draws.outputs.shape == (N, *made.model(made.inputs).shape)
    assert len(draws) == N
    size = mean.numel()
    assert_moments(draws.outputs.flatten(1), mean.flatten(), covariance.reshape(size, size))


def test_draws_of_weights_are_one_function_each():
    """A linear network's outputs are Gaussian exactly, with the covariances between examples."""
    made = problem("linear", "regression")
    posterior = made.fitted(prior_precision=0.5)
    mean, covariance = outputs_and_covariance(made, posterior)
    draws = posterior.draw(made.inputs, 1500, method="sample").outputs.flatten(1)
    assert_moments(draws, mean.flatten(), covariance.reshape(draws.shape[1], -1))


@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression", "heteroscedastic"])
def test_sampled_predictions_average_the_draws(likelihood):
    made = problem("mlp", likelihood)
    posterior = made.fitted()
    draws = posterior.draw(made.inputs, 12, method="sample", seed=3)
    predicted = posterior.predict(made.inputs, method="sample", n_samples=12, seed=3)
    mean = predicted.mean if isinstance(predicted, kl.Prediction) else predicted
    torch.testing.assert_close(draws.predictions.mean(0), mean)
    if isinstance(predicted, kl.Prediction):
        torch.testing.assert_close(draws.predictions.var(0), predicted.variance)


@pytest.mark.parametrize(
    ("network", "likelihood", "predictions"),
    [
        ("mlp", "classification", lambda f: torch.softmax(f, -1)),
        ("tokens", "classification", lambda f: torch.softmax(f, -1)),
        ("segmentation", "classification", lambda f: torch.softmax(f, 2)),
        ("single-tokens", "binary", torch.sigmoid),
        ("flat", "regression", lambda f: f),
        ("mlp", "heteroscedastic", lambda f: f[..., :2]),
    ],
)
def test_predictions_of_each_draw(network, likelihood, predictions):
    made = problem(network, likelihood)
    draws = made.fitted().draw(made.inputs, 5)
    torch.testing.assert_close(draws.predictions, predictions(draws.outputs))
    observed = draws.observations()
    assert observed.shape == (5, *made.targets.shape)
    for k in range(5):  # observations are targets
        allowed, message = draws.likelihood.check_targets(draws.outputs[k], observed[k])
        assert allowed, message


def constant(likelihood, outputs, copies):
    """Draws that all have the same outputs."""
    return kl.Draws(torch.tensor(outputs, dtype=torch.float64).expand(copies, 1, len(outputs)), likelihood)


def test_observations_follow_the_likelihood():
    n, logits = 20_000, [0.3, -1.0, 1.5]
    labels = constant(kl.Categorical(), logits, n).observations(seed=1)
    p = torch.softmax(torch.tensor(logits), 0)
    shares = torch.bincount(labels.flatten(), minlength=3) / n
    assert ((shares - p).abs() < SIGMAS * (p * (1 - p) / n).sqrt()).all()
    p = torch.sigmoid(torch.tensor(logits))
    shares = constant(kl.Bernoulli(), logits, n).observations(seed=1).double().mean((0, 1))
    assert ((shares - p).abs() < SIGMAS * (p * (1 - p) / n).sqrt()).all()
    noisy = constant(kl.Gaussian(0.5), logits, n).observations(seed=1)[:, 0]
    assert_moments(noisy, torch.tensor(logits).double(), 0.25 * torch.eye(3).double())
    noisy = constant(kl.HeteroscedasticGaussian(), [0.3, -1.0, math.log(0.2), math.log(3.0)], n).observations()[:, 0]
    assert_moments(noisy, torch.tensor([0.3, -1.0]).double(), torch.diag(torch.tensor([0.2, 3.0])).double())


def test_observations_have_the_variance_that_is_predicted():
    made = problem("flat", "regression")
    posterior = made.fitted(prior_precision=0.5)
    predicted = posterior.predict(made.inputs)
    observed = posterior.draw(made.inputs, N).observations(seed=1)
    assert_moments(observed, predicted.mean, torch.diag(predicted.total_variance))


def test_without_a_noise_model_there_are_no_observations():
    made = problem("mlp", "regression")
    posterior = kl.KronLaplace(made.model, "euclidean").fit(made.data())
    draws = posterior.draw(made.inputs, 3)
    assert torch.equal(draws.predictions, draws.outputs)
    with pytest.raises(NotImplementedError, match=r"Euclidean has no noise model.*kl\.Gaussian"):
        draws.observations()


def test_loaders_seeds_and_random_states():
    made = problem("mlp")
    posterior, x = made.fitted(), made.inputs
    before = torch.get_rng_state()
    loader = DataLoader(TensorDataset(x), batch_size=3)
    sampled = posterior.draw(loader, 4, method="sample", seed=2).outputs
    torch.testing.assert_close(sampled, posterior.draw(x, 4, method="sample", seed=2).outputs)
    first, second, other = (posterior.draw(loader, 4, seed=s).outputs for s in (1, 1, 2))
    assert first.shape == (4, *made.model(x).shape)
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    again = posterior.draw([(x[:3],), (x[:3],)], 4).outputs  # no batch repeats the draws of another
    assert not torch.allclose(again[:, :3], again[:, 3:])
    assert torch.equal(
        posterior.draw(x, 4, seed=1).observations(seed=5), posterior.draw(x, 4, seed=1).observations(seed=5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert repr(posterior.draw(x, 4)) == "Draws(4 draws of outputs of shape (7, 4), Categorical())"


@pytest.mark.parametrize("method", ["glm", "sample"])
def test_in_half_precision_draws_are_single(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(torch.bfloat16).eval()
    x = torch.randn(6, 4, dtype=torch.bfloat16)
    draws = kl.KronLaplace(model, "classification").fit([(x, torch.arange(6) % 3)]).draw(x, 4, method=method)
    assert draws.outputs.dtype == draws.predictions.dtype == torch.float32
    torch.testing.assert_close(draws.predictions.sum(-1), torch.ones(4, 6))


@pytest.mark.parametrize("method", ["glm", "sample"])
def test_only_the_network_is_rounded_under_autocast(method):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).eval(), torch.randn(5, 4)
    posterior = kl.KronLaplace(model, "classification").fit([(x, torch.arange(5) % 3)])
    expected = posterior.draw(x, 3, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        draws = posterior.draw(x, 3, method=method)
        predictions, uncertainty = draws.predictions, posterior.uncertainty(x)
    assert draws.outputs.dtype == predictions.dtype == uncertainty.total.dtype == torch.float32
    torch.testing.assert_close(predictions.sum(-1), torch.ones(3, 5), rtol=1e-6, atol=0)
    torch.testing.assert_close(draws.outputs, expected.outputs, rtol=0.02, atol=0.02)


def test_refusals():
    made = problem("mlp")
    posterior, x = made.fitted(), made.inputs
    with pytest.raises(ValueError, match=r"joint=True would have no effect: with method=\"sample\""):
        posterior.draw(x, 3, method="sample", joint=True)
    with pytest.raises(ValueError, match="joint=True needs the inputs at once"):
        posterior.draw(made.data(), 3, joint=True)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        posterior.draw(x, 0)
    with pytest.raises(ValueError, match="What is 'nn' elsewhere is 'sample' here"):
        posterior.draw(x, method="nn")
    with pytest.raises(TypeError, match="here it is n, the second argument"):
        posterior.draw(x, n_samples=3)
    with pytest.raises(RuntimeError, match="fit"):
        made.posterior().draw(x)
