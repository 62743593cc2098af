"""Solvers against dense float64 algebra: Cholesky, the fallback to float64, refusals, checkpoints."""

import copy
import math

import pytest
import torch
from hypothesis import given

from kronlaplace.blocks import KroneckerBlock
from kronlaplace.damping import (
    Damping,
    FactoredTikhonov,
    Tikhonov,
    TraceRestricted,
    cholesky,
    solver_from_tensors,
)
from tests.support.dampings import (
    BY_NUMBER,
    KINDS,
    RULES,
    STRATEGIES,
    as_dense,
    damped,
    dampings,
    dense,
    eye,
    groups,
    make,
    ranks,
    seeds,
    sizes,
)


class Relative(Damping):
    """A damping of a user's own, which has eigenvalues only."""

    def __init__(self, fraction):
        self.fraction = fraction

    def eigenvalues(self, block):
        values = block.eigenvalues()
        return values + self.fraction * (values.mean() + 1)


def solver(damping, block):
    return damping.solvers({"layer": block})["layer"]


def assert_solves(found, matrix, shape, rtol=1e-8):
    expected = torch.linalg.inv(matrix)
    close = {"rtol": rtol, "atol": rtol * float(expected.abs().max())}
    assert found.shape == shape
    torch.testing.assert_close(as_dense(found.solve, shape), expected, **close)
    torch.testing.assert_close(matrix @ as_dense(found.solve, shape), eye(len(matrix)), rtol=0, atol=1e-8)
    M = torch.randn(2, 3, *shape).double()
    torch.testing.assert_close(found.solve(M).flatten(2), M.flatten(2) @ expected, rtol=rtol, atol=10 * close["atol"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=seeds, r=sizes, p=sizes, k=groups, rank=ranks, damping=dampings)
def test_a_solver_is_the_inverse_of_the_dense_formula(strategy, kind, seed, r, p, k, rank, damping):
    block = make(kind, seed, r, p, k, rank)
    assert_solves(solver(strategy(damping), block), damped(strategy, block, damping), (k * r, p))


@pytest.mark.parametrize("kind", ["number", "by-group"])
@pytest.mark.parametrize("strategy", RULES)
def test_factored_dampings_of_kronecker_blocks_need_no_eigendecomposition(strategy, kind, decomposed):
    assert solver(strategy(0.1), make(kind, 0, k=2)).kind == "kronecker"
    assert decomposed == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [Tikhonov(0.3), Relative(0.3)], ids=["Tikhonov", "own"])
