"""Damped inverses against dense algebra: every strategy on every kind of block, dampings of single weights, refusals."""

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks import DenseBlock, DiagonalBlock, EigenBlock, KroneckerBlock, block_from_tensors
from kronlaplace.damping import FactoredTikhonov, Tikhonov, TraceRestricted, TraceRestrictedAuto
from kronlaplace.inversion import PlusDiagonal
from tests.support.cases import case
from tests.support.networks import cnn

STRATEGIES = [Tikhonov, FactoredTikhonov, TraceRestricted, TraceRestrictedAuto]
BY_NUMBER = STRATEGIES[:3]
KINDS = ["number", "tensor", "by-group", "eigen", "diagonal", "dense"]  # the first three are Kronecker blocks
ROTATED = KINDS[:4]

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 4)
groups = st.integers(1, 3)
ranks = st.sampled_from([0, 1, 4])
dampings = st.floats(1e-4, 10)


def psd(generator, *shape, rank=4, smallest=0.1):
    """``(..., n, n)`` with eigenvalues from ``smallest`` to 1; those beyond the rank are zero."""
    n = shape[-1]
    basis = torch.linalg.qr(torch.randn(*shape, n, generator=generator).double()).Q
    values = torch.logspace(math.log10(smallest), 0, n).double() * (torch.arange(n) < rank)
    return (basis * values) @ basis.mT


def make(kind, seed, r=3, p=2, k=1, rank=4, smallest=0.1, dtype=torch.float64):
    """A block of ``k`` groups of ``r`` rows (diagonal and dense ones have none, but the same shape)."""
    generator = torch.Generator().manual_seed(seed)
    G, A = (psd(generator, k, n, rank=rank, smallest=smallest) for n in (r, p))
    bases = [torch.linalg.qr(torch.randn(k, n, n, generator=generator).double()).Q.to(dtype) for n in (r, p)]
    whole = psd(generator, k * r * p, rank=rank * k * r * p // 4, smallest=smallest).to(dtype)
    values = (smallest ** torch.rand(k * r, p, generator=generator).double() * (torch.arange(p) < rank)).to(dtype)
    scale = torch.rand(k, generator=generator).double() * 3 + 0.1
    G, A = G.to(dtype), A.to(dtype)
    made = {
        "number": lambda: KroneckerBlock(*((G[0], A[0]) if k == 1 else (G, A)), 0.7, "layer"),
        "tensor": lambda: KroneckerBlock(G, A, scale[0], "layer"),
        "by-group": lambda: KroneckerBlock(G, A, scale, "layer"),
        "eigen": lambda: EigenBlock(*bases, values, "layer"),
        "diagonal": lambda: DiagonalBlock(values, "layer"),
        "dense": lambda: DenseBlock(whole, (k * r, p), 0.7, "layer"),
    }
    return made[kind]()


def dense(block):
    """The block as one float64 matrix, from its tensors."""
    parts = {name: tensor.double() for name, tensor in block.to_tensors().items()}
    if isinstance(block, DenseBlock):
        return parts["scale"] * parts["matrix"]
    if isinstance(block, DiagonalBlock):
        return torch.diag(parts["values"].flatten())
    if isinstance(block, EigenBlock):
        bases = zip(parts["gradient_basis"], parts["activation_basis"], strict=True)
        U = torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for g, a in bases))
        return U @ torch.diag(parts["values"].flatten()) @ U.T
    return torch.block_diag(*(scale * torch.kron(G, A) for scale, G, A in triples(block)))


def triples(block):
    """``(scale, G, A)`` of every group."""
    G, A = (f.double().reshape(-1, *f.shape[-2:]) for f in (block.gradient_factor, block.activation_factor))
    return [
        (s, g.contiguous(), a.contiguous()) for s, g, a in zip(block.scale.double().expand(len(G)), G, A, strict=True)
    ]


def eye(n):
    return torch.eye(n).double()


def unit(matrix):
    return matrix / matrix.trace() if matrix.trace() > 0 else matrix


def factored_tikhonov(scale, G, A, damping):
    """KFC Eq. 28."""
    q, p = len(G), len(A)
    numerator, denominator = A.trace() / p, scale * G.trace() / q
    pi = (numerator / denominator).sqrt() if numerator > 0 and denominator > 0 else 1.0
    return torch.kron(scale * G + math.sqrt(damping) / pi * eye(q), A + pi * math.sqrt(damping) * eye(p))


