"""One damping for every weight: exact, or in the eigenbasis where blocks are large."""

import pytest
import torch
from hypothesis import given

from kronlaplace.blocks import EigenBlock, TruncatedBlock
from kronlaplace.blocks.basis import CoordinateBasis
from kronlaplace.damping import Tikhonov
from kronlaplace.damping.plus_diagonal import PlusDiagonal
from tests.support.dampings import (
    KINDS,
    ROTATED,
    assert_is_inverse_of,
    damped,
    dense,
    groups,
    make,
    ranks,
    seeds,
    sizes,
    triples,
)


def each_weight(seed, shape, low=1e-3):
    """Dampings from ``low`` to 1."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()
    return low**uniform


def projected(block, diagonal, scale=1.0):
    """``U diag(Uᵀ (c F + D) U) Uᵀ``; factors with distinct eigenvalues have one eigenbasis but for signs.

    Where eigenvectors share an eigenvalue because a factor is truncated, their mean.
    """
    if isinstance(block, EigenBlock):
        bases = zip(block.gradient_basis, block.activation_basis, strict=True)
    else:
        bases = [[torch.linalg.eigh(factor).eigenvectors for factor in triple[1:]] for triple in triples(block)]
        if isinstance(block.bases()[0], CoordinateBasis):
            bases = [[torch.eye(len(g)).double(), a] for g, a in bases]
    U = torch.block_diag(*(torch.kron(g.contiguous(), a.contiguous()) for g, a in bases))
    inside = U.T @ (scale * dense(block) + torch.diag(diagonal.flatten())) @ U
    values = inside.diagonal()
    if isinstance(block, TruncatedBlock):
        counts = block.multiplicities()
        same = block.expand(torch.arange(counts.numel()).view(counts.shape)).flatten()
        # `eigh` sorts all eigenvalues, and those of the rest are the smallest, as in the block.
        values = torch.zeros(counts.numel()).double().index_add(0, same, values)[same] / counts.flatten()[same]
    return U @ torch.diag(values) @ U.T


@pytest.fixture
def nothing_made_dense(monkeypatch):
    monkeypatch.setattr("kronlaplace.damping.plus_diagonal.LARGEST_DENSE", 0)


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
    monkeypatch.setattr("kronlaplace.damping.plus_diagonal.LARGEST_DENSE", largest)
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
