"""Kronecker priors against dense algebra in float64: the precision is ``c F + μ (s F₁ + δ I)``, Jacobians are autograd's."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from scipy.optimize import minimize
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks import DenseBlock, DiagonalBlock, KroneckerBlock
from kronlaplace.damping.kronecker_sum import joint_basis

ESTIMATORS = ["kfac", "tkfac", "ekfac", "diagonal", "exact"]
TEMPERATURE = 0.7
NOISE = 0.5
N = 40


class Images(nn.Module):
    """A grouped and a depthwise convolution, a normalization and a linear layer."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(2, 4, 2, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 2, groups=4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.depthwise(torch.tanh(self.grouped(x))))
        return self.head(self.norm(x.mean((2, 3))))


def network(kind, seed=0):
    torch.manual_seed(seed)
    if kind == "images":
        return Images().double().eval(), torch.randn(N, 2, 4, 4).double()
    if kind == "shared":  # the layers are used at three positions of every example
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten())
        return model.double().eval(), torch.randn(N, 3, 3).double()
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval(), torch.randn(N, 3).double()


@dataclasses.dataclass
class Problem:
    """A network at two sets of weights with data of two tasks; the second is what the posterior is of."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    earlier: kl.KroneckerFisher

    def data(self):
        return [(self.x, self.y)]

    def posterior(self, estimator, prior, **options):
        options = {"temperature": TEMPERATURE, **options}
        return kl.KronLaplace(self.model, kl.Gaussian(NOISE), estimator, prior_precision=prior, **options).fit(
            self.data()
        )

    def mean(self):
        generator = torch.Generator().manual_seed(5)
        return {n: torch.randn(p.shape, generator=generator).double() for n, p in self.model.named_parameters()}

    def flat(self, values):
        """Values of the parameters as the row-major matrices ``[W b]`` of all layers joined, (..., P)."""
        parts = []
        for name, module in self.model.named_modules():
            if not module._parameters:
                continue
            prefix = f"{name}." if name else ""
            shape, q = module.weight.shape, len(module.weight)
            weight, bias = values[f"{prefix}weight"], values[f"{prefix}bias"]
            lead = weight.shape[: weight.ndim - len(shape)]
            parts.append(torch.cat([weight.reshape(*lead, q, -1), bias.reshape(*lead, q, 1)], -1).flatten(-2))
        return torch.cat(parts, -1)

    def weights(self):
        return self.flat(dict(self.model.named_parameters())).detach()

    def jacobians(self):
        def f(parameters, x):
            return torch.func.functional_call(self.model, parameters, (x[None],)).flatten()

        parameters = {n: p.detach() for n, p in self.model.named_parameters()}
        return self.flat(torch.func.vmap(torch.func.jacrev(f), in_dims=(None, 0))(parameters, self.x))


def problem(kind, estimator="kfac", seed=0):
    model, x = network(kind, seed)
    before = copy.deepcopy(model)
    with torch.no_grad():
        for p in before.parameters():
            p.add_(0.3 * torch.randn_like(p))
    outputs = model(x).detach()
    shifted = 1.5 * x.roll(1, 1) + 0.2 * torch.randn_like(x)
    earlier = kl.estimate_fisher(before, [shifted], kl.Gaussian(0.8), estimator, sampling="exact")
    return Problem(model, x, outputs + 0.5 * torch.randn_like(outputs), earlier)


def dense_prior(made, scale=None, plus=0.0, factor=1.0):
    dense = made.earlier.to_dense()
    return factor * ((N if scale is None else scale) * dense + plus * torch.eye(len(dense), dtype=dense.dtype))


def dense_posterior(posterior, prior):
    return posterior.fisher.to_dense() * N / TEMPERATURE + prior


def dense_evidence(made, posterior, prior, mean, noise=NOISE):
    deviation = made.weights() - mean
    normal = torch.distributions.Normal(made.model(made.x).detach(), noise)
    fisher = posterior.fisher.to_dense() * N / TEMPERATURE * (NOISE / noise) ** 2
    return (
        normal.log_prob(made.y).sum() / TEMPERATURE
        - 0.5 * deviation @ prior @ deviation
        - 0.5 * (torch.logdet(fisher + prior) - torch.logdet(prior))
    )


def close(actual, expected, rtol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


# -- evidence, predictive and samples are those of the dense computation -------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize("plus", [0.0, 0.4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["mlp", "shared", "images"])
def test_everything_equals_dense(kind, estimator, plus):
    made = problem(kind, estimator)
    if plus == 0.0:
        made.earlier = regular(made.earlier)
    mean = made.mean()
    posterior = made.posterior(estimator, kl.KroneckerPrior(made.earlier, mean=mean, plus=plus, factor=0.6))
    P = dense_prior(made, plus=plus, factor=0.6)
    H = dense_posterior(posterior, P)
    J = made.jacobians()
    close(posterior.log_marginal_likelihood(), dense_evidence(made, posterior, P, made.flat(mean)))
    expected = J @ torch.linalg.inv(H) @ J.mT
    close(posterior.functional_variance(made.x), expected)
    close(posterior.functional_variance(made.x, diagonal=True), expected.diagonal(dim1=1, dim2=2).reshape(N, -1))
    flat = J[:5].flatten(0, 1)
    close(posterior.functional_variance(made.x[:5], joint=True), flat @ torch.linalg.inv(H) @ flat.T)
    prediction = posterior.predict(made.x)
    close(prediction.variance.flatten(1), expected.diagonal(dim1=1, dim2=2))
    check_inverses(posterior, H)
    prior = posterior.prior
    close(prior.logdet(), torch.logdet(P))
    deviation = made.weights() - made.flat(mean)
    close(prior.penalty(posterior_weights(posterior)), deviation @ P @ deviation)
    assert torch.stack([prior.least(name) for name in posterior.layers]).min() == pytest.approx(
        float(torch.linalg.eigvalsh(P)[0]), rel=1e-6, abs=1e-12
    )


def regular(fisher):
    """The same with blocks that are positive definite, so that no multiple of the identity is needed."""
    blocks = {}
    for name, block in fisher.items():
        if isinstance(block, KroneckerBlock):
            factors = block.gradient_factor, block.activation_factor
            eyes = [0.1 * f.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(f.shape[-1]).double() for f in factors]
            blocks[name] = KroneckerBlock(*(f + e for f, e in zip(factors, eyes, strict=True)), block.scale, name)
        elif isinstance(block, DenseBlock):
            eye = torch.eye(len(block.matrix)).double()
            blocks[name] = DenseBlock(block.matrix + 0.1 * block.trace() / len(eye) * eye, block.shape, name=name)
        else:
            block = copy.copy(block)
            block.values = block.values + 0.1 * block.values.mean()
            blocks[name] = block
    return kl.KroneckerFisher(blocks, fisher.n_examples, fisher.metadata)


def posterior_weights(posterior):
    return {name: mean.requires_grad_() for name, mean in posterior.as_prior().means.items()}


def check_inverses(posterior, H):
    start = 0
    for name, inverse in posterior.covariance().items():
        q, p = inverse.block.shape
        part = H[start : start + q * p, start : start + q * p]
        start += q * p
        expected = torch.linalg.inv(part)
        eye = torch.eye(q * p).double().view(-1, q, p)
        close(inverse.solve(eye).flatten(1), expected)
        root = inverse.sqrt_solve(eye).flatten(1).T
        close(root @ root.T, expected)
        close(inverse.diagonal().flatten(), expected.diagonal())
        close(inverse.logdet(), torch.logdet(part))
        assert name in repr(inverse)
        with pytest.raises(ValueError, match=rf"must have shape \(..., {q}, {p}\)"):
            inverse.solve(torch.zeros(q + 1, p).double())


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.tuples(
        st.sampled_from(["kfac", "exact", "ekfac", "diagonal"]), st.sampled_from(["kfac", "exact", "ekfac"])
    ),
    plus=st.floats(0.01, 10),
    factor=st.floats(0.1, 10),
    seed=st.integers(0, 1000),
)
def test_blocks_of_any_kinds_equal_dense(kinds, plus, factor, seed):
    """The two Fishers may be of different estimators where layers are small."""
    made = problem("mlp", kinds[0], seed)
    posterior = made.posterior(kinds[1], kl.KroneckerPrior(made.earlier, mean=0.0, plus=plus, factor=factor))
    P = dense_prior(made, plus=plus, factor=factor)
    expected = dense_evidence(made, posterior, P, 0.0)
    torch.testing.assert_close(posterior.log_marginal_likelihood(), expected, rtol=1e-9, atol=1e-9)
    check_inverses(posterior, dense_posterior(posterior, P))


def test_samples_have_the_covariance():
    """4,000 draws: every entry within six standard errors ``√((Σ_ii Σ_jj + Σ_ij²) / n)``."""
    made = problem("mlp")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.4))
    expected = torch.linalg.inv(dense_posterior(posterior, dense_prior(made, plus=0.4)))
    n = 4000
    deviations = made.flat(posterior.sample(n)) - made.weights()
    error = (deviations.T @ deviations / n - expected).abs()
    variances = expected.diagonal()
    assert (error < 6 * ((variances[:, None] * variances + expected.square()) / n).sqrt()).all()


# -- large layers --------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_dense(monkeypatch):
    monkeypatch.setattr("kronlaplace.damping.kronecker_sum.LARGEST_DENSE", 0)


def random_psd(n, generator, rank=None):
    root = torch.randn(n, rank or 2 * n, generator=generator).double()
    return root @ root.T / n


def two_products(q, p, groups=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for scale in (0.7, 1.9):
        if groups is None:
            factors = random_psd(q, generator), random_psd(p, generator)
        else:
            factors = (torch.stack([random_psd(n, generator) for _ in range(groups)]) for n in (q // groups, p))
        blocks.append(KroneckerBlock(*factors, scale))
    return blocks


@pytest.mark.parametrize(
    ("q", "p", "groups", "plus"),
    [(3, 4, None, 0.0), (6, 4, 2, 0.0), (4, 3, 4, 0.5), (1, 5, None, 0.5), (5, 1, None, 0.5), (6, 1, 2, 0.5)],
)
def test_products_are_exact_at_any_size(q, p, groups, plus, nothing_is_dense):
    block, earlier = two_products(q, p, groups)
    joint = joint_basis(block, earlier, torch.tensor(1.3, dtype=torch.float64), torch.tensor(plus, dtype=torch.float64))
    assert joint.exact
    assert joint.basis.factors() is not None
    dense = 2.5 * block.to_dense() + 0.8 * (1.3 * earlier.to_dense() + plus * torch.eye(q * p).double())
    inverse = joint.inverse(block, 2.5, 0.8)
    eye = torch.eye(q * p).double().view(-1, q, p)
    close(inverse.solve(eye).flatten(1), torch.linalg.inv(dense))
    close(inverse.logdet(), torch.logdet(dense))


@pytest.mark.parametrize("groups", [None, 2])
def test_three_terms_of_large_layers(groups, nothing_is_dense):
    """The basis is that of the factored damping, by SciPy's generalized eigenproblem; the rest is dropped."""
    q, p = 4, 3
    block, earlier = two_products(q, p, groups)
    s, plus = 1.3, 0.5
    joint = joint_basis(block, earlier, torch.tensor(s, dtype=torch.float64), torch.tensor(plus, dtype=torch.float64))
    assert not joint.exact
    parts = []
    for g, a, g1, a1 in zip(
        *(f if groups else f[None] for b in (block, earlier) for f in (b.gradient_factor, b.activation_factor)),
        strict=True,
    ):
        g1 = g1 * s * float(earlier.scale)
        pi = math.sqrt((a1.trace() / len(a1)) / (g1.trace() / len(g1)))
        damped = g1 + math.sqrt(plus) / pi * torch.eye(len(g1)), a1 + math.sqrt(plus) * pi * torch.eye(p)
        W = torch.kron(*(torch.from_numpy(eigh(m, d)[1]) for m, d in zip((g, a), damped, strict=True)))
        H = 2.5 * float(block.scale) * torch.kron(g, a) + 0.8 * (torch.kron(g1, a1) + plus * torch.eye(len(W)))
        parts.append(W @ torch.diag(1 / (W.T @ H @ W).diagonal()) @ W.T)
    expected = torch.block_diag(*parts)
    inverse = joint.inverse(block, 2.5, 0.8)
    close(inverse.solve(torch.eye(q * p).double().view(-1, q, p)).flatten(1), expected, 1e-7)
    close(inverse.diagonal().flatten(), expected.diagonal(), 1e-7)
    close(inverse.logdet(), -torch.logdet(expected))
    dense = 2.5 * block.to_dense() + 0.8 * (s * earlier.to_dense() + plus * torch.eye(q * p).double())
    assert inverse.logdet() >= torch.logdet(dense)  # Hadamard