def trace_restricted(scale, G, A, damping):
    """TKFAC Eq. 5.15."""
    root = (scale * G.trace() * A.trace()).sqrt()
    return torch.kron(
        root * unit(G) + math.sqrt(damping) * eye(len(G)), root * unit(A) + math.sqrt(damping) * eye(len(A))
    )


def trace_restricted_auto(scale, G, A, minimum, expansion=1.0):
    """TKFAC Eq. 5.16; 5.17 with an expansion."""
    q, p = len(G), len(A)
    trace = max(minimum, expansion * float(scale * G.trace() * A.trace()))
    return torch.kron(math.sqrt(trace) * unit(G) + trace / q * eye(q), math.sqrt(trace) * unit(A) + trace / p * eye(p))


RULES = {
    FactoredTikhonov: factored_tikhonov,
    TraceRestricted: trace_restricted,
    TraceRestrictedAuto: trace_restricted_auto,
}


def damped(strategy, block, damping, **options):
    """The damped block as one matrix, from the documented formula."""
    F = dense(block)
    if isinstance(block, KroneckerBlock) and strategy in RULES:
        return torch.block_diag(*(RULES[strategy](*triple, damping, **options) for triple in triples(block)))
    if strategy is TraceRestrictedAuto:
        trace = max(damping, options.get("expansion", 1.0) * float(F.trace()))
        return trace * unit(F) + trace**2 / len(F) * eye(len(F))
    return F + damping * eye(len(F))


def as_dense(function, shape):
    """The matrix of a linear function of ``(..., q, p)``."""
    n = math.prod(shape)
    return function(eye(n).view(n, *shape)).flatten(1).T


def assert_is_inverse_of(inverse, matrix, shape, rtol=1e-8):
    """All that a damped inverse answers, for the dense ``matrix``."""
    expected = torch.linalg.inv(matrix)
    close = {"rtol": rtol, "atol": rtol * float(expected.abs().max())}
    torch.testing.assert_close(as_dense(inverse.solve, shape), expected, **close)
    torch.testing.assert_close(matrix @ as_dense(inverse.solve, shape), eye(len(matrix)), rtol=0, atol=1e-8)
    M = torch.randn(2, 3, *shape).double()
    torch.testing.assert_close(inverse.solve(M).flatten(2), M.flatten(2) @ expected, rtol=rtol, atol=10 * close["atol"])
    torch.testing.assert_close(inverse.sqrt_solve(inverse.sqrt_solve(M)), inverse.solve(M), **close)
    root = as_dense(inverse.sqrt_solve, shape)
    torch.testing.assert_close(root, root.T, **close)
    assert torch.linalg.eigvalsh(root).min() > 0
    torch.testing.assert_close(inverse.logdet(), torch.logdet(matrix), rtol=rtol, atol=rtol)
    torch.testing.assert_close(inverse.diagonal(), expected.diagonal().view(shape), **close)
    values = torch.linalg.eigvalsh(matrix)
    assert inverse.eigenvalues.shape == shape
    torch.testing.assert_close(inverse.eigenvalues.flatten().sort().values, values, rtol=rtol, atol=1e-12)


# -- one number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=seeds, r=sizes, p=sizes, k=groups, rank=ranks, damping=dampings, as_tensor=st.booleans())
def test_every_answer_is_that_of_the_dense_formula(strategy, kind, seed, r, p, k, rank, damping, as_tensor):
    """Also for blocks without full rank, down to zero."""
    block = make(kind, seed, r, p, k, rank)
    given_damping = (
        torch.tensor(damping, dtype=torch.float64) if as_tensor and strategy is not TraceRestrictedAuto else damping
    )
    inverse = strategy(given_damping).invert(block)
    assert_is_inverse_of(inverse, damped(strategy, block, damping), (k * r, p))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=seeds, k=groups, a=st.floats(1e-3, 1e3), b=st.floats(1e-3, 1e3), damping=dampings)
