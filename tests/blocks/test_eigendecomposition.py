"""Eigendecompositions: any matrix, routines that fail or lie, and what is said about it."""

import copy
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks import KroneckerBlock, decompose
from kronlaplace.blocks import eigendecomposition as linalg
from kronlaplace.blocks.eigendecomposition import eigendecompose, eigendecompose_moments, eigendecompose_symmetric
from kronlaplace.damping import Tikhonov

EPS = torch.finfo(torch.float64).eps
EIGH, SCIPY_EIGH = torch.linalg.eigh, scipy.linalg.eigh


def psd(seed, n, rank, n_zero=0, scale=1.0):
    """A positive semidefinite float64 matrix, some of its rows and columns zero."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, rank, generator=generator).double()
    root[torch.randperm(n, generator=generator)[:n_zero]] = 0
    return scale * root @ root.T


def sparse_activations(seed):
    """Eight inputs of which 22 of 432 features are alive, and the homogeneous 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(8, 432)
    x[:, torch.randperm(432, generator=generator)[:22]] = torch.randn(8, 22, generator=generator) * 5
    return x


def residual(matrix, part):
    """Largest error of ``Q d Qᵀ`` and of ``QᵀQ``, the first over the largest row sum, in units of ``n · eps``."""
    matrix, values, vectors = matrix.double(), part.values.double(), part.vectors.double()
    norm = max(float(matrix.abs().sum(1).max()), torch.finfo(torch.float64).tiny)
    back = ((vectors * values) @ vectors.T - (matrix + matrix.T) / 2).abs().max() / norm
    orthogonal = (vectors.T @ vectors - torch.eye(len(matrix), dtype=torch.float64)).abs().max()
    return float(torch.maximum(back, orthogonal)) / (len(matrix) * EPS)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 12),
    rank=st.integers(0, 12),
    n_zero=st.integers(0, 12),
    exponent=st.integers(-300, 300),
)
def test_any_positive_semidefinite_matrix_comes_back(seed, n, rank, n_zero, exponent):
    """Eigenvalues ascend, zero rows have unit vectors and exact zeros; over all exponents."""
    matrix = psd(seed, n, rank, min(n_zero, n), 10.0**exponent)
    (part,) = eigendecompose_symmetric([("m", matrix)])
    assert residual(matrix, part) < 16
    assert (part.values.diff() >= 0).all()
    zero_rows = (matrix == 0).all(1)
    size = int((~zero_rows).sum())
    unit = (part.vectors.abs() == 1).any(0) & (part.values == 0)
    assert int(unit.sum()) >= n - size
    assert ((part.vectors[zero_rows] == 0) | (part.vectors[zero_rows] == 1)).all()


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), n_zero=st.integers(0, 8))
def test_an_indefinite_matrix_has_its_zeros_among_its_eigenvalues(seed, n, n_zero):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator).double()
    gone = torch.randperm(n, generator=generator)[: min(n_zero, n)]
    matrix[gone] = 0
    matrix[:, gone] = 0
    (part,) = eigendecompose_symmetric([("m", matrix)])
    torch.testing.assert_close(part.values, torch.linalg.eigvalsh((matrix + matrix.T) / 2), rtol=1e-9, atol=1e-12)
    assert residual(matrix, part) < 16


def test_a_row_that_is_zero_above_the_diagonal_only_is_no_zero_row():
    matrix = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1]])
    (part,) = eigendecompose_symmetric([("m", matrix)])
    torch.testing.assert_close((part.vectors * part.values) @ part.vectors.T, (matrix + matrix.T) / 2)


def test_zero_rows_are_not_decomposed(monkeypatch):
    """Equal sizes without them are one call, whatever the sizes with them."""
    shapes = []
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: shapes.append(tuple(m.shape)) or EIGH(m))
    sizes = [(5, 2), (3, 0), (9, 6), (4, 4)]
    matrices = [psd(i, n, n, n_zero) for i, (n, n_zero) in enumerate(sizes)]
    parts = eigendecompose([(str(i), matrix) for i, matrix in enumerate(matrices)])
    assert sorted(shapes) == [(1, 0, 0), (3, 3, 3)]
    for matrix, part in zip(matrices, parts, strict=True):
        assert residual(matrix, part) < 16