@pytest.mark.parametrize("vanishing", [0, 1])
def test_three_terms_are_exact_where_one_fisher_vanishes(vanishing, nothing_is_dense):
    blocks = two_products(4, 3)
    blocks[vanishing] = blocks[vanishing].scaled(0.0)
    joint = joint_basis(*blocks, torch.tensor(1.3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64))
    dense = 2.5 * blocks[0].to_dense() + 1.3 * blocks[1].to_dense() + 0.5 * torch.eye(12).double()
    inverse = joint.inverse(blocks[0], 2.5, 1.0)
    close(inverse.solve(torch.eye(12).double().view(-1, 4, 3)).flatten(1), torch.linalg.inv(dense))


def test_large_layers_are_warned_of_and_usable(nothing_is_dense):
    made = problem("mlp")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=0.0, plus=1e-3))
    with pytest.warns(
        UserWarning, match=r"multiple of the identity is added to the two Kronecker products of '0' \(16"
    ):
        variance = posterior.functional_variance(made.x, diagonal=True)
    H = dense_posterior(posterior, dense_prior(made, plus=1e-3))
    J = made.jacobians()
    expected = (J @ torch.linalg.inv(H) @ J.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(variance, expected, rtol=0.05, atol=0)


def test_the_same_eigenbasis_is_exact_at_any_size(nothing_is_dense):
    """As with the same Fisher twice, for all kinds of blocks that are no dense matrices."""
    for estimator in ("kfac", "ekfac", "diagonal"):
        made = problem("mlp", estimator)
        posterior = made.posterior(estimator, kl.IsotropicPrior(0.5))
        made.earlier = posterior.fisher
        posterior.prior = kl.KroneckerPrior(posterior.fisher, mean=0.0, plus=0.4)
        check_inverses(posterior, dense_posterior(posterior, dense_prior(made, plus=0.4)))


def test_large_layers_of_different_kinds_are_refused(nothing_is_dense):
    made = problem("mlp", "ekfac")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.4))
    with pytest.raises(
        NotImplementedError, match=r"layer '0' has a kronecker block and its prior a eigen block.*Use an"
    ):
        posterior.covariance()


