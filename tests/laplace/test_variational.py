"""Variational curvature, against direct optimization of the bound and dense algebra."""

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from kronlaplace.laplace import variational
from kronlaplace.laplace.averaged_sampling import OfOneBatch
from kronlaplace.laplace.predictive import classes_last
from kronlaplace.likelihoods import Sampling, averages, categorical
from kronlaplace.likelihoods.logistic import logistic_curvature
from tests.support.posteriors import outputs_and_jacobians, problem

ESTIMATORS = ["kfac", "tkfac", "kfoc", "ekfac", "diagonal", "exact"]
at_the_edge = pytest.mark.filterwarnings("ignore:the evidence is largest at the edge")
EXACT = {"sampling": "exact", "rounds": 100, "tolerance": 1e-9}


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# -- a dense Gaussian found by direct optimization -----------------------------------------------------------


def certain_network(classes, n=12):
    """a network that is certain of its labels, with data; the posterior is over its last layer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, classes))
    with torch.no_grad():
        model[2].weight *= 12
    x = 2 * torch.randn(n, 2)
    f = model(x).detach()
    y = (f > 0).double() if classes == 1 else f.argmax(1)
    return model.eval(), x, y


def nodes(count, dimensions):
    """Gauss-Hermite nodes of a standard normal, (count ** dimensions, dimensions), and their weights."""
    z, w = np.polynomial.hermite_e.hermegauss(count)
    grid = torch.cartesian_prod(*[torch.tensor(z)] * dimensions).view(-1, dimensions)
    weights = torch.cartesian_prod(*[torch.tensor(w / w.sum())] * dimensions).view(-1, dimensions).prod(1)
    return grid, weights


def differences(mean, covariance):
    """Draws of the logits less the first one, (S, N, C - 1), at the nodes, with weights."""
    c = mean.shape[1]
    contrast = torch.cat([-torch.ones(c - 1, 1), torch.eye(c - 1)], dim=1)
    z, w = nodes(40, c - 1)
    root = torch.linalg.cholesky(contrast @ covariance @ contrast.T)
    return mean @ contrast.T + torch.einsum("ncd,sd->snc", root, z), w


def softmax_by_quadrature(mean, covariance, generator):
    d, w = differences(mean, covariance)
    f = F.pad(d, (1, 0))
    p = f.softmax(-1)
    metric = torch.einsum("s,snc,cd->ncd", w, p, torch.eye(p.shape[-1])) - torch.einsum("s,snc,snd->ncd", w, p, p)
    return metric, mean[:, 0] + torch.einsum("s,sn->n", w, f.logsumexp(-1))


def expected_log_likelihood(f, covariance, y):
    if f.shape[1] == 1:
        z, w = nodes(100, 1)
        draws = f + covariance[:, :, 0].sqrt() * z.T
        return (y * f).sum() - (w * F.softplus(draws)).sum()
    normalizer = softmax_by_quadrature(f, covariance, None)[1]
    return (f.gather(1, y[:, None])[:, 0] - normalizer).sum()


def direct_optimum(model, x, y, start, delta):
    """The covariance and the prior precision with the largest bound, by L-BFGS over a Cholesky factor and a logarithm."""
    h = torch.cat([torch.tanh(model[0](x)), torch.ones(len(x), 1)], dim=1).detach()
    f = model(x).detach()
    c = f.shape[1]
    jacobian = torch.einsum("cd,np->ncdp", torch.eye(c), h).flatten(2)
    theta = torch.cat([model[2].weight, model[2].bias[:, None]], dim=1).detach().flatten()
    rows, columns = torch.tril_indices(len(theta), len(theta))

    def bound(values):
        root = torch.zeros(len(theta), len(theta)).index_put((rows, columns), values[:-1])
        covariance, d = root @ root.T, values[-1].exp()
        penalty = d * (covariance.trace() + theta.square().sum()) - len(theta) * (1 + values[-1])
        kl_divergence = 0.5 * (penalty - 2 * root.diagonal().abs().log().sum())
        return expected_log_likelihood(f, jacobian @ covariance @ jacobian.mT, y) - kl_divergence, covariance

    def loss(values):
        v = torch.tensor(values, requires_grad=True)
        value = -bound(v)[0]
        (gradient,) = torch.autograd.grad(value, v)
        return float(value.detach()), gradient.numpy()

    first = torch.cat([torch.linalg.cholesky(start)[rows, columns], torch.tensor([delta]).log()])
    options = {"ftol": 1e-16, "gtol": 1e-8, "maxiter": 5000, "maxfun": 10000, "maxcor": 50}
    found = torch.tensor(minimize(loss, first.numpy(), jac=True, method="L-BFGS-B", options=options).x)
    value, covariance = bound(found)
    return float(value), covariance, float(found[-1].exp())


@pytest.mark.parametrize("classes", [1, 3])
def test_dense_fixed_point_is_the_best_gaussian(classes, monkeypatch):
    """Bound, covariance and prior precision are those found by direct optimization, from somewhere else."""
    monkeypatch.setattr(categorical, "average_softmax", softmax_by_quadrature)
    model, x, y = certain_network(classes)
    likelihood = "binary" if classes == 1 else "classification"
    posterior = kl.KronLaplace(model, likelihood, "exact", layers=["2"])
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    fit = posterior.fit_variational(data, **EXACT)
    assert fit.converged and fit.posterior is posterior
    p = 4 * classes
    value, covariance, delta = direct_optimum(model, x, y, 0.3 * torch.eye(p), 1.0)
    inverse = posterior.covariance()["2"]
    ours = inverse.solve(torch.eye(p).view(p, classes, 4)).flatten(1)
    torch.testing.assert_close(ours, covariance, rtol=0, atol=1e-4 * float(covariance.abs().max()))
    assert fit.history[-1].value == pytest.approx(value, abs=1e-6)
    assert float(posterior.evidence_lower_bound(data).value) == pytest.approx(value, abs=1e-6)
    assert float(posterior.prior_precision) == pytest.approx(delta, rel=1e-4)
    assert fit.history[0].value < value - 1e-3  # the plain fit is not there


# -- the bound -----------------------------------------------------------------------------------------------


def jacobian_last(name):
    """Outputs, Jacobians and the flat weights of the small network's posterior over all layers."""
    f, jacobians = outputs_and_jacobians("mlp", name)
    made = problem("mlp", name)
    parameters = dict(made.model.named_parameters())
    blocks = [torch.cat([parameters[f"{k}.weight"], parameters[f"{k}.bias"][:, None]], 1).flatten() for k in (0, 2)]
    return f, jacobians, torch.cat(blocks).detach()