def test_the_gradient_goes_through_zero_rows():
    matrix = psd(0, 6, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: torch.linalg.norm(eigendecompose_symmetric([("m", m)])[0].values), matrix)


# -- routines that fail or lie -------------------------------------------------------------------------------


def is_bad(matrices):
    """Which of ``(k, n, n)`` are marked as bad: by their first entry."""
    return matrices[:, 0, 0] > 1e3


def raises(matrices):
    if is_bad(matrices).any():
        raise torch.linalg.LinAlgError("no convergence")
    return EIGH(matrices)


def spoils(change):
    def eigh(matrices):
        values, vectors = (part.clone() for part in EIGH(matrices))
        for i in is_bad(matrices).nonzero()[:, 0].tolist():
            change(values[i], vectors[i])
        return values, vectors

    return eigh


LIES = {
    "raises": raises,
    "infinite values": spoils(lambda d, q: d[-1:].fill_(torch.inf)),
    "infinite vectors": spoils(lambda d, q: q.fill_(-torch.inf)),
    "NaN": spoils(lambda d, q: q[0].fill_(torch.nan)),
    "a wrong value": spoils(lambda d, q: d[-1:].mul_(1 + 1e-9)),
    "a wrong vector": spoils(lambda d, q: q[:, 0].copy_(q[:, 1])),
    "not of unit length": spoils(lambda d, q: (q.mul_(2), d.div_(4))),
    "not ascending": spoils(lambda d, q: (d.copy_(d.flip(0)), q.copy_(q.flip(1)))),
}


def bad(seed, n=5):
    matrix = psd(seed, n, n)
    matrix[0, 0] += 1e4
    return matrix


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_one_bad_matrix_is_decomposed_by_other_means_and_named(lie, monkeypatch):
    """The others of its size are not."""
    monkeypatch.setattr(torch.linalg, "eigh", lie)
    by_scipy = []
    monkeypatch.setattr(scipy.linalg, "eigh", lambda m, driver: by_scipy.append(driver) or SCIPY_EIGH(m, driver=driver))
    matrices = [psd(0, 5, 5), bad(1), psd(2, 5, 5), psd(3, 7, 4)]
    with pytest.warns(UserWarning, match=r"wrong result for matrix 1\. scipy.*: matrix 1 \(evd\)\. ") as caught:
        parts = eigendecompose([(f"matrix {i}", matrix) for i, matrix in enumerate(matrices)])
    assert len(caught) == 1
    assert by_scipy == ["evd"]
    for matrix, part in zip(matrices, parts, strict=True):
        assert residual(matrix, part) < 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rows_dtype_and_layers_name_survive_the_way_around(dtype, monkeypatch):
    matrix = torch.zeros(8, 8, dtype=dtype)
    matrix[2:7, 2:7] = bad(0).to(dtype)
    block = KroneckerBlock(matrix[2:7, 2:7], matrix, name="0")
    same = [block, KroneckerBlock(matrix[2:7, 2:7], matrix, 2.0, name="0")]
    monkeypatch.setattr(torch.linalg, "eigh", raises)
    with pytest.warns(
        UserWarning, match="wrong result for the gradient factor of layer '0', the activation factor"
    ) as w:
        decompose(same)
    (message,) = (str(one.message) for one in w)
    assert "  " not in message
    assert "' ," not in message
    assert "' ." not in message
    for one in same:
        gradient, activation = one.eigen()
        assert activation.vectors.dtype == dtype
        eps = torch.finfo(dtype).eps / EPS
        assert residual(one.gradient_factor, type(gradient)(*(t[0] for t in gradient))) < 16 * eps
        assert residual(one.activation_factor, type(gradient)(*(t[0] for t in activation))) < 16 * eps


def test_the_drivers_are_tried_in_turn(monkeypatch):
    tried = []

    def eigh(matrix, driver):
        tried.append(driver)
        if driver == "evd":
            raise np.linalg.LinAlgError("no convergence")
        values, vectors = SCIPY_EIGH(matrix, driver=driver)
        return values + (driver == "evr"), vectors

    monkeypatch.setattr(torch.linalg, "eigh", raises)
    monkeypatch.setattr(scipy.linalg, "eigh", eigh)
    with pytest.warns(UserWarning, match=r"\(ev\)"):
        (part,) = eigendecompose([("m", bad(0))])
    assert tried == ["evd", "evr", "ev"]
    assert residual(bad(0), part) < 16