# -- continual learning --------------------------------------------------------------------------------------


def linear_task(seed, n=30):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator).double() @ random_psd(3, generator)
    return x, torch.randn(n, 2, generator=generator).double() + x[:, :2]


def set_weights(model, matrix):
    with torch.no_grad():
        model.weight.copy_(matrix[:, :-1])
        model.bias.copy_(matrix[:, -1])


def trained(model, tasks, prior=None, delta=0.5):
    """Put the model at the mode: of the prior ``N(0, 1/δ)``, or of the one that is given, and the tasks' data."""
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    a = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    parameters = torch.zeros(2, 4).double().requires_grad_()

    def loss(w):
        penalty = delta * w.square().sum() if prior is None else prior.penalty({"": w})
        return (a @ w.T - y).square().sum() / (2 * NOISE**2) + 0.5 * penalty

    gradient = torch.autograd.grad(loss(parameters), parameters)[0].flatten()
    hessian = torch.autograd.functional.hessian(loss, parameters).view(8, 8)  # the loss is quadratic: one Newton step
    set_weights(model, (parameters.flatten() - torch.linalg.solve(hessian, gradient)).detach().view(2, 4))


@pytest.mark.parametrize("estimator", ["kfac", "exact", "tkfac", "ekfac"])
@pytest.mark.parametrize("tasks", [2, 3])
def test_tasks_one_by_one_are_all_tasks_together(estimator, tasks):
    """On a linear-Gaussian model: mean, covariance, predictions, and the evidence by the chain rule."""
    model = nn.Linear(3, 2).double()
    data = [linear_task(seed) for seed in range(tasks)]
    prior, evidence = kl.IsotropicPrior(0.5), 0.0
    for task in data:
        trained(model, [task], prior if isinstance(prior, kl.KroneckerPrior) else None)
        posterior = kl.KronLaplace(model, kl.Gaussian(NOISE), estimator, prior_precision=prior).fit([task])
        evidence += posterior.log_marginal_likelihood()
        prior = posterior.as_prior()
    chained = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randn(7, 3).double()
    variance = posterior.functional_variance(x)
    trained(model, data)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chained[name], parameter.detach(), rtol=1e-6, atol=1e-8)
    joint = kl.KronLaplace(model, kl.Gaussian(NOISE), estimator, prior_precision=0.5)
    joint.fit([tuple(torch.cat(parts) for parts in zip(*data, strict=True))])
    torch.testing.assert_close(joint.functional_variance(x), variance, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(joint.log_marginal_likelihood(), evidence, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["isotropic", "layerwise", "diagonal", "kronecker"])
def test_a_posterior_as_prior_has_its_precision_and_mean(kind, estimator):
    made = problem("images", estimator)
    priors = {
        "isotropic": 0.3,
        "layerwise": [0.1, 0.2, 0.3, 0.4],
        "diagonal": torch.linspace(0.1, 2, len(made.weights())).double(),
        "kronecker": kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.2, factor=[0.5, 1.0, 2.0, 3.0]),
    }
    posterior = made.posterior(estimator, priors[kind])
    prior = posterior.as_prior()
    torch.testing.assert_close(torch.cat([m.flatten() for m in prior.means.values()]), made.weights())
    direction = {name: torch.randn_like(mean) for name, mean in prior.means.items()}
    inverses = posterior.covariance()
    for name, step in direction.items():
        image = inverses[name].solve(step)
        torch.testing.assert_close(
            prior.penalty({name: prior.means[name] + image}), (step * image).sum(), rtol=1e-8, atol=0
        )


