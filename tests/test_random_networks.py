"""Networks drawn at random against dense algebra: blocks, evidence, covariances of outputs, and derivatives of these."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import kronlaplace as kl
from tests.support import oracles
from tests.support.assertions import assert_blocks_are
from tests.support.estimators import CONVERGED_FULL, KRONECKER
from tests.support.random_networks import Drawing, draw

QUICK, ALL = 25, 1000
NOISE = 0.7


def estimator_of(drawing):
    """An estimator, and the rule that its blocks obey."""
    name = drawing.of("kfac", "kfac-reduce", "tkfac", "tkfac-uncorrelated", "kfoc-full", "ekfac", "diagonal", "exact")
    if name == "ekfac":
        _, rule = KRONECKER["kfac"]
        return kl.EKFAC(), lambda d: torch.block_diag(*(oracles.ekfac(g, *rule(g)[1:]) for g in d.groups)), 1e-8
    if name == "diagonal":
        return kl.Diagonal(), lambda d: oracles.diagonal(d.X), 1e-10
    if name == "exact":
        return kl.ExactBlock(), lambda d: oracles.exact_block(d.X), 1e-10
    if name == "kfoc-full":
        return kl.KFOC(aggregation="full", **CONVERGED_FULL), None, 0.0  # two best ones may be equally good
    make, rule = KRONECKER[name]
    return make(), lambda d: oracles.block_dense(rule, d), 1e-9


def has_close_eigenvalues(data):
    """Whether a factor's eigenbasis, which EKFAC uses, is not unique, but for directions that nothing has a part in."""
    factors = [f for d in data.values() for g in d.groups for f in oracles.kfac_expand(g)[1:]]
    values = [torch.linalg.eigvalsh(factor) for factor in factors if len(factor) > 1]
    return any(bool(((v.diff() < 1e-5 * v[-1]) & (v[1:] > 1e-12 * v[-1])).any()) for v in values)


def jacobians(model, inputs, names, create_graph=False):
    """``(N, M, P)``, one example at a time."""
    blocks = oracles.blocks(model)
    rows = []
    for n in range(oracles.n_examples(inputs)):
        x = oracles.example(inputs, n)
        with oracles.norms_written_out(model):
            outputs = model(x)[0].reshape(-1)
        parameters = [[model.get_parameter(p) for p in blocks[name].parameters] for name in names]
        flat = [p for group in parameters for p in group]
        of_example = []
        for output in outputs:
            grads = iter(
                torch.autograd.grad(output, flat, retain_graph=True, create_graph=create_graph, materialize_grads=True)
            )
            of_example.append(
                torch.cat(
                    [
                        torch.cat([next(grads).reshape(blocks[name].q, -1) for _ in group], dim=1).flatten()
                        for name, group in zip(names, parameters, strict=True)
                    ]
                )
            )
        rows.append(torch.stack(of_example))
    return torch.stack(rows)


def assert_close(found, expected, rtol=1e-8):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * max(float(expected.detach().abs().max()), 1e-6))


def check(seed):
    made, drawing = draw(seed), Drawing(seed + 10**6)
    model, x, y = made.model, made.inputs, made.targets
    n = len(y)
    estimator, rule, tolerance = estimator_of(drawing)
    likelihood = kl.Gaussian(NOISE) if made.likelihood == "regression" else made.likelihood
    prior_precision, temperature = drawing.of(0.3, 1.0, 20.0), drawing.of(1.0, 0.7)
    posterior = kl.KronLaplace(
        model, likelihood, estimator, prior_precision=prior_precision, temperature=temperature, unsupported="fixed"
    ).fit(made.batches(drawing.of(1, 2, n)))
    data = oracles.gradients(model, x, made.likelihood, noise_std=NOISE)
    data = {name: d for name, d in data.items() if name in posterior.fisher}
    assert len(data) == len(posterior.fisher) > 0
    if isinstance(estimator, kl.ExactBlock):
        for name, d in data.items():
            assert_close(posterior.fisher[name].to_dense(), oracles.exact_block(d.X))
    elif rule is not None and not (isinstance(estimator, kl.EKFAC) and has_close_eigenvalues(data)):
        assert_blocks_are(posterior.fisher, data, rule, tolerance)

    names = list(posterior.fisher)
    J = jacobians(model, x, names)
    H = torch.block_diag(*(block.to_dense() for block in posterior.fisher.values())) * n / temperature
    H += prior_precision * torch.eye(len(H)).double()
    S = torch.linalg.inv(H)
    theta = torch.cat([layer.matrix().flatten() for layer in kl.layers.find_layers(model, names)])
    evidence = (
        oracles.log_likelihood(model, x, y, made.likelihood, NOISE) / temperature
        - prior_precision / 2 * theta.square().sum()
        - torch.logdet(H / prior_precision) / 2
    )
    if rule is not None:
        assert_close(posterior.log_marginal_likelihood(), evidence.detach())

    expected = torch.einsum("ncp,pq,mdq->ncmd", J, S, J)
    own = torch.stack([expected[i, :, i] for i in range(n)])
    some = slice(0, drawing.of(1, n))
    assert_close(posterior.functional_variance(x[some]), own[some])
    assert_close(posterior.functional_variance(x, diagonal=True).reshape(n, -1), own.diagonal(dim1=1, dim2=2))
    assert_close(posterior.functional_variance(x, joint=True), expected.reshape(own.shape[1] * n, -1))
    if x.is_floating_point():
        check_derivatives(posterior, model, x[some].clone(), names, S)


def check_derivatives(posterior, model, x, names, S):
    """Derivatives of the variances by the inputs."""
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = posterior.functional_variance(ours, diagonal=True, differentiable=True).flatten()
    with sdpa_kernel(SDPBackend.MATH):
        J = jacobians(model, theirs, names, create_graph=True)
        expected = torch.einsum("ncp,pq,ncq->nc", J, S, J).flatten()
        assert_close(found, expected)
        weights = torch.linspace(0.5, 1.5, len(found)).double()
        (right,) = torch.autograd.grad(expected @ weights, theirs, allow_unused=True, materialize_grads=True)
        (gradient,) = torch.autograd.grad(found @ weights, ours, allow_unused=True, materialize_grads=True)
    assert_close(gradient, right, 1e-7)


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", range(QUICK))
def test_random_networks(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(QUICK, ALL))
def test_many_random_networks(seed):
    check(seed)