def test_if_all_fail_the_matrices_are_named(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", raises)
    monkeypatch.setattr(linalg, "_DRIVERS", ())
    blocks = [KroneckerBlock(bad(0), psd(1, 5, 5), name="0"), KroneckerBlock(psd(2, 5, 5), bad(3), name="1")]
    with pytest.raises(RuntimeError) as error:
        Tikhonov(1.0).invert_all({block.name: block for block in blocks})
    message = str(error.value)
    assert "no eigendecomposition of the gradient factor of layer '0', the activation factor of layer '1' in" in message
    assert 'the estimator "diagonal", which decomposes nothing' in message


def test_a_gradient_is_not_lost_silently(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", raises)
    with pytest.raises(RuntimeError, match="not tried for matrices that carry a gradient"):
        eigendecompose([("m", bad(0).requires_grad_())])


def test_without_failures_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eigendecompose([("m", psd(0, 30, 3))])


# -- rounding in sums of outer products -----------------------------------------------------------------------


def features(kind, n, p, generator):
    """Random inputs with two features that are equal; in one unit or in several."""
    x = torch.randn(n, p, generator=generator)
    x[:, 0] = x[:, -1]
    return x * (torch.logspace(0, 4, p) if kind == "several" else float(kind))


@pytest.mark.parametrize("kind", ["1", "1e2", "1e4", "several"])
@given(seed=st.integers(0, 1000), p=st.integers(3, 20), n=st.sampled_from([4, 30]), batches=st.sampled_from([1, 20]))
def test_eigenvalues_of_a_float32_sum_are_right_or_zero(kind, seed, p, n, batches):
    """Its rank is that of the sum in float64, where nothing is near rounding; the others are right in all their sizes."""
    generator = torch.Generator().manual_seed(seed)
    parts = [features(kind, n, p, generator) for _ in range(batches)]
    moment = torch.zeros(p, p)
    for x in parts:
        moment.addmm_(x.T, x)
    scaled = torch.cat(parts).double()
    singular = torch.linalg.svdvals(scaled)
    values = eigendecompose_moments([("m", moment)])[0].values.double().flip(0)
    rank = torch.linalg.matrix_rank(scaled / scaled.square().mean(0).sqrt(), rtol=1e-6)
    assert (values[rank:] == 0).all()
    clear = singular[:rank].square()
    unit = scaled / scaled.square().mean(0).sqrt()
    if torch.linalg.svdvals(unit)[rank - 1] > 0.03 * n**0.5:
        torch.testing.assert_close(values[:rank], clear, rtol=1e-2, atol=0)


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "exact"])
@pytest.mark.parametrize("n", [8, 100])
@pytest.mark.parametrize("kind", ["1", "1e2", "1e4", "several"])
def test_evidence_and_variances_in_float32_are_those_in_float64(kind, n, estimator):
    """At any prior precision, with features in any units and more weights than the data determine."""
    generator = torch.Generator().manual_seed(0)
    x, new = (features(kind, count, 12, generator) for count in (n, 6))
    labels = torch.arange(n) % 3
    torch.manual_seed(0)
    model = nn.Linear(12, 3)
    with torch.no_grad():
        model.weight /= x.abs().amax(0)
    single, double = model, copy.deepcopy(model).double()
    a = kl.KronLaplace(single, "classification", estimator).fit([(x, labels)])
    b = kl.KronLaplace(double, "classification", estimator).fit([(x.double(), labels)])
    for precision in (1e-8, 1e-4, 1.0, 1e4):
        evidence = [float(one.log_marginal_likelihood(precision)) for one in (a, b)]
        assert abs(evidence[0] - evidence[1]) < 1e-3
        a.prior_precision = b.prior_precision = precision
        variances = (
            a.functional_variance(new, diagonal=True).double(),
            b.functional_variance(new.double(), diagonal=True),
        )
        torch.testing.assert_close(*variances, rtol=1e-2, atol=0)