def test_large_posteriors_become_the_nearest_product(monkeypatch):
    """After two tasks a large layer has a sum of two Kronecker products: the best single one, with a warning."""
    monkeypatch.setattr("kronlaplace.laplace.posterior_as_prior.LARGEST_DENSE", 0)
    made = problem("mlp")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.2))
    with pytest.warns(UserWarning, match="contains a sum of two Kronecker products"):
        prior = posterior.as_prior()
    for name, block in prior.fisher.items():
        total = posterior.fisher[name].to_dense() * N / TEMPERATURE + N * made.earlier[name].to_dense()
        q, p = block.shape
        rearranged = total.view(q, p, q, p).permute(0, 2, 1, 3).reshape(q * q, p * p)
        best = torch.linalg.svdvals(rearranged)[1:].norm()
        torch.testing.assert_close((total - block.to_dense()).norm(), best, rtol=1e-6, atol=1e-7 * float(total.norm()))
        torch.testing.assert_close(prior.plus[name], torch.tensor(0.2, dtype=torch.float64))
    posterior = made.posterior("exact", kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.2))
    with pytest.raises(NotImplementedError, match="sum of a dense and a kronecker block"):
        posterior.as_prior()


# -- tuning --------------------------------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize("noise", ["tuned", "fixed"])
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_the_evidence_tunes_a_factor_of_the_prior(structure, noise):
    made = problem("mlp")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.4))
    posterior.tune(structure=structure, noise=noise)
    sizes = [16, 10]
    unit = dense_prior(made, plus=0.4)

    def loss(logs):
        factors = [math.exp(logs[0])] * 2 if structure == "scalar" else [math.exp(v) for v in logs[:2]]
        root = torch.cat([torch.full((n,), f, dtype=torch.float64) for n, f in zip(sizes, factors, strict=True)]).sqrt()
        return -float(dense_evidence(made, posterior, root[:, None] * unit * root, 0.0, math.exp(logs[-1])))

    n = 1 if structure == "scalar" else 2
    bounds = [(-20, 20)] * n + [(math.log(NOISE),) * 2 if noise == "fixed" else (-5, 5)]
    best = minimize(loss, [0.0] * n + [math.log(NOISE)], bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-14})
    expected = torch.tensor(best.x).exp()
    prior = posterior.prior
    assert isinstance(prior, kl.KroneckerPrior)
    torch.testing.assert_close(
        prior.multiples, expected[0] if structure == "scalar" else expected[:2], rtol=1e-3, atol=0
    )
    torch.testing.assert_close(torch.tensor(posterior.likelihood.noise_std).double(), expected[-1], rtol=1e-3, atol=0)
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(-best.fun, abs=1e-5)


