"""The posterior against dense computations in float64: evidence, functional variance, predictions, samples."""

import math

import pytest
import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import kronlaplace as kl
from tests.support import oracles
from tests.support.networks import CASES, cnn, mlp

RTOL = 1e-9


def fitted(case, **options):
    return kl.KronLaplace(case.model, case.likelihood, layers=case.layers, **options).fit(case.batches())


def dense_precision(posterior, prior_precision):
    """``N/τ · blockdiag(G ⊗ A) + diag(δ)`` from the factors, with nothing of ours but ``to_dense``."""
    fisher = posterior.fisher
    sizes = [math.prod(block.shape) for block in fisher.values()]
    prior = torch.cat([torch.full((n,), d, dtype=torch.float64) for n, d in zip(sizes, prior_precision, strict=True)])
    return fisher.to_dense() * fisher.n_examples / posterior.temperature + torch.diag(prior), prior


@pytest.mark.quick(2)
@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression"])
@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize(("layerwise", "temperature"), [(False, 1.0), (True, 0.5)])
def test_evidence_and_functional_variance_equal_dense(network, likelihood, layerwise, temperature):
    case = CASES[network](likelihood)
    deltas = [0.3 + i for i in range(len(case.layers))] if layerwise else [0.3] * len(case.layers)
    posterior = fitted(case, prior_precision=deltas if layerwise else 0.3, temperature=temperature)
    precision, prior = dense_precision(posterior, deltas)

    theta = torch.cat([oracles.weight_matrix(case.model.get_submodule(n)).flatten() for n in case.layers])
    expected = (
        oracles.log_likelihood(case.model, case.inputs, case.targets, likelihood) / temperature
        - 0.5 * (prior * theta**2).sum()
        - 0.5 * (torch.logdet(precision) - prior.log().sum())
    )
    torch.testing.assert_close(posterior.log_marginal_likelihood(), expected, rtol=RTOL, atol=0)

    covariance = torch.linalg.inv(precision)
    jacobians = torch.stack([oracles.jacobian(case.model, case.layers, x) for x in case.inputs])
    expected = jacobians @ covariance @ jacobians.mT
    actual = posterior.functional_variance(case.inputs)
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=RTOL * float(expected.abs().max()))
    diagonal = posterior.functional_variance(case.inputs, diagonal=True)
    torch.testing.assert_close(diagonal, expected.diagonal(dim1=1, dim2=2), rtol=RTOL, atol=0)