@pytest.mark.parametrize("call", ["covariance", "log_marginal_likelihood"])
@pytest.mark.parametrize(
    ("offset", "precision", "told"),
    [
        (0, 1e-8, False),  # the softmax makes zeros, which are right
        (1e3, 1.0, True),
        (1e3, 1e5, False),
    ],
)
def test_curvature_that_float32_does_not_resolve_is_told_of_once(offset, precision, told, call):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 60, generator=generator) + offset
    torch.manual_seed(0)
    model = nn.Linear(60, 3)
    with torch.no_grad():
        model.weight /= x.abs().max()
    labels = torch.arange(200) % 3
    posterior = kl.KronLaplace(model, "classification", prior_precision=precision).fit([(x, labels)])
    for time in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(posterior, call)()
        messages = [str(one.message) for one in caught]
        assert len(messages) == int(told and time == 0)
        for message in messages:
            assert message.startswith(
                "small eigenvalues of the model itself, though larger than the prior precision, are lost"
            )
            assert "Standardize the inputs" in message
    double = kl.KronLaplace(model.double(), "classification", prior_precision=precision).fit([(x.double(), labels)])
    getattr(double, call)()


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("rank", [0, 40, 64])
def test_the_sum_of_small_eigenvalues_is_kept(rank, uneven):
    """Below what float32 resolves all eigenvalues are their mean, or zero where there is none but rounding."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(500, rank, generator=generator).double() * 1e-3
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q[:rank]
    a = (x @ basis + 1) * (torch.logspace(0, 2, 64).double() if uneven else 1.0)
    exact = torch.linalg.eigvalsh(a.T @ a / 500)
    single = a.float()
    (part,) = eigendecompose_moments([("m", single.T @ single / 500)])
    values = part.values.double()
    assert values[-1] == pytest.approx(float(exact[-1]), rel=1e-5)
    assert values[1:-1].equal(values[:-2]) or uneven
    if rank:
        torch.testing.assert_close(values[:-1].sum(), exact[:-1].sum(), rtol=0.3, atol=0)
        assert part.unresolved > 0
    else:
        assert values[:-1].sum() <= 64 * EPS * values[-1] and part.unresolved == 0


@pytest.mark.parametrize("size", [1e-12, 1e-17, 1e-20, 1e-22, 1e-38])
def test_units_that_are_nearly_dead_do_not_blur_the_others(size):
    """Their moments underflow in float32, and a correlation of what is left means nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 30, generator=generator)
    x[:, ::2] *= size * torch.rand(15, generator=generator)
    (part,) = eigendecompose_moments([("m", x.T @ x / 300)])
    exact = torch.linalg.eigvalsh(x.double().T @ x.double() / 300)
    torch.testing.assert_close(part.values[15:].double(), exact[15:], rtol=1e-5, atol=0)
    assert part.values[14] < 1e-6 * part.values[15]


# -- matrices that torch.linalg.eigh fails on -----------------------------------------------------------------


@pytest.mark.quick(10)
@pytest.mark.parametrize("seed", range(30))
def test_a_posterior_of_sparse_inputs_is_fitted(seed):
    torch.manual_seed(seed)
    model = nn.Linear(432, 3)
    x = sparse_activations(seed)
    posterior = kl.KronLaplace(model, "classification").fit([(x, torch.arange(8) % 3)])
    assert torch.isfinite(posterior.functional_variance(x)).all()


@pytest.mark.slow
def test_200_sparse_matrices_of_low_rank():
    """The largest errors, of the decompositions with and without their zero rows."""
    worst = {"with zero rows": 0.0, "without": 0.0}
    for seed in range(200):
        a = torch.cat([sparse_activations(seed), torch.ones(8, 1)], dim=1)
        moment = a.T @ a / 8
        used = moment.any(1)
        for key, matrix in (("with zero rows", moment), ("without", moment[used][:, used])):
            (part,) = eigendecompose_symmetric([("m", matrix.double())])
            worst[key] = max(worst[key], residual(matrix, part))
    print("largest residuals of 200 matrices, in units of n eps:", worst)
    assert max(worst.values()) < 16
