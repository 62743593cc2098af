"""Truncated factors: their algebra against dense matrices, and what truncation keeps of a matrix."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.blocks import KroneckerBlock, TruncatedBlock, Truncation, block_from_tensors, truncated, truncation
from kronlaplace.blocks.basis import Basis
from kronlaplace.blocks.truncation import leading_eigenpairs
from tests.support.dampings import as_dense, eye, groups, make, seeds, triples

sizes = st.integers(1, 5)


def moment(seed, n, rank=None, n_zero=0, decay=0.5, dtype=torch.float64):
    """A second moment with eigenvalues from 1 down to ``decay ** n``; those beyond the rank are zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n - n_zero, n - n_zero, generator=generator).double()).Q
    values = decay ** torch.arange(n - n_zero).double() * (torch.arange(n - n_zero) < (n if rank is None else rank))
    whole = torch.zeros(n, n, dtype=torch.float64)
    rows = torch.randperm(n, generator=generator)[n_zero:]
    whole[rows.unsqueeze(1), rows] = (basis * values) @ basis.T
    return whole.to(dtype)


def dense(part):
    """``U diag(d) Uᵀ + α (I − U Uᵀ)``."""
    U, d = part.vectors.double(), part.values.double()
    return (U * d[1:]) @ U.T + d[0] * (eye(len(U)) - U @ U.T)


def close(actual, expected, rtol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * max(float(expected.abs().max()), 1e-300))


# -- the basis -----------------------------------------------------------------------------------------------


@given(seed=seeds, k=groups, n=st.integers(2, 7), rank=st.integers(1, 6), units=st.booleans())
def test_a_truncated_basis_is_orthogonal_and_ends_with_its_vectors(seed, k, n, rank, units):
    """Also if they are unit vectors, which need no reflection, or ones that swap coordinates."""
    rank = min(rank, n - 1)
    generator = torch.Generator().manual_seed(seed)
    if units:
        vectors = torch.stack([eye(n)[:, torch.randperm(n, generator=generator)[:rank]] for _ in range(k)])
    else:
        vectors = torch.linalg.qr(torch.randn(k, n, rank, generator=generator).double()).Q
    basis = Basis(vectors)
    Q = basis.full()
    close(Q.mT @ Q, eye(n).expand(k, n, n))
    close(Q[..., n - rank :].abs(), vectors.abs())
    x = torch.randn(2, k, 3, n, generator=generator).double()
    close(basis.coordinates(x), x @ Q)
    close(basis.combined(x), x @ Q.mT)
    close(basis.squares, basis.gather(Q.square()))
    close(basis.some_of_rest(n - rank), Q[..., : n - rank])
    assert basis.multiplicities.tolist() == [n - rank] + [1] * rank
    values = torch.randn(3, rank + 1, generator=generator).double()
    assert (basis.expand(values) == torch.cat([values[:, :1].expand(3, n - rank), values[:, 1:]], dim=1)).all()
    if k == 1:
        close(basis.centered_squares(), basis.gather((Q[0] - Q[0].mean(0)).square()))