def test_no_precision_of_single_weights_is_tuned():
    made = problem("mlp")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.4))
    for method in ("evidence", "validation"):
        data = None if method == "evidence" else made.data()
        with pytest.raises(ValueError, match=r'structure="diagonal".*Use "scalar" or "layerwise"'):
            posterior.tune(method, "diagonal", data)


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_validation_tries_factors_of_the_prior(structure):
    made = problem("mlp")
    prior = kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.4)
    posterior = made.posterior("kfac", prior)
    base = torch.ones(())
    if structure == "layerwise":
        base = made.posterior("kfac", prior).tune(structure=structure, noise="fixed").prior.multiples
    grid = [0.01, 0.1, 1.0, 10.0, 100.0]
    x, y = made.x[::2] + 0.3, made.y[::2]
    losses = {}
    for value in grid:
        with_factor = made.posterior("kfac", dataclasses.replace(prior, factor=base * value))
        losses[value] = float(kl.Gaussian(NOISE).predictive_nll(with_factor.predict(x), y)[0])
    best = min(grid, key=losses.get)
    before = posterior.prior
    posterior.tune("validation", structure, [(x, y)], noise="fixed", grid=grid)
    torch.testing.assert_close(posterior.prior.multiples, (base * best).double())
    assert float(before.multiples) == 1.0


