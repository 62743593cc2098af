"""The evidence with the exact Gauss-Newton matrix, against dense algebra and a linear model refitted without each row."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import kronlaplace as kl
from kronlaplace.laplace import exact_evidence, output_kernel
from kronlaplace.laplace.output_kernel import OutputKernel
from tests.support import oracles
from tests.support.output_shapes import problem

at_the_edge = pytest.mark.filterwarnings("ignore:the evidence is largest at the edge", "ignore:the tuned noise_std")


@functools.cache
def jacobian(network):
    """Of all outputs of all examples by all weights, ``(n, P)``."""
    made = problem(network, "regression")
    examples = [oracles.example(made.inputs, n) for n in range(len(made.targets))]
    rows = [oracles.weight_gradients(made.model, x) for x in examples]
    return torch.cat([torch.cat([x.flatten(1) for x in row.values()], dim=1) for row in rows])


def kernel_of(posterior):
    return posterior._state.fitted.kernel


def table(n=12, seed=0, noise=0.3):
    """A network of some training on a small table."""
    torch.manual_seed(seed)
    x = torch.randn(n, 3, dtype=torch.float64)
    y = torch.sin(x[:, :1]) + noise * torch.randn(n, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model.eval(), x, y


def dense_evidence(model, x, y, temperature):
    """Of log δ and log σ, by the determinant of the whole precision; and ``J``."""
    rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in model(x)[:, 0]]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    squared = float((model(x) - y).square().sum().detach())

    def evidence(logs):
        delta, sigma = np.exp(logs)
        fit = -squared / (2 * sigma**2) - len(x) * math.log(sigma * math.sqrt(2 * math.pi))
        precision = J.T @ J / (sigma**2 * temperature) + delta * torch.eye(len(theta), dtype=torch.float64)
        occam = float(torch.logdet(precision)) - len(theta) * math.log(delta)
        return fit / temperature - 0.5 * (delta * float(theta @ theta) + occam)

    return evidence, J


# -- the kernel ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "cnn", "norms", "lstm", "depthwise", "tokens", "single-tokens", "flat"])
def test_kernel_is_that_of_the_jacobians(network):
    """Of every output, whatever its shape, batch by batch, with layers of all kinds."""
    made = problem(network, "regression")
    J = jacobian(network)
    torch.testing.assert_close(kernel_of(made.fitted()).matrix, J @ J.T, rtol=1e-9, atol=1e-9)


def test_kernel_is_of_the_layers_of_the_posterior():
    made = problem("mlp", "regression")
    last = kernel_of(made.fitted(layers="last")).matrix
    first, second = (kernel_of(made.fitted(layers=[name])).matrix for name in made.fitted().layers)
    torch.testing.assert_close(first + second, kernel_of(made.fitted()).matrix)
    torch.testing.assert_close(last, second)


def test_a_kernel_of_float32_networks_has_small_eigenvalues():
    """Rounding of the gradients, not of their products: relative to the largest 1e-14, not 1e-7."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.linspace(-1, 1, 40)[:, None]
    kernel = kernel_of(kl.KronLaplace(model, "regression").fit([(x, x)]))  # rank 13 of 40
    assert float(kernel.eigenvalues[:20].max() / kernel.eigenvalues.max()) < 1e-12


@pytest.mark.parametrize("ridge", [1e-3, 0.2, 30.0])
def test_leverages_are_those_of_a_model_refitted_without_each_row(ridge):
    """``σ² / (1 − h)`` is the variance of an observation that is left out, for a linear model with this Jacobian."""
    model, x, y = table()
    _, J = dense_evidence(model, x, y, 1.0)
    sigma = 0.4
    delta = ridge / sigma**2
    left_out = []
    for n in range(len(x)):
        rest = torch.cat([J[:n], J[n + 1 :]])
        covariance = torch.linalg.inv(rest.T @ rest / sigma**2 + delta * torch.eye(J.shape[1], dtype=torch.float64))
        left_out.append(J[n] @ covariance @ J[n] + sigma**2)
    leverages = OutputKernel(J @ J.T).leverages(ridge)
    torch.testing.assert_close(sigma**2 / (1 - leverages), torch.stack(left_out), rtol=1e-7, atol=0)


# -- tuning --------------------------------------------------------------------------------------------------


@at_the_edge
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_exact_blocks_are_tuned_to_the_maximum_of_the_dense_evidence(temperature):
    model, x, y = table(40)
    posterior = kl.KronLaplace(model, "regression", "exact", temperature=temperature).fit(
        [(x[:7], y[:7]), (x[7:], y[7:])]
    )
    posterior.tune()
    found = np.log([float(posterior.prior_precision), posterior.likelihood.noise_std])
    evidence, _ = dense_evidence(model, x, y, temperature)
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}
    best = minimize(lambda u: -evidence(u), np.zeros(2), method="Nelder-Mead", options=options)
    assert evidence(found) >= -best.fun - 1e-6


