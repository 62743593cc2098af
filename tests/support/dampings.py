"""Blocks of every kind, and every damping strategy by its formula."""

import math

import torch
from hypothesis import strategies as st

from kronlaplace.blocks import (
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    KroneckerBlock,
    TruncatedBlock,
    Truncation,
    truncated,
)
from kronlaplace.blocks.eigendecomposition import Eigen
from kronlaplace.damping import FactoredTikhonov, Tikhonov, TraceRestricted, TraceRestrictedAuto

STRATEGIES = [Tikhonov, FactoredTikhonov, TraceRestricted, TraceRestrictedAuto]
BY_NUMBER = STRATEGIES[:3]
KINDS = [
    "number",
    "tensor",
    "by-group",
    "truncated",
    "coordinates",
    "eigen",
    "diagonal",
    "dense",
]  # five: Kronecker blocks
ROTATED = KINDS[:6]
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
        "truncated": lambda: truncated([KroneckerBlock(G, A, scale, "layer")], Truncation(limit=2, rank=1 + seed % 2))[
            0
        ],
        "coordinates": lambda: TruncatedBlock(diagonal_side(G), whole_side(A), scale, "layer"),
        "eigen": lambda: EigenBlock(*bases, values, "layer"),
        "diagonal": lambda: DiagonalBlock(values, "layer"),
        "dense": lambda: DenseBlock(whole, (k * r, p), 0.7, "layer"),
    }
    return made[kind]()


def diagonal_side(matrices):
    """The diagonals of matrices ``(k, n, n)``, where every other coordinate has the same entry."""
    entries = matrices.diagonal(dim1=1, dim2=2)
    index = torch.arange(entries.shape[1]) % 2
    values = torch.stack([entries[:, index == i].mean(1) for i in range(min(2, len(index)))], dim=1)
    return Eigen(values.sort(1).values, index)


def whole_side(matrices):
    """All eigenpairs of matrices ``(k, n, n)``."""
    values, vectors = torch.linalg.eigh(matrices)
    return Eigen(values.clamp_min(0), vectors)


def dense(block):
    """The block as one float64 matrix, from its tensors."""
    if isinstance(block, KroneckerBlock):
        return torch.block_diag(*(scale * torch.kron(G, A) for scale, G, A in triples(block)))
    parts = {name: tensor.double() for name, tensor in block.to_tensors().items()}
    if isinstance(block, DenseBlock):
        return parts["scale"] * parts["matrix"]
    if isinstance(block, DiagonalBlock):
        return torch.diag(parts["values"].flatten())
    if isinstance(block, EigenBlock):
        bases = zip(parts["gradient_basis"], parts["activation_basis"], strict=True)
        U = torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for g, a in bases))
        return U @ torch.diag(parts["values"].flatten()) @ U.T
    raise TypeError(type(block))


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
    assert inverse.eigenvalues.shape == inverse.block.multiplicities().shape
    expanded = inverse.expand(inverse.eigenvalues)
    assert expanded.shape == shape
    torch.testing.assert_close(expanded.flatten().sort().values, values, rtol=rtol, atol=1e-12)