def test_the_default_grid_has_factors():
    made = problem("mlp")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.4))
    data = [(made.x, made.model(made.x).detach())]  # without errors, so that the least variance is best
    with pytest.warns(UserWarning, match=r"for the factor of the prior precisions 1e\+04 of 0.0001 to 1e\+04"):
        posterior.tune("validation", data=data, noise="fixed")


def test_a_prior_is_for_every_fit():
    """What it shares with a Fisher is found anew for the next Fisher."""
    made = problem("mlp")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.4))
    posterior.covariance()
    made.x = made.x.flip(1)
    posterior.fit(made.data())
    check_inverses(posterior, dense_posterior(posterior, dense_prior(made, plus=0.4)))


# -- files, devices, layers ----------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("factor", [0.6, [0.5, 1.0, 2.0, 3.0]])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_files_keep_the_prior(estimator, factor, tmp_path):
    made = problem("images", estimator)
    posterior = made.posterior(estimator, kl.KroneckerPrior(made.earlier, mean=made.mean(), plus=0.4, factor=factor))
    posterior.save(tmp_path / "p")
    loaded = kl.KronLaplace.load(tmp_path / "p", made.model)
    assert isinstance(loaded.prior, kl.KroneckerPrior)
    assert torch.equal(loaded.prior.multiples, posterior.prior.multiples)
    close(loaded.log_marginal_likelihood(), posterior.log_marginal_likelihood())
    close(loaded.functional_variance(made.x), posterior.functional_variance(made.x))
    assert repr(loaded) == repr(posterior)