@at_the_edge
@pytest.mark.parametrize(("n", "grows"), [(9, True), (90, False)])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_kronecker_posteriors_are_as_wide_as_left_out_observations(n, grows, temperature):
    """Noise and prior variance of the exact posterior, times what K-FAC lacks."""
    model, x, y = table(n, noise=0.05 if grows else 0.5)
    _, J = dense_evidence(model, x, y, temperature)
    exact, posterior = (
        kl.KronLaplace(model, "regression", estimator, temperature=temperature).fit([(x, y)]).tune()
        for estimator in ("exact", "kfac")
    )
    delta, variance = float(exact.prior_precision), exact.likelihood.noise_std**2
    scaled = torch.linalg.inv(J.T @ J / (variance * temperature) + delta * torch.eye(J.shape[1], dtype=torch.float64))
    inside = (J @ scaled * J).sum(1) / variance / temperature  # leverages
    left_out = float((1 + temperature * inside / (1 - inside)).median())
    fisher = kl.estimate_fisher(model, [(x, y)], kl.Gaussian(variance**0.5), sampling="exact")
    eigenvalues = torch.linalg.eigvalsh(fisher.to_dense() * n / temperature)
    own = 1 + temperature * float((eigenvalues / (eigenvalues + delta)).sum()) / n
    factor = max(1.0, left_out / own)
    assert (factor > 1.01) == grows
    assert posterior.likelihood.noise_std**2 == pytest.approx(factor * variance, rel=1e-6)
    assert float(posterior.prior_precision) == pytest.approx(delta / factor, rel=1e-6)


def test_a_network_that_interpolates_is_not_taken_for_noise():
    """The noise is 0.05; through Kronecker factors the evidence takes many times as much."""
    torch.manual_seed(2)
    x = torch.rand(30, 1) * 6 - 3
    y = torch.sin(1.5 * x) + 0.05 * torch.randn(30, 1)
    model = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    test_x = torch.linspace(-2.8, 2.8, 200)[:, None]

    def score(*method):
        p = kl.KronLaplace(model, "regression").fit([(x, y)]).tune(*method).predict(test_x)
        return kl.metrics.gaussian_log_likelihood(p.mean, p.total_variance, torch.sin(1.5 * test_x))

    assert score() == score("exact-evidence") > score("evidence") + 0.1


@at_the_edge
def test_what_was_there_before_does_not_matter():
    model, x, y = table()
    results = []
    for start, noise in ((1.0, 1.0), (1e-4, 30.0)):
        likelihood = kl.Gaussian(noise, noise_known=False)
        posterior = kl.KronLaplace(model, likelihood, prior_precision=start).fit([(x, y)])
        for _ in range(2):
            posterior.tune()
            results.append([float(posterior.prior_precision), posterior.likelihood.noise_std])
    np.testing.assert_allclose(results[1:], results[:-1], rtol=1e-6)


@at_the_edge
def test_files_moves_and_samples_of_the_curvature_keep_it(tmp_path):
    model, x, y = table()
    data = [(x, y)]
    fitted = kl.KronLaplace(model, "regression").fit(data)
    fitted.save(tmp_path / "posterior.safetensors")
    loaded = kl.KronLaplace.load(tmp_path / "posterior.safetensors", model)
    expected = fitted.tune().hyperparameters
    assert loaded.tune().hyperparameters.noise_std == pytest.approx(expected.noise_std, rel=1e-9)
    sampled = kl.KronLaplace(model, "regression").fit(data, sampling="mc")
    torch.testing.assert_close(kernel_of(sampled).matrix, kernel_of(fitted).matrix)
    moved = kl.KronLaplace(copy.deepcopy(model), "regression").fit(data).to(torch.float32)
    assert moved.tune().likelihood.noise_std == pytest.approx(expected.noise_std, rel=1e-3)


# -- where there is none -------------------------------------------------------------------------------------


def stream(batches):
    """Data that are gone after the first pass, and say so only then."""

    class Once:
        rest = iter(batches)

        def __iter__(self):
            return self.rest

    return Once()


