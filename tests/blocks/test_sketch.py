"""Sketches of second moments: what they keep of the matrix that is never formed."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.blocks.basis import Basis, CoordinateBasis
from kronlaplace.blocks.sketch import grouped_diagonal, leading_of_sketch, random_columns, side_of_sketch
from tests.support.dampings import eye, seeds


def power_law(seed, n=60, exponent=1.0, rank=None):
    """A second moment with the eigenvalues ``j^-exponent``; those beyond the rank are zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q
    values = torch.arange(1, n + 1).double() ** -exponent
    values[n if rank is None else rank :] = 0
    return (basis * values) @ basis.T


def sketched(matrix, columns, seed=0):
    """The eigenpairs from ``columns`` products, as a dense matrix, and the pairs."""
    test = random_columns(len(matrix), columns, seed, matrix)
    part = leading_of_sketch(matrix @ test, test, matrix.diagonal())
    U, d = part.vectors.double(), part.values.double()
    return (U * d[1:]) @ U.T + d[0] * (eye(len(U)) - U @ U.T), part


@given(seed=seeds, exponent=st.floats(0, 3), damping=st.floats(1e-4, 1), rank=st.sampled_from([12, 24]))
def test_traces_are_exact_and_determinants_shrink_to_the_true_one(seed, exponent, damping, rank):
    """With every column more, since the first columns stay the same, down to the matrix if there are as many as its rank."""
    matrix = power_law(seed, 24, exponent, rank)
    true = torch.logdet(matrix + damping * eye(24))
    errors = []
    for columns in (1, 2, 4, 8, 12, 16):
        dense, part = sketched(matrix, columns, seed)
        torch.testing.assert_close(dense.trace(), matrix.trace(), rtol=1e-12, atol=0)
        assert part.values.min() >= 0
        torch.testing.assert_close(part.vectors.T @ part.vectors, eye(part.vectors.shape[1]), rtol=0, atol=1e-12)
        leading = (part.vectors * part.values[1:]) @ part.vectors.T
        assert torch.linalg.eigvalsh(matrix - leading).min() > -1e-7 * matrix.trace()  # never larger than the matrix
        errors.append(float(torch.logdet(dense + damping * eye(24)) - true))
    assert min(errors) > -1e-7
    assert all(later <= earlier + 1e-7 for earlier, later in itertools.pairwise(errors))
    if rank == 12:
        assert errors[-2] < 1e-6 * max(1.0, abs(float(true)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_a_matrix_of_low_rank_is_found_whole(dtype, size):
    matrix = (size * power_law(0, 80, rank=10)).to(dtype)
    dense, part = sketched(matrix, 16)
    assert part.values[0] == 0
    assert part.values.shape[0] == 11
    error = torch.linalg.norm(dense - matrix.double()) / torch.linalg.norm(matrix.double())
    assert error < (1e-4 if dtype == torch.float32 else 1e-12)


@given(seed=seeds, exponent=st.floats(0.5, 2))
def test_the_trace_that_eigenpairs_lack_has_the_bound_of_the_paper(seed, exponent):
    """Tropp, Yurtsever, Udell and Cevher 2017, Theorem 4.1, on average over five draws, and three times as much."""
    matrix, columns = power_law(seed, exponent=exponent), 20
    values = torch.linalg.eigvalsh(matrix).flip(0)
    bound = min((1 + k / (columns - k - 1)) * values[k:].sum() for k in range(columns - 1))
    lacking = [float(matrix.trace() - sketched(matrix, columns, seed + i)[1].values[1:].sum()) for i in range(5)]
    assert min(lacking) >= values[columns:].sum() - 1e-9
    assert sum(lacking) / 5 < 1.5 * bound


def test_rounding_of_many_sums_in_float32_is_not_kept():
    """Of a matrix of rank 5 with an even spectrum, summed from 500 batches."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 5, generator=generator)).Q
    test = random_columns(300, 20, 0, basis)
    product, diagonal, whole = torch.zeros(300, 20), torch.zeros(300), torch.zeros(300, 300, dtype=torch.float64)
    for _ in range(500):
        x = torch.randn(4, 5, generator=generator) @ basis.T
        product.addmm_(x.T, x @ test)
        diagonal += x.square().sum(0)
        whole += x.double().T @ x.double()
    part = leading_of_sketch(product, test, diagonal)
    assert part.values.shape == (6,)
    torch.testing.assert_close(part.values[1:].double(), torch.linalg.eigvalsh(whole)[-5:], rtol=1e-5, atol=0)


@given(seed=seeds, n=st.integers(1, 300), decades=st.floats(0, 30), zeros=st.integers(0, 5))
def test_groups_of_a_diagonal_are_of_nearly_equal_entries(seed, n, decades, zeros):
    generator = torch.Generator().manual_seed(seed)
    entries = 10 ** (-decades * torch.rand(n, generator=generator).double())
    entries[:zeros] = 0
    part = grouped_diagonal(entries)
    basis = CoordinateBasis(part.vectors, len(part.values))
    expanded = basis.expand(part.values)
    torch.testing.assert_close(expanded.sum(), entries.sum(), rtol=1e-12, atol=0)
    assert (part.values.diff() > 0).all()
    assert (expanded[:zeros] == 0).all()
    told_apart = entries > 1.1e-12 * entries.max()
    ratio = (expanded / entries)[told_apart]
    assert ratio.numel() == 0 or (ratio.max() < 1.06 and ratio.min() > 1 / 1.06)
    assert (expanded[~told_apart] <= 1.2e-12 * entries.max()).all()


@pytest.mark.parametrize("correlated", [True, False])
def test_the_side_is_the_closer_of_the_two(correlated):
    generator = torch.Generator().manual_seed(0)
    matrix = power_law(0, exponent=2.0)
    if not correlated:
        matrix = torch.diag(10 ** (-3 * torch.rand(60, generator=generator).double())) + 1e-4 * matrix
    test = random_columns(60, 8, 0, matrix)
    side = side_of_sketch("m", matrix.diagonal(), matrix @ test, test)
    assert side.vectors.is_floating_point() == correlated
    assert len(side.values) == len(side.unresolved) == 1
    (zero,) = side_of_sketch("m", torch.zeros(5), torch.zeros(5, 2), torch.randn(5, 2)).values
    assert zero.tolist() == [0.0]
    alone = side_of_sketch("m", matrix.diagonal(), None, None)
    assert not alone.vectors.is_floating_point()


def test_bad_entries_are_named():
    for diagonal, product in ((torch.tensor([1.0, torch.nan]), None), (torch.ones(2), torch.full((2, 1), torch.inf))):
        with pytest.raises(ValueError, match="NaN or infinite entries in the gradient factor"):
            side_of_sketch("the gradient factor", diagonal, product, torch.ones(2, 1))


def test_draws_are_the_seeds_own():
    state = torch.get_rng_state()
    first, again, other = (random_columns(6, 2, seed, torch.zeros(1)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_variances_of_coordinates():
    """As of a basis that is the identity."""
    index = torch.tensor([0, 2, 1, 2, 0])
    coordinates, whole = CoordinateBasis(index, 3, dtype=torch.float64), Basis(eye(5).unsqueeze(0))
    s = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).double()
    every = coordinates.expand(s)
    torch.testing.assert_close(coordinates.covariances(s), whole.covariances(every))
    centered = every @ whole.centered_squares().T
    torch.testing.assert_close(coordinates.centered_variances(s), centered)
    top = torch.tensor([3, 0, 1, 4])
    expected = whole.margin_variances(every, centered, top)
    torch.testing.assert_close(coordinates.margin_variances(s, centered, top), expected)
    assert coordinates.full().shape == (1, 5, 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"limit": 0}, ValueError, "limit must be at least 1"),
        ({"rank": 0.5}, TypeError, "rank must be an integer"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        kl.Sketch(**options)
    with pytest.raises(TypeError, match=r"sketch must be a kl\.Sketch"):
        kl.KFAC(sketch=64)