def test_another_dtype_and_back():
    made = problem("images")
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=made.mean(), plus=0.4, factor=0.6))
    before = posterior.functional_variance(made.x), posterior.log_marginal_likelihood()
    posterior.to(torch.float32)
    assert {block.dtype for block in posterior.prior.fisher.values()} == {torch.float32}
    assert posterior.functional_variance(made.x.float()).dtype == torch.float32
    torch.testing.assert_close(posterior.log_marginal_likelihood(), before[1], rtol=1e-4, atol=0)
    posterior.to(torch.float64)
    torch.testing.assert_close(posterior.functional_variance(made.x), before[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layers", ["last", ["2"]])
def test_some_of_the_layers(layers):
    made = problem("mlp")
    prior = kl.KroneckerPrior(made.earlier, mean=made.mean(), plus=0.4)
    posterior = made.posterior("kfac", prior, layers=layers)
    P = dense_prior(made, plus=0.4)[16:, 16:]
    check_inverses(posterior, dense_posterior(posterior, P))
    assert posterior.layers == list(posterior.prior.fisher) == ["2"]
    posterior.prior_mean = 0.7
    assert isinstance(posterior.prior, kl.KroneckerPrior)
    assert (posterior.prior_mean["2"] == 0.7).all()


def test_a_number_after_a_kronecker_prior():
    """Setting a precision keeps the mean; evidences of other priors leave the posterior's as it is."""
    made = problem("mlp")
    mean = made.mean()
    posterior = made.posterior("kfac", kl.KroneckerPrior(made.earlier, mean=mean, plus=0.4))
    with pytest.raises(TypeError, match=r"posterior\.prior"):
        _ = posterior.prior_precision
    value = posterior.log_marginal_likelihood(2.0)
    assert isinstance(posterior.prior, kl.KroneckerPrior)
    posterior.prior_precision = 2.0
    assert posterior.prior_precision == 2.0
    assert torch.equal(posterior.log_marginal_likelihood(), value)
    close(value, dense_evidence(made, posterior, 2.0 * torch.eye(26).double(), made.flat(mean)))


def test_a_view_leaves_the_posterior_as_it_is():
    made = problem("mlp")
    posterior = made.posterior("kfac", 2.0)
    before = posterior.functional_variance(made.x)
    prior = kl.KroneckerPrior(made.earlier, mean=0.0, plus=0.4)
    view = posterior.with_hyperparameters(dataclasses.replace(posterior.hyperparameters, prior=prior, noise_std=3.0))
    assert view.likelihood == kl.Gaussian(3.0)
    assert not torch.equal(view.functional_variance(made.x), before)
    assert posterior.likelihood == kl.Gaussian(NOISE)
    assert posterior.prior_precision == 2.0
    assert torch.equal(posterior.functional_variance(made.x), before)
    with pytest.raises(TypeError, match=r"must be a kl\.Hyperparameters"):
        posterior.hyperparameters = 3.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plus": -1.0}, ValueError, "plus of the prior must be a finite number, not negative; got -1.0"),
        ({"scale": 0.0}, ValueError, "scale of the prior must be positive and finite; got 0.0"),
        ({"factor": [1.0, 2.0, 3.0]}, ValueError, "factor of the prior must be one number or 2"),
        ({"factor": math.nan}, ValueError, "factor of the prior must be positive and finite"),
        ({"plus": "much"}, TypeError, "plus of the prior must be a number"),
        ({"plus": {"0": 1.0}}, ValueError, "plus of the prior has no entry for the layer '2'"),
        ({"mean": {"0.weight": torch.zeros(4, 3)}}, ValueError, "no entry for the parameter '0.bias'"),
    ],
)
def test_bad_numbers_are_refused(options, error, message):
    made = problem("mlp")
    with pytest.raises(error, match=message):
        made.posterior("kfac", kl.KroneckerPrior(made.earlier, **{"mean": 0.0, "plus": 0.4, **options}))


def test_bad_fishers_are_refused():
    made = problem("mlp")
    with pytest.raises(TypeError, match="KroneckerPrior takes a Fisher"):
        kl.KroneckerPrior(1.0, mean=0.0)
    with pytest.raises(ValueError, match=r"no blocks for the layers \['0'\]"):
        made.posterior("kfac", kl.KroneckerPrior(made.earlier.restricted_to(["2"]), mean=0.0, plus=1.0))
    with pytest.raises(ValueError, match="the Fisher is of another network"):
        blocks = {"0": made.earlier["0"], "2": DiagonalBlock(torch.ones(3, 3).double(), "2")}
        other = kl.KroneckerFisher(blocks, 1, made.earlier.metadata)
        made.posterior("kfac", kl.KroneckerPrior(other, mean=0.0, plus=1.0))
    with pytest.raises(ValueError, match="prior of layer '0' is improper: its Fisher block is singular and plus is 0"):
        blocks = {
            "0": KroneckerBlock(torch.eye(4).double(), torch.zeros(4, 4).double(), name="0"),
            "2": made.earlier["2"],
        }
        other = kl.KroneckerFisher(blocks, 1, made.earlier.metadata)
        made.posterior("kfac", kl.KroneckerPrior(other, mean=0.0))
    with pytest.raises(TypeError, match="a prior object has a mean of its own"):
        made.posterior("kfac", kl.IsotropicPrior(1.0), prior_mean=1.0)