@pytest.mark.quick(1)
@pytest.mark.parametrize("budget", [1, 300])
@pytest.mark.parametrize("network", ["cnn", "sequence"])
def test_functional_variance_does_not_depend_on_chunks(network, budget, monkeypatch):
    """Neither on the chunks of examples nor on how many rows of a shared layer are formed at a time."""
    case = CASES[network]()
    posterior = fitted(case)
    whole = posterior.functional_variance(case.inputs)
    variance = posterior.functional_variance(case.inputs, diagonal=True)
    monkeypatch.setattr("kronlaplace.laplace.layer_covariance.BUDGET", budget)
    monkeypatch.setattr("kronlaplace.laplace.linearized._FIRST_CHUNK", 2)
    torch.testing.assert_close(posterior.functional_variance(case.inputs), whole)
    torch.testing.assert_close(posterior.functional_variance(case.inputs, diagonal=True), variance)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max([self.numel, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


def test_no_tensor_of_the_jacobians_size():
    """One layer used once, 40 outputs: nothing as large as its (N, C, q·p) Jacobian is made."""
    model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Tanh(), torch.nn.Linear(50, 40))
    x = torch.randn(16, 30)
    posterior = kl.KronLaplace(model, "classification").fit([x], sampling="mc")
    with Largest() as largest:
        posterior.functional_variance(x)
    assert largest.numel == 16 * 40 * 50  # the rotated gradients of the hidden layer: N·C·q


def test_no_tensor_of_the_jacobians_size_on_shared_weights(monkeypatch):
    """A wide layer used at two positions: its (N, C, q·p) Jacobian is formed a row of ``q`` at a time."""
    model = torch.nn.Sequential(torch.nn.Linear(200, 30), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(60, 8))
    x = torch.randn(2, 2, 200)
    posterior = kl.KronLaplace(model, "classification").fit([x], sampling="mc")
    posterior.covariance()  # the decompositions are not what is measured
    monkeypatch.setattr("kronlaplace.laplace.layer_covariance.BUDGET", 1)
    with Largest() as largest:
        posterior.functional_variance(x)
    assert largest.numel < 201**2 + 1 < 2 * 8 * 30 * 201


def test_evidence_gradients():
    case = mlp("regression")
    posterior = fitted(case)
    precision = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(posterior.log_marginal_likelihood, (precision, noise))


@pytest.mark.quick(2)
@pytest.mark.parametrize("sampling", ["exact", "mc", "empirical"])
@pytest.mark.filterwarnings("ignore:sampling=.empirical.")
def test_another_noise_equals_a_fit_with_that_noise(sampling):
    """Rescaling the Fisher is what estimating it again would give."""
    case = mlp("regression")

    def fit(noise_std):
        return kl.KronLaplace(case.model, kl.Gaussian(noise_std)).fit(case.batches(), sampling=sampling)

    first, second = fit(1.0), fit(0.4)
    torch.testing.assert_close(first.log_marginal_likelihood(noise_std=0.4), second.log_marginal_likelihood())
    first.likelihood = kl.Gaussian(0.4)
    torch.testing.assert_close(first.functional_variance(case.inputs), second.functional_variance(case.inputs))


@pytest.mark.quick(3)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_tuning_finds_the_maximum_of_the_evidence(likelihood, structure):
    case = cnn(likelihood)
    posterior = fitted(case, prior_precision=1e-3)
    before = posterior.log_marginal_likelihood()
    posterior.tune("evidence", structure)
    assert posterior.prior_precision.shape == (() if structure == "scalar" else (3,))
    best = posterior.log_marginal_likelihood()
    assert best > before
    for factor in (0.97, 1.03):
        assert posterior.log_marginal_likelihood(factor * posterior.prior_precision) < best
        if likelihood == "regression":
            assert posterior.log_marginal_likelihood(noise_std=factor * posterior.likelihood.noise_std) < best


def test_tuning_finds_the_global_maximum_from_any_start():
    case = mlp("regression")
    results = [float(fitted(case, prior_precision=start).tune().prior_precision) for start in (1e-8, 1.0, 1e8)]
    assert max(results) / min(results) < 1.01


@pytest.mark.grid
def test_tuning_beats_a_fine_grid():
    case = mlp()
    posterior = fitted(case).tune()
    grid = [float(posterior.log_marginal_likelihood(d)) for d in torch.logspace(-6, 6, 241).tolist()]
    assert float(posterior.log_marginal_likelihood()) >= max(grid)


def test_tuning_warns_at_the_edge():
    """Weights that are all zero are best explained by an infinite prior precision."""
    case = mlp()
    for parameter in case.model.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.warns(UserWarning, match="at the edge of the range searched for: prior precision"):
        fitted(case).tune()


@pytest.mark.grid
def test_covariance_of_samples_is_the_inverse_precision():
    """100,000 draws; every entry within six of its own standard errors, √((Σ_ii Σ_jj + Σ_ij²) / n)."""
    case = mlp(outputs=2)
    posterior = fitted(case, prior_precision=0.8)
    n = 100_000
    draws = posterior.sample(n)
    assert {name: tuple(d.shape[1:]) for name, d in draws.items()} == {
        name: tuple(p.shape) for name, p in case.model.named_parameters()
    }
    flat = torch.cat(
        [torch.cat([draws[f"{i}.weight"], draws[f"{i}.bias"][:, :, None]], dim=2).flatten(1) for i in (0, 2)], dim=1
    )
    theta = torch.cat([oracles.weight_matrix(case.model[i]).flatten() for i in (0, 2)])
    precision, _ = dense_precision(posterior, [0.8, 0.8])
    expected = torch.linalg.inv(precision)
    variance = expected.diagonal()
    standard_error = torch.sqrt((torch.outer(variance, variance) + expected**2) / n)
    assert ((flat.T.cov() - expected).abs() / standard_error).max() < 6
    assert ((flat.mean(0) - theta).abs() / (variance / n).sqrt()).max() < 6


def test_samples_are_reproducible():
    posterior = fitted(mlp())
    first, again, other = posterior.sample(2), posterior.sample(2), posterior.sample(2, seed=1)
    assert torch.equal(first["0.weight"], again["0.weight"])
    assert not torch.equal(first["0.weight"], other["0.weight"])


@pytest.mark.quick(3)
@pytest.mark.parametrize("link", ["margin", "probit", "centered-probit", "mc", "bridge"])
@pytest.mark.parametrize("network", CASES)
def test_classification_predictions_are_probabilities(network, link):
    case = CASES[network]()
    p = fitted(case).predict(case.inputs, link=link)
    assert p.shape == (len(case.inputs), case.model(case.inputs).shape[1])
    torch.testing.assert_close(p.sum(1), torch.ones(len(p)).double())
    assert (p >= 0).all()


def test_probit_prediction_by_hand():
    case = mlp()
    posterior = fitted(case)
    variance = posterior.functional_variance(case.inputs).diagonal(dim1=1, dim2=2)
    expected = (case.model(case.inputs) / (1 + math.pi / 8 * variance).sqrt()).softmax(1)
    torch.testing.assert_close(posterior.predict(case.inputs, link="probit"), expected.detach())


def test_centered_probit_prediction_by_hand():
    """MacKay's formula for each logit less the mean of all; a shift of all logits by anything changes nothing."""
    case = mlp()
    posterior = fitted(case)
    covariance = posterior.functional_variance(case.inputs)
    c = covariance.shape[1]
    centering = torch.eye(c, dtype=torch.float64) - 1 / c
    variance = (centering @ covariance @ centering).diagonal(dim1=1, dim2=2)
    logits = case.model(case.inputs).detach() @ centering
    expected = (logits / (1 + math.pi / 8 * variance).sqrt()).softmax(1)
    torch.testing.assert_close(posterior.predict(case.inputs, link="centered-probit"), expected)
    shifted = covariance + torch.rand(len(covariance), 1, 1).double()
    likelihood = kl.Categorical()
    for mean in (logits, logits + 3):
        actual = likelihood.predictive(mean, shifted, kl.Link.CENTERED_PROBIT, 1, None)
        torch.testing.assert_close(actual, expected)


@pytest.mark.grid
def test_strong_prior_recovers_the_trained_network():
    case = cnn()
    posterior = fitted(case, prior_precision=1e12)
    expected = case.model(case.inputs).softmax(1).detach()
    for options in ({}, {"link": "mc"}, {"method": "sample"}):
        torch.testing.assert_close(posterior.predict(case.inputs, **options), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.grid
def test_sampled_predictions_average_the_network_over_the_posterior():
    case = mlp("regression")
    posterior = fitted(case, prior_precision=5.0)
    prediction = posterior.predict(case.inputs, method="sample", n_samples=4000)
    draws = posterior.sample(4000, seed=9)
    f = torch.stack(
        [functional_call(case.model, {k: v[i] for k, v in draws.items()}, (case.inputs,)) for i in range(4000)]
    ).detach()
    # Two independent sets of draws: six standard errors of their difference.
    error = 6 * (2 * f.var(0) / 4000).sqrt()
    assert ((prediction.mean - f.mean(0)).abs() < error).all()
    torch.testing.assert_close(prediction.variance, f.var(0), rtol=0.25, atol=0)


@pytest.mark.grid
def test_glm_and_sampling_agree_where_the_network_is_linear():
    """In the last layer alone the network is linear in its weights: sampling must find the closed form."""
    case = mlp("regression")
    posterior = kl.KronLaplace(case.model, "regression", layers=["2"]).fit(case.batches())
    glm = posterior.predict(case.inputs)
    sampled = posterior.predict(case.inputs, method="sample", n_samples=20_000)
    error = 6 * (glm.variance / 20_000).sqrt()
    assert ((sampled.mean - glm.mean).abs() < error).all()
    torch.testing.assert_close(sampled.variance, glm.variance, rtol=6 * math.sqrt(2 / 20_000), atol=0)


@pytest.mark.grid
def test_variance_of_few_samples_is_unbiased():
    """Two draws at a time: the mean over 500 seeds is the variance (six standard errors; n instead of n−1 gives half)."""
    case = mlp("regression", outputs=1)
    posterior = kl.KronLaplace(case.model, "regression", layers=["2"]).fit(case.batches())
    x = case.inputs[:1]
    few = [posterior.predict(x, method="sample", n_samples=2, seed=seed).variance for seed in range(500)]
    expected = posterior.predict(x).variance
    torch.testing.assert_close(torch.stack(few).mean(0), expected, rtol=6 * math.sqrt(2 / 500), atol=0)


@pytest.mark.grid
def test_variance_of_samples_survives_a_large_mean():
    """In float32, targets around 10,000: a difference of sums of squares would be rounding noise."""
    case = mlp("regression", outputs=1)
    with torch.no_grad():
        case.model[2].bias += 10_000
    model = case.model.float()
    x, y = case.inputs.float(), case.targets.float() + 10_000
    posterior = kl.KronLaplace(model, "regression", layers=["2"], prior_precision=100.0).fit([(x, y)])
    sampled = posterior.predict(x, method="sample", n_samples=2000).variance
    # Six standard errors of 2,000 draws, and the float32 resolution of an output of 10,000.
    expected = posterior.predict(x).variance
    torch.testing.assert_close(sampled, expected, rtol=6 * math.sqrt(2 / 2000), atol=1e-5)


def test_tuning_does_not_depend_on_the_callers_gradient_mode():
    case = mlp()
    with torch.no_grad():
        inside = fitted(case).tune().prior_precision
    assert torch.equal(inside, fitted(case).tune().prior_precision)


@pytest.mark.parametrize("likelihood", ["regression", "binary"])
def test_outputs_without_a_column_axis(likelihood):
    """A network that returns (N,) gives predictions (N,), equal to those of its (N, 1) twin."""

    class Squeezed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).squeeze(1)

    case = mlp(likelihood, outputs=1)
    twin = fitted(case)
    flat = kl.KronLaplace(Squeezed(case.model), likelihood).fit([(case.inputs, case.targets.squeeze(1))])
    torch.testing.assert_close(flat.log_marginal_likelihood(), twin.log_marginal_likelihood())
    ours, theirs = flat.predict(case.inputs), twin.predict(case.inputs)
    if likelihood == "regression":
        assert ours.mean.shape == ours.variance.shape == (7,)
        ours, theirs = ours.variance, theirs.variance
    torch.testing.assert_close(ours, theirs.squeeze(1))


def test_fit_with_a_ready_made_fisher():
    case = cnn()
    fisher = kl.estimate_fisher(case.model, case.batches(), "classification", sampling="exact")
    ready = kl.KronLaplace(case.model, "classification").fit(fisher=fisher)
    torch.testing.assert_close(ready.predict(case.inputs), fitted(case).predict(case.inputs))
    assert ready.fisher is fisher


def test_one_fisher_serves_posteriors_over_some_of_its_layers():
    case = cnn()
    fisher = kl.estimate_fisher(case.model, case.batches(), "classification", sampling="exact")
    shared = kl.KronLaplace(case.model, "classification", layers=["5"]).fit(fisher=fisher)
    own = kl.KronLaplace(case.model, "classification", layers=["5"]).fit(case.batches())
    torch.testing.assert_close(shared.log_marginal_likelihood(), own.log_marginal_likelihood())
    torch.testing.assert_close(shared.predict(case.inputs), own.predict(case.inputs))


@pytest.mark.parametrize("change", ["prior_precision", "temperature", "likelihood", "fit"])
def test_predictions_follow_every_hyperparameter(change):
    """The covariance is kept between predictions, but never beyond a change of what it follows from."""
    case = mlp("regression")
    options = {"prior_precision": 1.0, "temperature": 1.0}
    posterior = kl.KronLaplace(case.model, kl.Gaussian(), **options).fit(case.batches())
    before = posterior.functional_variance(case.inputs)
    if change == "fit":
        posterior.fit(case.batches()[:1])
        fresh = kl.KronLaplace(case.model, kl.Gaussian(), **options).fit(case.batches()[:1])
    else:
        new = kl.Gaussian(0.3) if change == "likelihood" else 0.3
        setattr(posterior, change, new)
        likelihood = new if change == "likelihood" else kl.Gaussian()
        fresh = kl.KronLaplace(case.model, likelihood, **options).fit(case.batches())
        setattr(fresh, change, new)
    after = posterior.functional_variance(case.inputs)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, fresh.functional_variance(case.inputs))