@at_the_edge
@pytest.mark.filterwarnings("ignore:sampling=.empirical.")
@pytest.mark.parametrize(
    "case", ["many", "large", "iterator", "stream", "fisher", "added", "empirical", "layerwise", "prior", "classes"]
)
def test_elsewhere_it_is_the_evidence_of_the_factors(case, monkeypatch):
    model, x, y = table()
    data = [(x, y)]
    posterior = kl.KronLaplace(model, "regression")
    structure = "layerwise" if case == "layerwise" else "scalar"
    if case == "many":
        monkeypatch.setattr(output_kernel, "LARGEST", 11)
    if case == "large":
        monkeypatch.setattr(output_kernel, "BUDGET", 100)
        model = nn.Sequential(model[0], nn.LayerNorm(8).double(), model[2]).eval()
        posterior = kl.KronLaplace(model, "regression")
    if case == "classes":
        posterior = kl.KronLaplace(model, "binary")
        data = [(x, (y > 0).double())]
    if case == "added":
        posterior.fit(data)
    if case == "prior":
        posterior = kl.KronLaplace(model, "regression", prior_precision=posterior.fit(data).as_prior())
    if case == "fisher":
        posterior.fit(fisher=kl.estimate_fisher(model, data, "regression", sampling="exact"))
    else:
        once = {"iterator": iter, "stream": stream}.get(case, list)
        posterior.fit(once(data), add=case == "added", sampling="empirical" if case == "empirical" else "exact")
    with pytest.raises(ValueError, match='Use method="evidence"'):
        posterior.tune("exact-evidence", structure)
    default = posterior.tune(structure=structure).hyperparameters
    explicit = posterior.tune("evidence", structure).hyperparameters
    torch.testing.assert_close(default.prior.multiples, explicit.prior.multiples, rtol=1e-9, atol=0)
    assert exact_evidence.LARGEST == 1024


def test_the_pass_leaves_random_states_alone():
    model, x, y = table()
    own = torch.Generator()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 5, shuffle=True, generator=own)
    states = []
    for largest in (0, 1024):
        torch.manual_seed(3)
        own.manual_seed(4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_kernel, "LARGEST", largest)
            kl.KronLaplace(model, "regression").fit(loader)
        states.append(torch.cat([torch.get_rng_state(), own.get_state()]))
    assert torch.equal(*states)


# -- a noise that is stated ----------------------------------------------------------------------------------


@at_the_edge
@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("method", ["evidence", "exact-evidence", "validation"])
def test_a_stated_noise_is_kept(method):
    model, x, y = table(40)
    options = {"data": [(x + 0.1, y)], "grid": [0.1, 1.0, 10.0]} if method == "validation" else {}
    posterior = kl.KronLaplace(model, kl.Gaussian(0.25)).fit([(x, y)])
    before = float(posterior.prior_precision)
    assert posterior.tune(method, **options).likelihood == kl.Gaussian(0.25)
    assert float(posterior.prior_precision) != before
    assert posterior.tune(method, noise="tuned", **options).likelihood != kl.Gaussian(0.25)
    posterior.likelihood = kl.Gaussian(0.5)
    assert posterior.tune(method, **options).likelihood == kl.Gaussian(0.5)


@at_the_edge
@pytest.mark.parametrize("likelihood", ["regression", kl.Gaussian(), kl.Gaussian(noise_std=3.0, noise_known=False)])
def test_a_noise_that_is_not_stated_is_tuned_again_and_again(likelihood, tmp_path):
    model, x, y = table(40)
    posterior = kl.KronLaplace(model, likelihood).fit([(x, y)])
    noise = posterior.tune().likelihood.noise_std
    assert not posterior.likelihood.noise_known
    posterior.save(tmp_path / "posterior")
    other = kl.KronLaplace.load(tmp_path / "posterior", model)
    other.hyperparameters = kl.Hyperparameters(other.prior, 7.0)
    assert other.tune().likelihood.noise_std == pytest.approx(noise, rel=1e-6)
    assert posterior.tune(noise="fixed").likelihood.noise_std == noise


def test_likelihoods_of_files_know_whether_the_noise_is():
    """Those of earlier versions do not say, and tuned it."""
    for likelihood in (kl.Gaussian(), kl.Gaussian(0.3), kl.Gaussian(0.3, noise_known=False)):
        restored = kl.Likelihood.from_json(likelihood.to_json())
        assert (restored, restored.noise_known) == (likelihood, likelihood.noise_known)
    earlier = kl.Likelihood.from_json({"name": "Gaussian", "noise_std": 0.3})
    assert earlier == kl.Gaussian(0.3)
    assert not earlier.noise_known
    assert not kl.Categorical().noise_known
    with pytest.raises(TypeError, match="noise_known must be True, False or None, got 'yes'"):
        kl.Gaussian(0.3, noise_known="yes")