def test_all_others_solve_as_their_eigendecompositions(damping, kind):
    block = make(kind, 0, k=2)
    M = torch.randn(2, *block.shape).double()
    torch.testing.assert_close(solver(damping, block).solve(M), damping.invert(block).solve(M), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damping_of_every_weight_has_a_solver(kind):
    block = make(kind, 0)
    diagonal = torch.linspace(0.1, 1, 6).double().view(block.shape)
    assert_solves(solver(Tikhonov(diagonal), block), dense(block) + torch.diag(diagonal.flatten()), block.shape)


@pytest.mark.parametrize("strategy", BY_NUMBER)
@pytest.mark.parametrize("kind", KINDS)
def test_without_damping_a_regular_block_is_inverted_as_it_is(strategy, kind):
    block = make(kind, 0, k=2)
    assert_solves(solver(strategy(0.0), block), dense(block), block.shape)


def layers(dtype=torch.float32):
    """Layers of a few sizes, of which many are equal, with groups and with factors of all scales."""
    made = {}
    for i, (r, p, k) in enumerate([(3, 4, 1), (4, 3, 1), (3, 4, 2), (4, 4, 1), (3, 3, 3), (2, 4, 1)]):
        block = make("by-group", i, r, p, k, rank=2, dtype=dtype)
        made[f"{i}"] = block.scaled(10.0 ** (3 * i - 9))
    return made


@pytest.mark.parametrize("strategy", RULES)
def test_all_layers_at_once_are_as_each_by_itself(strategy, monkeypatch):
    calls, inverse = [], torch.cholesky_inverse
    monkeypatch.setattr(torch, "cholesky_inverse", lambda m: calls.append(tuple(m.shape)) or inverse(m))
    blocks = layers()
    together = strategy(0.1).solvers(blocks)
    assert sorted(calls) == [(1, 2, 2), (7, 4, 4), (10, 3, 3)]
    assert list(together) == list(blocks)
    for name, block in blocks.items():
        alone = solver(strategy(0.1), block)
        for key, tensor in alone.to_tensors().items():
            torch.testing.assert_close(
                together[name].to_tensors()[key], tensor, rtol=1e-5, atol=1e-6 * tensor.abs().max()
            )


@pytest.mark.parametrize("strategy", RULES)
@pytest.mark.parametrize("exponents", [(-30, -30), (-20, 20), (20, -20), (8, 8), (-37, 0)])
def test_no_scale_of_the_factors_overflows_in_single_precision(strategy, exponents):
    block = make("number", 0, dtype=torch.float32)
    G, A = (f * 10.0**e for f, e in zip((block.gradient_factor, block.activation_factor), exponents, strict=True))
    block = KroneckerBlock(G, A, 0.5, "layer")
    found, expected = (
        as_dense(lambda M: solver(strategy(1e-3), block).solve(M.float()), (3, 2)),
        damped(strategy, block, 1e-3),
    )
    expected = torch.linalg.inv(expected)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def ill_conditioned(n=40, smallest=1e-9):
    """A float32 factor whose eigenvalues are 1 and, but for the damping, 0."""
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)).double()).Q
    values = torch.where(torch.arange(n) < n // 2, 1.0, smallest).double()
    A = (Q * values) @ Q.T
    return KroneckerBlock(torch.eye(2), ((A + A.T) / 2).float(), 1.0, "layer")


def test_what_single_precision_cannot_invert_is_inverted_in_double(monkeypatch):
    block, damping = ill_conditioned(), FactoredTikhonov(1e-11)
    expected = torch.linalg.inv(damped(FactoredTikhonov, block, 1e-11))
    M = torch.randn(2, 40, generator=torch.Generator().manual_seed(1))
    expected = (expected @ M.double().flatten()).view(2, 40)

    def error():
        found = solver(damping, block).solve(M)
        assert found.dtype == torch.float32
        return torch.linalg.norm(found - expected) / torch.linalg.norm(expected)

    assert error() < 1e-4
    monkeypatch.setattr(cholesky, "_LARGEST_RESIDUAL", math.inf)
    assert not error() < 1e-2


@pytest.mark.parametrize("zero", [0, torch.tensor(0.0)])
@pytest.mark.parametrize("strategy", [FactoredTikhonov, TraceRestricted])
@pytest.mark.parametrize("kind", ["number", "tensor", "by-group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_blocks_need_a_damping(strategy, zero, kind, dtype, rank):
    good = make("number", 1, dtype=dtype)
    for seed in range(10):  # rounding makes about half of them positive definite
        with pytest.raises(ValueError, match="block of layer 'layer' is singular; use a damping larger than 0"):
            strategy(zero).solvers({"good": good, "layer": make(kind, seed, r=4, p=4, k=2, rank=rank, dtype=dtype)})


def test_a_damping_below_rounding_is_too_small():
    message = r"layer 'layer', damped by FactoredTikhonov\(1e-30\), is singular up to rounding; use a larger damping"
    with pytest.raises(ValueError, match=message):
        solver(FactoredTikhonov(1e-30), ill_conditioned(smallest=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_is_refused_with_the_layers_name(strategy, bad, kind):
    block = make(kind, 0)
    tensor = list(block.to_tensors().values())[-1 if kind in ("eigen", "diagonal") else 0]
    tensor[(0,) * tensor.ndim] = bad
    with pytest.raises(ValueError, match=r"NaN or infinite entries in .*layer 'layer'"):
        strategy(0.1).solvers({"other": make("number", 1), "layer": block})


def test_the_error_names_the_layer_that_failed_in_double_too():
    singular = make("number", 0, rank=0, dtype=torch.float32)
    singular.name, singular.scale = "other", singular.scale * math.nan
    with pytest.raises(ValueError, match="layer 'other'"):
        FactoredTikhonov(1e-11).solvers({"other": singular, "layer": ill_conditioned()})


def test_solvers_are_in_the_order_of_the_blocks():
    blocks = {kind: make(kind, 0) for kind in ("diagonal", "number", "dense", "tensor")}
    assert list(FactoredTikhonov(0.1).solvers(blocks)) == list(blocks)


@pytest.mark.parametrize("bad", ["fisher", make("number", 0), {"layer": 1}])
def test_solvers_are_of_blocks(bad):
    with pytest.raises(TypeError, match=r"(solvers|invert) takes a"):
        FactoredTikhonov(0.1).solvers(bad)


@pytest.mark.parametrize("kind", ["number", "eigen", "diagonal", "dense"])
def test_matrices_have_the_layers_shape(kind):
    with pytest.raises(ValueError, match=r"matrices for layer 'layer' must have shape \(\.\.\., 3, 2\).*got \(2, 3\)"):
        solver(FactoredTikhonov(0.1), make(kind, 0)).solve(torch.ones(2, 3).double())


@pytest.mark.parametrize("strategy", [Tikhonov, FactoredTikhonov])
@pytest.mark.parametrize("kind", ["by-group", "eigen", "diagonal", "dense"])
def test_a_solver_comes_back_from_its_tensors_bit_for_bit(kind, strategy):
    block = make(kind, 0, k=2, dtype=torch.float32)
    expected = solver(strategy(0.1), block)
    tensors = {name: tensor.clone() for name, tensor in expected.to_tensors().items()}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    again = solver_from_tensors(tensors, expected.kind, "layer")
    M = torch.randn(3, *block.shape)
    assert torch.equal(again.solve(M), expected.solve(M))
    assert (type(again), again.name, repr(again)) == (
        type(expected),
        "layer",
        f"{type(expected).__name__}('layer', 6x2)",
    )


def test_an_unknown_kind_of_solver_is_refused():
    with pytest.raises(ValueError, match=r"solver of layer 'layer' is of unknown kind 'none'; .* are \['kronecker'"):
        solver_from_tensors({}, "none", "layer")


def test_solvers_are_of_the_blocks_at_the_time_they_are_settled():
    blocks = layers()
    expected = FactoredTikhonov(0.1).solvers(copy.deepcopy(blocks))
    progress = FactoredTikhonov(0.1).begin_solvers(blocks)
    assert progress.ready()
    for name, found in progress.settle().items():
        for key, tensor in found.to_tensors().items():
            assert torch.equal(tensor, expected[name].to_tensors()[key])


def test_solvers_share_no_memory():
    """So that one that is kept does not keep all others."""
    found = FactoredTikhonov(0.1).solvers(layers())
    tensors = [tensor for one in found.values() for tensor in one.to_tensors().values()]
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in tensors)