def test_hyperparameters_are_checked_when_set():
    posterior = fitted(mlp())
    with pytest.raises(ValueError, match="prior_precision must be positive and finite, got 0"):
        posterior.prior_precision = 0
    with pytest.raises(ValueError, match="temperature must be a positive finite number, got -1"):
        posterior.temperature = -1
    with pytest.raises(ValueError, match=r"fitted with Categorical\(\); Bernoulli\(\) needs a new fit"):
        posterior.likelihood = kl.Bernoulli()


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_save_and_load(likelihood, tmp_path):
    case = cnn(likelihood)
    posterior = fitted(case, temperature=0.7).tune(structure="layerwise")
    posterior.save(tmp_path / "p.safetensors")
    loaded = kl.KronLaplace.load(tmp_path / "p.safetensors", case.model)
    assert loaded.likelihood == posterior.likelihood
    assert loaded.temperature == 0.7
    assert torch.equal(loaded.prior_precision, posterior.prior_precision)
    assert torch.equal(loaded.log_marginal_likelihood(), posterior.log_marginal_likelihood())
    assert torch.equal(loaded.functional_variance(case.inputs), posterior.functional_variance(case.inputs))
    assert all(torch.equal(a, b) for a, b in zip(loaded.sample(2).values(), posterior.sample(2).values(), strict=True))