@pytest.mark.parametrize("estimator", ["kfac", "exact"])
@pytest.mark.parametrize("name", ["binary", "classification", "heteroscedastic"])
def test_bound_of_any_posterior_is_the_dense_one(name, estimator):
    """Expected log-likelihood by many draws of the outputs, divergence by torch's formula."""
    made = problem("mlp", name)
    posterior = kl.KronLaplace(made.model, made.likelihood, estimator, prior_precision=[0.7, 3.0], temperature=0.8)
    bound = posterior.fit(made.data()).evidence_lower_bound(made.data())
    f, jacobians, theta = jacobian_last(name)
    sizes = [6 * 5, len(theta) - 6 * 5]
    prior = torch.cat([torch.full((n,), d) for n, d in zip(sizes, [0.7, 3.0], strict=True)])
    precision = posterior.fisher.to_dense() * posterior.fisher.n_examples / 0.8 + prior.diag()
    q = torch.distributions.MultivariateNormal(theta, precision_matrix=precision)
    divergence = torch.distributions.kl_divergence(
        q, torch.distributions.MultivariateNormal(torch.zeros_like(theta), precision_matrix=prior.diag())
    )
    assert bound.divergence == pytest.approx(float(divergence), rel=1e-8)
    covariance = jacobians @ torch.linalg.inv(precision) @ jacobians.mT
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(f.shape[1]))
    draws = f + torch.einsum("ncd,snd->snc", root, torch.randn(20_000, *f.shape))
    y = made.targets
    if name == "binary":
        values = -F.binary_cross_entropy_with_logits(draws, y.expand(draws.shape), reduction="none").sum((1, 2))
    elif name == "classification":
        values = draws.log_softmax(-1).gather(-1, y.expand(len(draws), -1)[..., None]).sum((1, 2))
    else:
        mean, log_variance = draws.chunk(2, dim=-1)
        values = torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(y).sum((1, 2))
    spread = values.std() * (1 / 20_000 + (name == "classification") / 64) ** 0.5
    assert abs(bound.expected_log_likelihood - values.mean()) < 4 * spread
    assert bound.value == pytest.approx(bound.expected_log_likelihood / 0.8 - bound.divergence)
    gamma = (torch.linalg.inv(precision) @ (precision - prior.diag())).trace()
    assert bound.effective_parameters == pytest.approx(float(gamma), rel=1e-8)


