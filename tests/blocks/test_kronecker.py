"""Algebra of the blocks and of the Fisher against dense matrices; the damped inverse; files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import kronlaplace as kl
from kronlaplace.blocks.eigendecomposition import eigendecompose
from tests.support.networks import CASES, cnn, mlp


def random_block(q, p, seed=0, scale=0.7, rank=None):
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(q, rank or q, generator=generator).double()
    A = torch.randn(p, rank or p, generator=generator).double()
    return kl.KroneckerBlock(G @ G.T, A @ A.T, scale, "layer")


sizes = st.integers(1, 5)


@given(sizes, sizes, st.integers(0, 100), st.floats(0.1, 10))
def test_block_algebra_equals_dense(q, p, seed, scale):
    block = random_block(q, p, seed, scale)
    dense = scale * torch.kron(block.gradient_factor, block.activation_factor)
    M = torch.randn(3, q, p).double()
    torch.testing.assert_close(block.to_dense(), dense)
    torch.testing.assert_close(block.matmul(M).flatten(1), M.flatten(1) @ dense.T)
    torch.testing.assert_close(block.trace(), dense.trace())
    torch.testing.assert_close(block.frobenius_norm(), torch.linalg.norm(dense))
    torch.testing.assert_close(block.scaled(3.0).to_dense(), 3 * dense)


@given(sizes, sizes, st.integers(0, 100), st.floats(1e-6, 100), st.sampled_from([None, 1]))
def test_damped_inverse_equals_dense(q, p, seed, damping, rank):
    block = random_block(q, p, seed, rank=rank)
    dense = block.to_dense() + damping * torch.eye(q * p).double()
    inverse = kl.damping.Tikhonov(damping).invert(block)
    M = torch.randn(2, q, p).double()
    # The damped matrix times its inverse is the identity, to what its condition number leaves of float64.
    tolerance = 1e-13 * float(torch.linalg.cond(dense))
    identity = (inverse.solve(M).flatten(1) @ dense).reshape(M.shape)
    torch.testing.assert_close(identity, M, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse.sqrt_solve(inverse.sqrt_solve(M)), inverse.solve(M))
    torch.testing.assert_close(inverse.logdet(), torch.logdet(dense), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(inverse.diagonal().flatten(), torch.linalg.inv(dense).diagonal(), rtol=1e-6, atol=0)
    assert (
        torch.linalg.eigvalsh(dense) - inverse.eigenvalues.flatten().sort().values
    ).abs().max() < 1e-9 * dense.trace()


def test_new_damping_needs_no_new_decomposition(monkeypatch):
    block = random_block(4, 3)
    kl.damping.Tikhonov(1.0).invert(block)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    kl.damping.Tikhonov(2.0).invert(block)
    kl.damping.Tikhonov(2.0).invert(block.scaled(5.0))


def test_equal_shapes_are_decomposed_in_one_call(monkeypatch):
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: calls.append(m.shape) or eigh(m))
    matrices = [random_block(n, n, i).gradient_factor for i, n in enumerate([3, 4, 3, 3])]
    result = eigendecompose([(str(i), matrix) for i, matrix in enumerate(matrices)])
    assert sorted(calls) == [(1, 4, 4), (3, 3, 3)]
    for matrix, (values, vectors, _) in zip(matrices, result, strict=True):
        torch.testing.assert_close(vectors * values @ vectors.T, matrix)


def test_rounding_is_taken_out_before_and_after_a_decomposition():
    """The symmetric part is decomposed, not one triangle; eigenvalues below zero by rounding are zero."""
    matrix = random_block(4, 4).gradient_factor
    skew = torch.triu(torch.full((4, 4), 1e-3).double(), 1)
    values, vectors, _ = eigendecompose([("m", matrix + skew)])[0]
    torch.testing.assert_close(vectors * values @ vectors.T, matrix + (skew + skew.T) / 2)
    rank_one = torch.outer(*2 * [torch.randn(40).double()])
    assert torch.linalg.eigvalsh(rank_one).min() < 0
    assert eigendecompose([("m", rank_one)])[0].values.min() == 0


def test_logdet_is_differentiable_in_the_damping():
    block, gamma = random_block(3, 2), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: kl.damping.Tikhonov(g).invert(block).logdet(), gamma)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_damping_must_be_finite_and_not_negative(damping):
    with pytest.raises(ValueError, match="damping must be a single finite number that is not negative, got"):
        kl.damping.Tikhonov(damping).invert(random_block(2, 2))


def test_singular_block_without_damping_is_refused():
    with pytest.raises(ValueError, match="block of layer 'layer' is singular; use a damping larger than 0"):
        kl.damping.Tikhonov(0.0).invert(random_block(3, 3, rank=1))


def test_factor_with_nan_is_refused_with_the_layers_name():
    block = random_block(2, 3)
    block.activation_factor[0, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite entries in the activation factor of layer 'layer'"):
        kl.damping.Tikhonov(1.0).invert(block)


@pytest.fixture
def fisher():
    case = cnn()
    return kl.estimate_fisher(case.model, case.batches(), "classification", sampling="mc", mc_samples=2, seed=3)


def test_fisher_algebra_equals_dense(fisher):
    dense = torch.block_diag(*(block.to_dense() for block in fisher.values()))
    torch.testing.assert_close(fisher.to_dense(), dense)
    torch.testing.assert_close(fisher.trace(), dense.trace())
    torch.testing.assert_close(fisher.frobenius_norm(), torch.linalg.norm(dense))
    v = torch.randn(2, len(dense)).double()
    torch.testing.assert_close(fisher.matmul(v), v @ dense)
    matrices = {name: torch.randn(block.shape).double() for name, block in fisher.items()}
    flat = torch.cat([m.flatten() for m in matrices.values()])
    joined = torch.cat([m.flatten() for m in fisher.matmul(matrices).values()])
    torch.testing.assert_close(joined, dense @ flat)


def test_fisher_matmul_refuses_what_does_not_fit(fisher):
    with pytest.raises(ValueError, match=r"vectors must have shape \(\.\.\., 96\), got \(5,\)"):
        fisher.matmul(torch.zeros(5))
    with pytest.raises(ValueError, match="vectors must have one entry per layer"):
        fisher.matmul({"0": torch.zeros(3, 19)})
    with pytest.raises(KeyError, match="no block for layer '7'; there are blocks for"):
        fisher["7"]


@pytest.mark.parametrize("network", CASES)
def test_factors_are_symmetric_and_positive_semidefinite(network):
    case = CASES[network]()
    fisher = kl.estimate_fisher(case.model, case.batches(), "classification", layers=case.layers)
    for block in fisher.values():
        for factor in (block.gradient_factor, block.activation_factor):
            torch.testing.assert_close(factor, factor.T, rtol=1e-12, atol=1e-15)
            assert torch.linalg.eigvalsh(factor).min() > -1e-12 * factor.trace()


def test_save_and_load(fisher, tmp_path):
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    loaded = kl.KroneckerFisher.load(path)
    assert loaded.metadata == fisher.metadata
    assert loaded.n_examples == fisher.n_examples
    assert list(loaded) == list(fisher)
    assert torch.equal(loaded.statistics, fisher.statistics)
    for name in fisher:
        assert torch.equal(loaded[name].gradient_factor, fisher[name].gradient_factor)
        assert torch.equal(loaded[name].activation_factor, fisher[name].activation_factor)
        assert torch.equal(loaded[name].scale, fisher[name].scale)
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_or_foreign_files_are_refused(fisher, tmp_path):
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:4], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            kl.KroneckerFisher.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="kronlaplace did not write it"):
        kl.KroneckerFisher.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        kl.KroneckerFisher.load(tmp_path / "nothing")
    case = mlp()
    kl.KronLaplace(case.model, "classification").fit(case.batches()).save(path)
    with pytest.raises(ValueError, match="holds a posterior, not a fisher"):
        kl.KroneckerFisher.load(path)


def test_failed_save_leaves_the_old_file(fisher, tmp_path, monkeypatch):
    path = tmp_path / "fisher.safetensors"
    fisher.save(path)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("kronlaplace._storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        fisher.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_moving_keeps_what_is_known_of_the_layer():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 2)).eval()
    fisher = kl.estimate_fisher(model, [torch.randn(4, 2, 3, 3)], "classification")
    for block in fisher.values():
        moved = block.to("cpu", torch.float64)
        assert moved.dtype == torch.float64
        assert moved.name == block.name
        assert moved.shares_weights_over_space is block.shares_weights_over_space
        assert (moved.least_trace is None) == (block.least_trace is None)
        torch.testing.assert_close(moved.to_dense(), block.to_dense().double(), rtol=1e-6, atol=1e-9)