def test_how_a_scalar_is_split_between_scale_and_factors_does_not_matter(strategy, seed, k, a, b, damping):
    block = make("by-group", seed, k=k)
    other = KroneckerBlock(a * block.gradient_factor, b * block.activation_factor, block.scale / (a * b))
    expected, actual = (strategy(damping).invert(one) for one in (block, other))
    M = torch.randn(2, *block.shape).double()
    torch.testing.assert_close(actual.solve(M), expected.solve(M), rtol=1e-8, atol=1e-8 * float(expected.weights.max()))
    torch.testing.assert_close(actual.logdet(), expected.logdet(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", BY_NUMBER)
def test_without_damping_a_regular_block_is_inverted_as_it_is(strategy, kind):
    block = make(kind, 0, k=2)
    assert_is_inverse_of(strategy(0.0).invert(block), dense(block), block.shape)
    nearly = strategy(1e-24).invert(block)
    torch.testing.assert_close(nearly.eigenvalues, block.eigenvalues(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["by-group", "eigen", "diagonal", "dense"])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("strategy", BY_NUMBER)
def test_logdet_is_differentiable_in_damping_and_scale(strategy, rank, kind):
    block = make(kind, 0, k=2, rank=rank)
    at = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 2.0)]
    assert torch.autograd.gradcheck(lambda g, s: strategy(g).invert(block.scaled(s)).logdet(), at)
    M = torch.randn(2, *block.shape).double()
    assert torch.autograd.gradcheck(lambda g, s: strategy(g).invert(block.scaled(s)).sqrt_solve(M), at)


# -- decompositions ------------------------------------------------------------------------------------------


@pytest.fixture
def decomposed(monkeypatch):
    """Shapes that were decomposed so far, one for each call."""
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(tuple(m.shape)) or eigh(m))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_damping_makes_no_new_decomposition(kind, decomposed):
    block = make(kind, 0, k=2)
    Tikhonov(1.0).invert(block)
    decomposed.clear()
    for strategy in STRATEGIES:
        for one in (block, block.scaled(3.0)):
            inverse = strategy(0.1).invert(one)
            inverse.solve(torch.randn(one.shape).double()), inverse.logdet(), inverse.diagonal()
    assert decomposed == []


@pytest.mark.parametrize("estimator", ["tkfac", "exact", "ekfac"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_whole_fisher_is_decomposed_in_one_call_for_every_size(strategy, estimator, decomposed):
    made = cnn()
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, estimator)
    decomposed.clear()
    inverses = strategy(0.1).invert_all(fisher)
    assert list(inverses) == list(fisher)
    shapes = [block.shape for block in fisher.values()]
    numbers = {"tkfac": [n for shape in shapes for n in shape], "exact": map(math.prod, shapes), "ekfac": []}
    assert sorted(decomposed) == sorted((count, n, n) for n, count in Counter(numbers[estimator]).items())


# -- TKFAC's automatic damping -------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Convolutions, one of them with groups, a normalisation, linear layers, and a layer whose gradient is zero."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 2)
        self.grouped = nn.Conv2d(4, 4, 2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.hidden = nn.Linear(4, 5)
        self.dead = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.grouped(torch.tanh(self.first(x))))).mean((2, 3))
        return self.head(torch.tanh(self.hidden(x) + 0 * self.dead(x)))


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_automatic_damping_of_a_network_equals_eq_5_16_and_5_17(quantile):
    """Convolutions get max(ν, δ), all others max(ν, β δ) with β = max max(ν, δ) / δ over the Kronecker layers."""
    made = case(Mixed(), torch.randn(6, 1, 4, 4), 3)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "tkfac", sampling="exact")
    kronecker = [block for block in fisher.values() if isinstance(block, KroneckerBlock)]
    traces = torch.stack([s * G.trace() * A.trace() for block in kronecker for s, G, A in triples(block)])
    traces = traces[traces > 0]
    assert (len(kronecker), len(traces)) == (5, 5)  # two groups, and a layer without a gradient
    minimum = float(traces.quantile(quantile)) * 1.01
    beta = float((traces.clamp_min(minimum) / traces).max())
    assert beta > 1
    inverses = TraceRestrictedAuto(minimum).invert_all(fisher)
    assert list(inverses) == list(fisher) == ["first", "grouped", "norm", "hidden", "dead", "head"]
    for name, block in fisher.items():
        expansion = 1.0 if name in ("first", "grouped") else beta
        matrix = damped(TraceRestrictedAuto, block, minimum, expansion=expansion)
        assert_is_inverse_of(inverses[name], matrix, block.shape)
    for name, block in fisher.items():  # blocks without a network: each by itself
        alone = block_from_tensors(
            block.kind, {k: t for k, t in block.to_tensors().items() if k != "least_trace"}, name
        )
        plain = TraceRestrictedAuto(minimum).invert(alone)
        assert_is_inverse_of(plain, damped(TraceRestrictedAuto, block, minimum), block.shape)