# -- the block -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["truncated", "coordinates"])
@given(seed=seeds, r=sizes, p=sizes, k=groups, rank=st.sampled_from([0, 1, 4]), factor=st.floats(0.1, 10))
def test_every_operation_is_that_of_the_dense_matrix(kind, seed, r, p, k, rank, factor):
    block = make(kind, seed, r, p, k, rank)
    if not isinstance(block, TruncatedBlock):
        assert max(r, p) <= 2
        return
    F = torch.block_diag(*(s * torch.kron(G, A) for s, G, A in triples(block)))
    n = k * r * p
    assert block.shape == (k * r, p)
    assert (block.groups, block.dtype, block.kind) == (k, torch.float64, "truncated")
    close(block.to_dense(), F)
    close(as_dense(block.matmul, block.shape), F)
    close(block.trace(), F.trace())
    close(block.group_traces().sum(), F.trace())
    close(block.frobenius_norm(), torch.linalg.norm(F))
    close(block.scaled(factor).to_dense(), factor * F)
    U = as_dense(block.from_eigenbasis, block.shape)
    close(U.T @ U, eye(n))
    close(as_dense(block.to_eigenbasis, block.shape), U.T)
    values = block.eigenvalues()
    close((U * block.expand(values).flatten()) @ U.T, F)
    assert block.multiplicities().shape == values.shape
    assert block.multiplicities().sum() == n
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)).double()
    close(block.total(weights), block.expand(weights).sum())
    whole = (U * block.expand(weights).flatten()) @ U.T
    close(block.diagonal_of(weights).flatten(), whole.diagonal())
    diagonal = torch.rand(block.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    projected = (U.T @ torch.diag(diagonal.flatten()) @ U).diagonal().view(block.shape)
    close(block.total(block.projected_diagonal(diagonal)), projected.sum())
    close(block.expand(block.projected_diagonal(torch.ones(block.shape).double())), torch.ones(block.shape).double())


@pytest.mark.parametrize("kind", ["truncated", "coordinates"])
@pytest.mark.parametrize("k", [1, 2])
def test_tensors_devices_and_dtypes(k, kind):
    block = make(kind, 0, 4, 3, k)
    again = block_from_tensors(block.kind, block.to_tensors(), "layer")
    assert torch.equal(again.to_dense(), block.to_dense())
    single = block.to("cpu", torch.float32)
    assert {t.dtype for t in single.to_tensors().values()} <= {torch.float32, torch.float64, torch.int64}
    assert single.dtype == torch.float32
    close(single.to_dense().double(), block.to_dense(), 1e-6)
    double = single.to("cpu", torch.float64)
    close(as_dense(double.matmul, double.shape), block.to_dense(), 1e-6)
    assert "eigenpairs" in repr(block)


def test_groups_get_as_many_pairs_as_the_largest_has():
    """Further pairs of a group are part of its rest, so that the matrix does not change."""
    G = torch.stack([moment(0, 2), moment(1, 2)])
    A = torch.stack([moment(2, 5, rank=1), moment(3, 5, rank=3)])
    (block,) = truncated([KroneckerBlock(G, A)], Truncation(limit=3, rank=3))
    assert block.bases()[1].vectors.shape == (2, 5, 3)
    close(block.to_dense(), KroneckerBlock(G, A).to_dense())


def test_only_large_factors_of_kronecker_blocks_are_truncated():
    small, wide = KroneckerBlock(moment(0, 3), moment(1, 4)), KroneckerBlock(moment(0, 3), moment(1, 6))
    other = make("eigen", 0, 4, 5)
    results = truncated([small, wide, other], Truncation(limit=4, rank=2))
    assert results[0] is small
    assert results[2] is other
    assert isinstance(results[1], TruncatedBlock)
    close(results[1].gradient_factor, wide.gradient_factor)
    assert truncated(results, Truncation(limit=4, rank=2))[1] is results[1]
    (again,) = truncated([results[1]], Truncation(limit=4, rank=1))
    close(again.to_dense(), truncated([wide], Truncation(limit=4, rank=1))[0].to_dense(), 1e-8)


# -- what is kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [6, 30])
@given(seed=seeds, n=st.integers(7, 14), n_zero=st.sampled_from([0, 3]), damping=st.floats(1e-4, 1))
def test_traces_are_exact_and_determinants_shrink_to_the_true_one(limit, seed, n, n_zero, damping):
    """By subspaces, or whole where few rows are used."""
    matrix = moment(seed, n, n_zero=n_zero)
    true = torch.logdet(matrix + damping * eye(n))
    errors = []
    for rank in range(1, 7):
        (part,) = leading_eigenpairs([("m", matrix)], Truncation(limit=min(limit, n - 1), rank=rank))
        close(dense(part).trace(), matrix.trace())
        assert torch.linalg.eigvalsh(dense(part)).min() > -1e-12
        errors.append(float(torch.logdet(dense(part) + damping * eye(n)) - true))
    assert min(errors) > -1e-9
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
    if n - n_zero <= 6 or n == 7:
        assert errors[-1] < 1e-9 * max(1.0, abs(float(true)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_a_large_matrix_of_low_rank_is_found_whole(dtype, share):
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = x.T @ x / 20
    (part,) = leading_eigenpairs([("m", matrix)], Truncation(limit=64, rank=40, share=share))
    if share == 1:
        assert part.values.shape == (21,)
        assert part.values[0] == 0
        assert part.unresolved == 0
        close(dense(part), matrix.double(), 1e-5 if dtype == torch.float32 else 1e-12)
    else:
        assert part.values[0] > 0
        held = part.values[1:].double().flip(0).cumsum(0) / matrix.double().trace()
        assert held[-2] < share <= held[-1]
    close(dense(part).trace(), matrix.double().trace(), 1e-6 if dtype == torch.float32 else 1e-12)


def test_a_subspace_is_nearly_as_good_as_the_whole_basis():
    """The determinant of a matrix whose eigenvalues fall slowly, like a power law: a fifth more than the least error."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 300, generator=generator) * torch.arange(1, 301).float() ** -0.7
    matrix = x.T @ x / 900
    (part,) = leading_eigenpairs([("m", matrix)], Truncation(limit=64, rank=64))
    values = torch.linalg.eigvalsh(matrix.double())
    best = torch.cat([values[:-64].mean().expand(236), values[-64:]])
    found = torch.cat([part.values[:1].double().expand(236), part.values[1:].double()])
    for damping in (1e-3, 1e-1):
        error, unavoidable = ((v + damping).log().sum() - (values + damping).log().sum() for v in (found, best))
        assert unavoidable <= error < 1.2 * unavoidable


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_what_is_left_out_by_choice_is_not_taken_for_rounding(share):
    """Only a rest that contains eigenvalues below the rounding of float32 is unresolved."""
    for decay, rounds in ((0.9, False), (0.2, True)):
        matrix = moment(0, 40, decay=decay).float() + 6e-8 * eye(40).float() * rounds
        (part,) = leading_eigenpairs([("m", matrix)], Truncation(30, 20, share))
        assert part.values[0] > 0
        assert (part.unresolved > 0) == rounds
        assert part.unresolved < 1e-6


def test_draws_are_the_seeds_own():
    matrix = moment(0, 40, decay=0.95)
    state = torch.get_rng_state()
    first, again, other = (leading_eigenpairs([("m", matrix)], Truncation(8, 4, seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sizes_near_the_limits_of_float32(size):
    matrix = (moment(0, 40, decay=0.7) * size).float()
    (part,) = leading_eigenpairs([("m", matrix)], Truncation(8, 8))
    expected = torch.linalg.eigvalsh(matrix.double())[-8:]
    close(part.values[1:].double(), expected, 1e-4)


def test_a_matrix_of_zeros_has_one_pair():
    (part,) = leading_eigenpairs([("m", torch.zeros(5, 5))], Truncation(3, 2))
    assert not part.values.any()
    close(part.vectors.T @ part.vectors, torch.ones(1, 1))


def test_bad_entries_are_named_before_any_work():
    A = torch.full((6, 6), math.nan)
    with pytest.raises(ValueError, match="NaN or infinite entries in the activation factor of layer 'wide'"):
        truncated([KroneckerBlock(moment(0, 2).float(), A, name="wide")], Truncation(3, 2))


def test_vectors_that_are_not_orthonormal_are_computed_again_in_float64(monkeypatch):
    dtypes = []
    iterate = truncation._subspace_iteration

    def spoiled(matrix, start):
        dtypes.append(matrix.dtype)
        found = iterate(matrix, start)
        return found._replace(vectors=found.vectors * (1.1 if matrix.dtype == torch.float32 else 1.0))

    monkeypatch.setattr(truncation, "_subspace_iteration", spoiled)
    matrix = moment(0, 40, rank=3, dtype=torch.float32)
    (part,) = leading_eigenpairs([("m", matrix)], Truncation(8, 8))
    assert dtypes == [torch.float32, torch.float64]
    close(dense(part), matrix.double(), 1e-5)
    monkeypatch.setattr(truncation, "_ORTHOGONAL", 0.0)
    with pytest.raises(RuntimeError, match="eigenpairs of m could not be computed"):
        leading_eigenpairs([("m", matrix.double())], Truncation(8, 8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"limit": 0}, ValueError, "limit must be at least 1"),
        ({"rank": 0.5}, TypeError, "rank must be an integer"),
        ({"limit": 3, "rank": 4}, ValueError, "rank must be at most limit, got rank=4 and limit=3"),
        ({"share": 0.0}, ValueError, "share must be a number above 0 and up to 1, got 0.0"),
        ({"share": math.nan}, ValueError, "share must be"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        kl.Truncation(**options)