@at_the_edge
@pytest.mark.quick(4)
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
@pytest.mark.parametrize("sampling", ["exact", "mc"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["binary", "classification", "heteroscedastic"])
def test_rounds_do_not_lower_the_bound(name, estimator, sampling, structure):
    made = problem("mlp", name)
    posterior = kl.KronLaplace(made.model, made.likelihood, estimator)
    fit = posterior.fit_variational(made.data(), rounds=6, tolerance=1e-6, sampling=sampling, structure=structure)
    values = [bound.value for bound in fit.history]
    assert all(later > earlier - 1e-6 for earlier, later in itertools.pairwise(values))
    assert posterior.prior_precision.shape == (() if structure == "scalar" else (2,))
    tuned = fit.history[0].prior_precision
    plain = made.posterior(estimator).fit(made.data(), sampling=sampling).tune(structure=structure).prior_precision
    torch.testing.assert_close(tuned, plain, rtol=1e-8, atol=0)


# -- the averaged metric and its directions ------------------------------------------------------------------


def test_average_of_softmax_is_that_of_quadrature():
    f, c = (
        torch.tensor([[2.0, -1.0, 0.5]]).expand(2000, 3),
        torch.tensor([[2.0, 0.3, 0.1], [0.3, 1.0, -0.4], [0.1, -0.4, 3.0]]),
    )
    c = c.expand(2000, 3, 3)
    metric, normalizer = averages.average_softmax(f, c, torch.Generator().manual_seed(0))
    expected_metric, expected = softmax_by_quadrature(f[:1], c[:1], None)
    torch.testing.assert_close(metric.mean(0), expected_metric[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(normalizer.mean(), expected[0], rtol=0, atol=5e-3)
    torch.testing.assert_close(metric.sum(-1), torch.zeros(2000, 3), rtol=0, atol=1e-14)


def test_a_shift_of_all_logits_averages_out():
    """The draws mirror each other, so the average of a linear function is exact, and the softmax does not see the shift."""
    f = torch.randn(5, 3)
    metric, normalizer = averages.average_softmax(f, 4 * torch.ones(5, 3, 3), torch.Generator().manual_seed(0))
    p = f.softmax(-1)
    torch.testing.assert_close(metric, torch.diag_embed(p) - p[:, :, None] * p[:, None], rtol=0, atol=1e-12)
    torch.testing.assert_close(normalizer, f.logsumexp(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, 1.01, 8.0])
def test_averages_of_the_logistic_function_are_integrals(sigma):
    for mean in (-30.0, -2.0, 0.0, 5.0):
        slope, softplus = logistic_curvature(torch.tensor([mean]), torch.tensor([sigma**2]))
        z = torch.linspace(-12, 12, 200_001)
        w = torch.exp(-0.5 * z.square()) / torch.exp(-0.5 * z.square()).sum()
        f = mean + sigma * z
        torch.testing.assert_close(slope[0], (w * f.sigmoid() * (-f).sigmoid()).sum(), rtol=1e-9, atol=1e-17)
        torch.testing.assert_close(softplus[0], (w * F.softplus(f)).sum(), rtol=1e-9, atol=1e-15)


def test_averages_of_heteroscedastic_noise_are_integrals():
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor([[0.7, 0.0], [0.4, 0.5]])
    mean, covariance, y = torch.tensor([[0.3, -0.6]]), (root @ root.T)[None], torch.tensor([[1.1]])
    found = kl.HeteroscedasticGaussian().averages(mean, covariance, y, generator)
    z, w = nodes(40, 2)
    mu, s = (mean + z @ root.T).unbind(1)
    torch.testing.assert_close(found.metric[0, 0], (w * (-s).exp()).sum())
    assert float(found.metric[0, 1]) == 0.5
    log_p = torch.distributions.Normal(mu, (s / 2).exp()).log_prob(y[0, 0])
    torch.testing.assert_close(found.log_likelihood, (w * log_p).sum())


@pytest.mark.parametrize("case", ["classes", "pixels", "tokens", "ignored", "yes-no", "one logit", "noise"])
@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_directions_have_the_averaged_metric_as_second_moment(case, kind):
    """Of all exact directions together, and of signed ones on average, in the layout of the outputs."""
    shapes = {"classes": (4, 3), "ignored": (4, 3), "pixels": (2, 3, 2), "tokens": (2, 2, 3), "yes-no": (4, 2)}
    outputs = torch.randn({**shapes, "one logit": (4,), "noise": (4, 2)}[case])
    axis = {"pixels": 1, "tokens": -1}.get(case)
    likelihood, wanted = kl.Categorical(class_axis=axis), torch.randint(3, (2, 2))
    if case in ("classes", "ignored"):
        wanted = torch.tensor([0, 1, 2, -100 if case == "ignored" else 1])
    if case in ("yes-no", "one logit"):
        likelihood, wanted = kl.Bernoulli(), torch.rand_like(outputs)
    if case == "noise":
        likelihood, wanted = kl.HeteroscedasticGaussian(), torch.randn(4, 1)
    samples = 4000 if kind == "mc" else 1
    mean, covariance = classes_last(outputs, torch.rand(outputs.shape), likelihood.class_axis_of(outputs))
    if not likelihood.outputs_are_independent:
        covariance = torch.diag_embed(covariance)
    averaged = likelihood.averages(mean, covariance, wanted, torch.Generator().manual_seed(0)).metric
    diagonal = averaged.shape == mean.shape
    rule = OfOneBatch(Sampling(kind), samples, 0, metric=(averaged, diagonal))
    directions = list(rule.directions(likelihood, outputs, wanted, 0))
    assert len(directions) == rule.count(likelihood, outputs, wanted)
    assert all(d.shape == outputs.shape for d in directions)
    columns = torch.stack([classes_last(d, d, likelihood.class_axis_of(outputs))[0] for d in directions])
    total = torch.einsum("v...c,v...d->...cd", columns, columns)
    expected = torch.diag_embed(averaged) if diagonal else averaged
    atol = float(expected.max()) * (0.06 if kind == "mc" else 1e-12)
    torch.testing.assert_close(total, expected, rtol=0, atol=atol)
    if case == "ignored":
        assert not any(d[3].any() for d in directions)
    if kind == "exact" and case in shapes and case != "yes-no":
        assert len(directions) == 2 * (2 if axis else 1)  # C - 1 at each position


# -- what can go wrong, and what is kept ---------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", [kl.Gaussian(0.5), kl.Euclidean()])
def test_a_constant_metric_is_refused(likelihood):
    made = problem("mlp", "regression")
    posterior = kl.KronLaplace(made.model, likelihood)
    with pytest.raises(ValueError, match="variational posterior is the plain one"):
        posterior.fit_variational(made.data())
    with pytest.raises(ValueError, match="log_marginal_likelihood"):
        posterior.evidence_lower_bound(made.data())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampling": "empirical"}, ValueError, "empirical"),
        ({"sampling": "all"}, ValueError, "unknown sampling"),
        ({"rounds": 0}, ValueError, "rounds"),
        ({"tolerance": 0.0}, ValueError, "tolerance"),
        ({"structure": "blocks"}, ValueError, "structure"),
        ({"mc_samples": 2, "sampling": "exact"}, ValueError, "mc_samples"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_options_are_checked_first(options, error, message):
    made = problem("mlp")
    with pytest.raises(error, match=message):
        made.posterior().fit_variational(iter(()), **options)


def test_data_must_be_readable_again_and_have_targets():
    made = problem("mlp")
    with pytest.raises(TypeError, match="readable again"):
        made.posterior().fit_variational(iter(made.data()))
    with pytest.raises(ValueError, match="targets"):
        made.posterior().fit_variational([x for x, _ in made.data()][:1])


def test_a_failure_leaves_the_posterior_as_it_was(monkeypatch):
    made = problem("mlp")
    posterior = made.fitted(prior_precision=0.4)
    state = posterior._state

    def fails(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(kl.Categorical, "averages", fails)
    with pytest.raises(KeyboardInterrupt):
        posterior.fit_variational(made.data())
    assert posterior._state is state


def test_the_posterior_is_like_any_other(tmp_path):
    """It predicts, is tuned, keeps its origin in files, and takes no plain data in addition."""
    made = problem("mlp")
    posterior = made.posterior().fit_variational(made.data(), rounds=3, sampling="exact").posterior
    assert "variational" in repr(posterior) and "variational" in repr(posterior.fisher)
    p = posterior.predict(made.inputs)
    torch.testing.assert_close(p.sum(1), torch.ones(len(p)))
    posterior.save(tmp_path / "posterior")
    loaded = kl.KronLaplace.load(tmp_path / "posterior", made.model)
    torch.testing.assert_close(loaded.predict(made.inputs), p, rtol=1e-12, atol=0)
    assert loaded.fisher.metadata.variational
    with pytest.raises(ValueError, match="the curvature is variational in the first and at the trained weights"):
        loaded.fit(made.data(), add=True)
    precision = float(posterior.prior_precision)
    assert float(posterior.tune().prior_precision) == pytest.approx(precision)
    assert not posterior.fit(made.data()).fisher.metadata.variational


def test_the_same_seed_gives_the_same_fit_wherever_the_data_are_cut():
    made = problem("mlp", "binary")
    fits = [made.posterior().fit_variational(made.data(size=n), sampling="exact") for n in (2, 7)]
    for bounds in zip(*(fit.history for fit in fits), strict=True):
        assert bounds[0].value == pytest.approx(bounds[1].value, rel=1e-10)


def test_an_unknown_likelihood_is_refused():
    made = problem("mlp")

    class Own(kl.Categorical):
        averages = kl.Likelihood.averages

    with pytest.raises(NotImplementedError, match=r"Likelihood\.averages"):
        kl.KronLaplace(made.model, Own()).fit_variational(made.data())


@at_the_edge
@pytest.mark.parametrize("network", ["pixels", "one logit"])
@pytest.mark.parametrize("mode", ["inference", "autocast", "shuffled"])
def test_it_works_wherever_a_fit_does(network, mode):
    """Outputs with positions, some ignored, or without an axis; in any mode of torch, and with a loader that shuffles."""
    if network == "pixels":
        model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1))
        x, y = torch.randn(6, 1, 2, 3), torch.randint(3, (6, 2, 3))
        y[0, 0] = -100
    else:
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1), nn.Flatten(0))
        x, y = torch.randn(9, 3), torch.randint(2, (9,)).double()
    posterior = kl.KronLaplace(model.eval(), "classification" if network == "pixels" else "binary")
    data = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=mode == "shuffled")
    with contextlib.ExitStack() as stack:
        if mode == "inference":
            stack.enter_context(torch.inference_mode())
        if mode == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        fit = posterior.fit_variational(data, rounds=8, sampling="exact", tolerance=1e-4)
        assert fit.converged
        bound = posterior.evidence_lower_bound(data)
    # A loader that shuffles gives other draws to the examples when it is read again.
    tolerance = 0.5 if (network, mode) == ("pixels", "shuffled") else 1e-8
    assert bound.value == pytest.approx(fit.history[-1].value, abs=tolerance)


def test_a_round_that_is_taken_back_leaves_the_posterior_before_it(monkeypatch):
    """The bound falls after the second round: the last posterior is that of the first."""
    made = problem("mlp")
    values = iter([-3.0, -2.0, -5.0])
    true_bound = variational._bound
    monkeypatch.setattr(variational, "_bound", lambda *args: replace(true_bound(*args), value=next(values)))
    fit = made.posterior().fit_variational(made.data(), rounds=3, sampling="exact")
    assert [bound.value for bound in fit.history] == [-3.0, -2.0]
    assert not fit.converged
    once = made.posterior()
    monkeypatch.setattr(variational, "_bound", true_bound)
    once.fit_variational(made.data(), rounds=1, sampling="exact")
    torch.testing.assert_close(fit.posterior.fisher.to_dense(), once.fisher.to_dense(), rtol=1e-12, atol=0)
    assert float(fit.posterior.prior_precision) == pytest.approx(float(once.prior_precision))