@pytest.mark.parametrize("estimator", ["tkfac", "kfac", "ekfac", "exact"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layer_is_damped_the_same_alone_in_a_dict_and_in_its_network(strategy, estimator, tmp_path):
    """To the bit, also where some layers are left out, and after a file."""
    made = case(Mixed(), torch.randn(6, 1, 4, 4), 3)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, estimator, sampling="exact")
    damping = strategy(float(fisher["first"].trace()) * 3)
    fisher.decompose()
    fisher.save(tmp_path / "fisher")
    fisher.restricted_to(["grouped", "head"]).save(tmp_path / "some")
    expected = damping.invert_all(fisher)
    others = {
        "one by one": {name: damping.invert(block) for name, block in fisher.items()},
        "dict": damping.invert_all(dict(fisher)),
        "some": damping.invert_all(fisher.restricted_to(["head", "hidden"])),
        "some in a dict": damping.invert_all({"head": fisher["head"]}),
    }
    for inverses in others.values():
        for name, inverse in inverses.items():
            assert torch.equal(inverse.eigenvalues, expected[name].eigenvalues)
    for file in ("fisher", "some"):
        for name, inverse in damping.invert_all(kl.KroneckerFisher.load(tmp_path / file)).items():
            torch.testing.assert_close(inverse.eigenvalues, expected[name].eigenvalues, rtol=1e-9, atol=1e-15)


def test_a_file_without_least_traces_is_damped_as_the_network():
    """As files of earlier versions are."""
    made = case(Mixed(), torch.randn(6, 1, 4, 4), 3)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "tkfac", sampling="exact")
    tensors = {name: tensor for name, tensor in fisher.to_tensors().items() if not name.endswith("least_trace")}
    assert len(tensors) < len(fisher.to_tensors())
    old = kl.KroneckerFisher.from_tensors(tensors, fisher.to_json())
    damping = TraceRestrictedAuto(float(fisher["first"].trace()) * 3)
    for name, inverse in damping.invert_all(old).items():
        torch.testing.assert_close(inverse.eigenvalues, damping.invert(fisher[name]).eigenvalues, rtol=1e-9, atol=1e-15)


def test_a_layer_with_a_gradient_of_rounding_expands_no_other():
    made = case(Mixed(), torch.randn(6, 1, 4, 4), 3)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "tkfac", sampling="exact")
    noisy = dict(fisher) | {"dead": KroneckerBlock(1e-36 * eye(5), eye(5), name="dead")}
    known = fisher["head"].least_trace
    for block in noisy.values():
        block.least_trace = None
    noisy = kl.KroneckerFisher(noisy, fisher.n_examples, fisher.metadata)
    torch.testing.assert_close(noisy["head"].least_trace, known)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fisher_of_zeros_is_damped_all_the_same(strategy):
    made = case(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)), torch.zeros(3, 1, 3, 3), 3)
    nn.init.zeros_(made.model[2].weight)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "tkfac", layers=["0"])
    assert fisher["0"].trace() == 0
    inverse = strategy(0.1).invert_all(fisher)["0"]
    expected = 0.1**2 / (2 * 5) if strategy is TraceRestrictedAuto else 0.1
    torch.testing.assert_close(inverse.eigenvalues, torch.full((2, 5), expected).double())


# -- one for every weight ------------------------------------------------------------------------------------


def each_weight(seed, shape, low=1e-3):
    """Dampings from ``low`` to 1."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()
    return low**uniform


def projected(block, diagonal, scale=1.0):
    """``U diag(Uᵀ (c F + D) U) Uᵀ``; factors with distinct eigenvalues have one eigenbasis but for signs."""
    if isinstance(block, EigenBlock):
        bases = zip(block.gradient_basis, block.activation_basis, strict=True)
    else:
        bases = [[torch.linalg.eigh(factor).eigenvectors for factor in triple[1:]] for triple in triples(block)]
    U = torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for g, a in bases))
    inside = U.T @ (scale * dense(block) + torch.diag(diagonal.flatten())) @ U
    return U @ torch.diag(inside.diagonal()) @ U.T


@pytest.fixture
def nothing_made_dense(monkeypatch):
    monkeypatch.setattr("kronlaplace.inversion.LARGEST_DENSE", 0)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, r=sizes, p=sizes, k=groups, rank=ranks)
def test_a_damping_for_every_weight_is_exact(kind, seed, r, p, k, rank):
    block = make(kind, seed, r, p, k, rank)
    diagonal = each_weight(seed, block.shape)
    matrix = dense(block) + torch.diag(diagonal.flatten())
    inverse = Tikhonov(diagonal).invert(block)
    assert PlusDiagonal(block).exact
    assert_is_inverse_of(inverse, matrix, block.shape)
    scale = torch.tensor(2.5).double()
    expected = torch.logdet(2.5 * dense(block) + torch.diag(diagonal.flatten()))
    torch.testing.assert_close(PlusDiagonal(block).logdet(scale, diagonal), expected)


@pytest.mark.parametrize(
    ("kind", "smallest", "low"),
    [("by-group", 1e-5, 1e-10), ("eigen", 1e-10, 1e-10), ("diagonal", 1e-10, 1e-10), ("dense", 1e-4, 1e-5)],
)
@given(seed=seeds)
def test_in_float32_a_large_spread_of_eigenvalues_does_no_harm(kind, smallest, low, seed):
    """Of the block's and of the dampings, over as many orders of magnitude as float32 factors can hold."""
    block = make(kind, seed, r=8, p=8, rank=8, smallest=smallest, dtype=torch.float32)
    diagonal = each_weight(seed, block.shape, low)
    matrix = dense(block) + torch.diag(diagonal.flatten())
    inverse = Tikhonov(diagonal).invert(block)
    M = torch.randn(block.shape, generator=torch.Generator().manual_seed(seed))
    expected = torch.linalg.solve(matrix, M.double().flatten())
    assert torch.linalg.norm(inverse.solve(M).flatten() - expected) < 1e-3 * torch.linalg.norm(expected)
    assert inverse.eigenvalues.min() >= diagonal.min()
    for logdet in (inverse.logdet(), PlusDiagonal(block).logdet(torch.tensor(1.0), diagonal)):
        torch.testing.assert_close(logdet, torch.logdet(matrix), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_what_rounding_leaves_of_zeros_is_not_taken_for_eigenvalues(seed, kind):
    """A float32 matrix without full rank has eigenvalues of -1e-8; sums in float64 have some of -1e-17."""
    block = make(kind, seed, r=4, p=4, rank=1, dtype=torch.float32)
    each, one = (Tikhonov(damping).invert(block) for damping in (torch.full((4, 4), 1e-9).double(), 1e-9))
    torch.testing.assert_close(each.logdet(), one.logdet(), rtol=1e-4, atol=0)
    smallest = torch.tensor(1e-20, dtype=torch.float64)
    tiny = Tikhonov(smallest.expand(4, 4)).invert(block)
    assert tiny.eigenvalues.min() >= smallest
    assert torch.isfinite(tiny.solve(torch.ones(4, 4))).all()


@pytest.mark.parametrize("kind", ROTATED)
@given(seed=seeds, r=sizes, p=sizes, k=groups)
@pytest.mark.usefixtures("nothing_made_dense")
def test_large_blocks_keep_their_eigenbasis(kind, seed, r, p, k):
    """The eigenvalues are the diagonal of ``Uᵀ (F + D) U``; the determinant is never too small (Hadamard)."""
    block = make(kind, seed, r, p, k)
    diagonal = each_weight(seed, block.shape)
    matrix = dense(block) + torch.diag(diagonal.flatten())
    inverse = Tikhonov(diagonal).invert(block)
    assert not PlusDiagonal(block).exact
    assert_is_inverse_of(inverse, projected(block, diagonal), block.shape)
    assert inverse.logdet() >= torch.logdet(matrix) - 1e-9
    scale = torch.tensor(2.5).double()
    expected = torch.logdet(projected(block, diagonal, 2.5))
    torch.testing.assert_close(PlusDiagonal(block).logdet(scale, diagonal), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.usefixtures("nothing_made_dense")
def test_large_blocks_are_exact_where_all_dampings_are_equal(rank, kind):
    block = make(kind, 0, k=2, rank=rank)
    inverse = Tikhonov(torch.full(block.shape, 0.3)).invert(block)
    assert_is_inverse_of(inverse, damped(Tikhonov, block, float(torch.tensor(0.3))), block.shape)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@pytest.mark.usefixtures("nothing_made_dense")
def test_diagonal_and_dense_blocks_are_exact_whatever_their_size(kind):
    block = make(kind, 0)
    diagonal = each_weight(0, block.shape)
    assert PlusDiagonal(block).exact
    inverse = Tikhonov(diagonal).invert(block)
    assert_is_inverse_of(inverse, dense(block) + torch.diag(diagonal.flatten()), block.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("largest", [0, 2048])
def test_logdet_is_differentiable_in_scale_and_every_damping(largest, rank, kind, monkeypatch):
    monkeypatch.setattr("kronlaplace.inversion.LARGEST_DENSE", largest)
    block = make(kind, 0, k=2, rank=rank)
    scale, diagonal = torch.tensor(1.7).double().requires_grad_(), each_weight(0, block.shape).requires_grad_()
    assert torch.autograd.gradcheck(PlusDiagonal(block).logdet, (scale, diagonal))
    assert torch.autograd.gradcheck(lambda s, d: Tikhonov(d).invert(block.scaled(s)).logdet(), (scale, diagonal))


@pytest.mark.parametrize("ratio", [1e3, 1e12, 1e14, 1e18, 1e24])
def test_logdet_and_its_derivatives_stay_accurate_where_the_matrix_is_singular_up_to_rounding(ratio):
    """Half of the eigenvalues of ``F`` are 1, the others 0: all is known in closed form."""
    block = make("eigen", 0, r=4, p=4)
    block.values = (torch.arange(16) < 8).double().view(4, 4)
    scale, gamma = torch.tensor(2.0).double().requires_grad_(), torch.tensor(1 / ratio, dtype=torch.float64)
    diagonal = gamma.expand(4, 4).clone().requires_grad_()
    logdet = PlusDiagonal(block).logdet(scale, diagonal)
    torch.testing.assert_close(logdet, 8 * torch.log(2 + gamma) + 8 * torch.log(gamma), rtol=1e-5, atol=0)
    by_scale, by_diagonal = torch.autograd.grad(logdet, (scale, diagonal))
    torch.testing.assert_close(by_scale, 8 / (2 + gamma), rtol=1e-4, atol=0)
    torch.testing.assert_close(by_diagonal.sum(), 8 / (2 + gamma) + 8 / gamma, rtol=1e-4, atol=0)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, torch.tensor(-1.0), torch.ones(1), torch.ones(3), "1"])
@pytest.mark.parametrize("strategy", BY_NUMBER)
def test_damping_is_one_finite_number(strategy, bad):
    with pytest.raises(ValueError, match="damping must be one finite number that is not negative, got"):
        strategy(bad)


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf])
def test_smallest_trace_is_positive(bad):
    with pytest.raises(ValueError, match="minimum must be a positive finite number"):
        TraceRestrictedAuto(bad)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_damping_of_every_weight_is_finite_and_not_negative(bad):
    with pytest.raises(ValueError, match="damping must be finite and not negative for every weight"):
        Tikhonov(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("strategy", [FactoredTikhonov, TraceRestricted])
def test_only_tikhonov_damps_every_weight(strategy):
    with pytest.raises(ValueError, match="damping must be one finite number"):
        strategy(torch.ones(3, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (3, 1), (6, 1)])
def test_dampings_of_another_shape_are_refused_with_the_layers_name(shape, kind):
    message = r"damping of layer 'layer' must be one number or of shape \(3, 2\).*got shape"
    with pytest.raises(ValueError, match=message):
        Tikhonov(torch.ones(shape)).invert(make(kind, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "damping",
    [Tikhonov(torch.zeros(3, 2)), *(strategy(zero) for strategy in BY_NUMBER for zero in (0, torch.tensor(0.0)))],
)
def test_singular_blocks_need_a_damping(damping, kind):
    with pytest.raises(ValueError, match="block of layer 'layer' is singular; give a damping larger than 0"):
        damping.invert(make(kind, 0, rank=0))


def output_layer(seed, estimator, dtype=torch.float64):
    """The Fisher of a softmax output layer: a shift of all logits changes nothing, so its blocks are singular."""
    torch.manual_seed(seed)
    q, p = 2 + seed % 5, 1 + seed % 4
    model, x = nn.Linear(p, q).to(dtype), (torch.randn(50, p) * 10.0 ** (seed % 3)).to(dtype)
    return kl.estimate_fisher(model, [x], "classification", estimator, sampling="exact")


@pytest.mark.parametrize("estimator", ["exact", "kfac", "tkfac", "ekfac"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_output_layer_is_refused_in_every_draw(dtype, estimator):
    """Rounding makes its eigenvalues of zero positive in about every other draw."""
    for seed in range(60) if estimator == "exact" else range(0, 60, 7):
        fisher = output_layer(seed, estimator, dtype)
        (block,) = fisher.values()
        for damping in (Tikhonov(0), FactoredTikhonov(0), TraceRestricted(0), Tikhonov(torch.zeros(block.shape))):
            for invert, what in ((damping.invert, block), (damping.invert_all, fisher)):
                with pytest.raises(ValueError, match="block of layer '' is singular; give a damping larger than 0"):
                    invert(what)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, 1e-2), (torch.float64, 1e-6)])
@pytest.mark.parametrize("strategy", BY_NUMBER)
@given(seed=seeds, r=sizes, p=sizes, k=groups, exponent=st.integers(-12, 12))
def test_regular_blocks_are_inverted_without_a_damping(strategy, dtype, smallest, kind, seed, r, p, k, exponent):
    """Whatever their size."""
    block = make(kind, seed, r, p, k, rank=p if kind in ("eigen", "diagonal") else 4, smallest=smallest, dtype=dtype)
    inverse = strategy(0).invert(block.scaled(10.0**exponent))
    expected = torch.linalg.slogdet(dense(block)).logabsdet + k * r * p * exponent * math.log(10)
    torch.testing.assert_close(inverse.logdet(), expected, rtol=1e-3, atol=1e-2)


def test_entries_of_a_diagonal_block_may_differ_by_any_factor():
    values = torch.logspace(-30, 8, 6).view(3, 2)
    torch.testing.assert_close(Tikhonov(0).invert(DiagonalBlock(values)).weights, 1 / values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_is_refused_with_the_layers_name_before_any_work(strategy, bad, kind, decomposed):
    block = make(kind, 0)
    tensor = list(block.to_tensors().values())[-1 if kind in ("eigen", "diagonal") else 0]
    tensor[(0,) * tensor.ndim] = bad
    good = make("number", 1)
    good.name = "other"
    with pytest.raises(ValueError, match=r"NaN or infinite entries in .*layer 'layer'") as error:
        strategy(0.1).invert_all({"other": good, "layer": block})
    assert "'other'" not in str(error.value)
    if kind not in ("eigen", "diagonal"):
        assert decomposed == []


@pytest.mark.parametrize("kind", ["tensor", "by-group", "dense"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_scale_that_is_not_finite_is_refused_too(strategy, bad, kind):
    with pytest.raises(ValueError, match="layer 'layer'"):
        strategy(0.1).invert(make(kind, 0, k=2).scaled(bad))


@pytest.mark.parametrize("strategy", BY_NUMBER)
@pytest.mark.parametrize("damping", [np.float32(0.5), np.float64(0.5), np.int64(2), 2])
def test_any_real_number_is_a_damping(damping, strategy):
    block = make("number", 0)
    assert torch.equal(strategy(damping).invert(block).eigenvalues, strategy(float(damping)).invert(block).eigenvalues)


def everywhere(monkeypatch):
    """No eigendecomposition converges any more."""

    def no_convergence(error, *args, **kwargs):
        raise error("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", partial(no_convergence, torch.linalg.LinAlgError))
    monkeypatch.setattr(scipy.linalg, "eigh", partial(no_convergence, np.linalg.LinAlgError))


@pytest.mark.parametrize("kind", ["number", "by-group", "dense"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_decomposition_that_fails_names_the_layer(strategy, kind, monkeypatch):
    block = make(kind, 0, k=2)
    everywhere(monkeypatch)
    with pytest.raises(RuntimeError, match=r"no eigendecomposition of the .* of layer 'layer'.* in float64.*diagonal"):
        strategy(0.1).invert(block)


def test_a_decomposition_of_a_damped_block_that_fails_names_the_layer(monkeypatch):
    block = make("eigen", 0)
    everywhere(monkeypatch)
    with pytest.raises(RuntimeError, match="no eigendecomposition of the damped block of layer 'layer' in float64"):
        Tikhonov(torch.ones(3, 2)).invert(block)
