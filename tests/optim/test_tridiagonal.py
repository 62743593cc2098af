"""The block-tridiagonal inverse is the inverse of the dense ``F̂`` of K-FAC section 3.3."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.blocks import KroneckerBlock
from kronlaplace.optim.chain_accumulation import CrossMoments
from kronlaplace.optim.tridiagonal import TridiagonalInverse
from tests.support.assertions import assert_close
from tests.support.chains import SIZES, blocks_of, chain, damped, dense_fisher, moments, unit_matrices

DAMPINGS = [1.0, 1e-3]


def inputs(sizes, n=30):
    return torch.randn(n, sizes[0]).double()


def made(sizes, bias=True, n=30, dtype=torch.float64):
    return blocks_of(*moments(chain(sizes, bias), inputs(sizes, n)), dtype)


def dense_inverse(inverse, blocks):
    """``F̂⁻¹`` as a matrix, column by column."""
    matrices, columns = unit_matrices(blocks)
    return columns(inverse.solve(matrices))


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_is_the_inverse_of_the_dense_fisher(sizes, bias, damping):
    blocks, cross = made(sizes, bias)
    inverse = dense_inverse(TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(damping)), blocks)
    fisher = dense_fisher(blocks, cross, damping)
    assert_close(inverse @ fisher, torch.eye(len(fisher)).double(), 1e-8)


def test_the_dense_fisher_is_what_the_paper_defines():
    """It agrees with the moments next to the diagonal, and its inverse is block-tridiagonal; so the oracle is right."""
    blocks, cross = made((4, 3, 2, 3))
    precision = torch.linalg.inv(dense_fisher(blocks, cross, 0.1))
    sizes = [b.shape[0] * b.shape[1] for b in blocks]
    rows = [part.split(sizes, 1) for part in precision.split(sizes)]
    assert rows[0][2].abs().max() < 1e-12 * precision.abs().max() < rows[0][1].abs().max()


def test_undamped():
    """With as many outputs as units, the last gradients do not determine the others."""
    blocks, cross = made((3, 3, 3, 3), n=60)
    inverse = dense_inverse(TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(0.0)), blocks)
    expected = torch.linalg.inv(dense_fisher(blocks, cross, 0.0))
    assert_close(inverse, expected, 1e-7)


def test_printed_products():
    """``U_i = V_i − Ψ^G V_{i+1} Ψ^Aᵀ``, then ``Σ⁻¹``, then ``U_i = V_i − Ψ^Gᵀ V_{i−1} Ψ^A``, as the paper prints them."""
    blocks, cross = made((4, 3, 5, 2))
    factors = [damped(block, 0.1) for block in blocks]
    maps = [
        (link.gradient @ torch.linalg.inv(gradient), link.activation @ torch.linalg.inv(activation))
        for link, (gradient, activation) in zip(cross, factors[1:], strict=True)
    ]
    given = {b.name: torch.randn(*b.shape).double() for b in blocks}
    v = list(given.values())
    u = [v[i] - maps[i][0] @ v[i + 1] @ maps[i][1].T for i in range(2)] + [v[2]]
    for i, (gradient, activation) in enumerate(factors):
        covariance = torch.kron(gradient, activation)
        if i < 2:
            (psi_g, psi_a), (next_g, next_a) = maps[i], factors[i + 1]
            covariance = covariance - torch.kron(psi_g @ next_g @ psi_g.T, psi_a @ next_a @ psi_a.T)
        u[i] = torch.linalg.solve(covariance, u[i].flatten()).view_as(u[i])
    expected = [u[0]] + [u[i] - maps[i - 1][0].T @ u[i - 1] @ maps[i - 1][1] for i in (1, 2)]
    solved = TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(0.1)).solve(given)
    for found, correct in zip(solved.values(), expected, strict=True):
        assert_close(found, correct, 1e-10)


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    log_damping=st.floats(-8, 2),
    n=st.integers(1, 20),
)
def test_conditional_covariances_exceed_the_damping(seed, sizes, log_damping, n):
    """``Σ ⪰ γ I``, so that the inverse is positive definite with no eigenvalue of any ``Σ⁻¹`` above ``1/γ``."""
    torch.manual_seed(seed)
    damping = 10**log_damping
    blocks, cross = made(sizes, n=n)
    inverse = TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(damping))
    for i, block in enumerate(blocks):
        # As if layer i were the first of its chain, Ξ does not reach it: a vector in layer 0 passes Λ and Ξᵀ only.
        part = TridiagonalInverse(blocks[i:], cross[i:], kl.damping.FactoredTikhonov(damping))
        matrices = {
            b.name: torch.zeros(b.shape[0] * b.shape[1] if b is block else 1, *b.shape).double() for b in blocks[i:]
        }
        matrices = {b.name: torch.zeros(block.shape[0] * block.shape[1], *b.shape).double() for b in blocks[i:]}
        matrices[block.name] = torch.eye(block.shape[0] * block.shape[1]).double().unflatten(1, block.shape)
        values = torch.linalg.eigvalsh(part.solve(matrices)[block.name].flatten(1))
        assert values[0] > 0
        assert values[-1] <= (1 + 1e-6) / damping
    values = torch.linalg.eigvalsh(dense_inverse(inverse, blocks))
    assert values[0] > 0


def test_without_correlation_it_is_block_diagonal():
    blocks, cross = made((4, 3, 2))
    zero = [CrossMoments(torch.zeros_like(a), torch.zeros_like(g)) for a, g in cross]
    matrices = {b.name: torch.randn(*b.shape).double() for b in blocks}
    damping = kl.damping.FactoredTikhonov(0.1)
    solved = TridiagonalInverse(blocks, zero, damping).solve(matrices)
    for block in blocks:
        assert_close(solved[block.name], damping.invert(block).solve(matrices[block.name]), 1e-12)


def test_determined_layers_are_damped():
    """Without activations, each gradient is a function of the next one: only the damping keeps correlations below 1."""
    torch.manual_seed(0)
    model = chain((3, 4, 4), bias=False, activation=torch.nn.Identity)
    blocks, cross = blocks_of(*moments(model, inputs((3,))))
    for damping, tolerance in ((1e-4, 1e-6), (1e-10, 1e-2)):
        inverse = dense_inverse(TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(damping)), blocks)
        fisher = dense_fisher(blocks, cross, damping)
        assert_close(inverse @ fisher, torch.eye(len(fisher)).double(), tolerance)


def test_determined_layers_need_damping():
    torch.manual_seed(0)
    model = chain((3, 3, 3), bias=False, activation=torch.nn.Identity)
    blocks, cross = blocks_of(*moments(model, inputs((3,))))
    with pytest.raises(ValueError, match="'1' determine those of layer '0'"):
        TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(0.0))


def test_rounding_is_bounded_by_the_damping():
    """Moments that are rounded, so that adjacent layers correlate too much, are inverted as if they were not."""
    torch.manual_seed(0)
    model = chain((6, 8, 8), bias=False, activation=torch.nn.Identity)
    blocks, cross = blocks_of(*moments(model, inputs((6,), 5)), torch.float32)
    cross = [CrossMoments(1.001 * a, 1.001 * g) for a, g in cross]
    inverse = TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(1e-8))
    matrices, columns = unit_matrices(blocks)
    matrix = columns(inverse.solve({name: m.float() for name, m in matrices.items()})).double()
    assert torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0] > -1e-5 * matrix.abs().max()


# -- dampings, checkpoints, refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("damping", [kl.damping.FactoredTikhonov(0.1), kl.damping.TraceRestricted(0.1)])
def test_every_damping_of_factors(damping, scale):
    """The blocks on the diagonal are damped as ever, and those next to it are ``√(scale scale') · G ⊗ A``."""
    blocks, cross = made((4, 3, 2))
    blocks = [KroneckerBlock(b.gradient_factor, b.activation_factor, scale, b.name) for b in blocks]
    diagonal = [torch.linalg.inv(dense_solve(damping.invert(b), b)) for b in blocks]
    off = scale * torch.kron(cross[0].gradient, cross[0].activation)
    fisher = torch.cat([torch.cat([diagonal[0], off], 1), torch.cat([off.T, diagonal[1]], 1)])
    assert_close(dense_inverse(TridiagonalInverse(blocks, cross, damping), blocks), torch.linalg.inv(fisher), 1e-8)


def dense_solve(inverse, block):
    n = block.shape[0] * block.shape[1]
    return inverse.solve(torch.eye(n).double().unflatten(1, block.shape)).flatten(1)


def test_a_damping_for_each_layer():
    blocks, cross = made((4, 3, 2))
    dampings = [kl.damping.FactoredTikhonov(0.1), kl.damping.FactoredTikhonov(0.3)]
    diagonal = [torch.kron(*damped(block, float(d.damping))) for block, d in zip(blocks, dampings, strict=True)]
    off = torch.kron(cross[0].gradient, cross[0].activation)
    fisher = torch.cat([torch.cat([diagonal[0], off], 1), torch.cat([off.T, diagonal[1]], 1)])
    assert_close(dense_inverse(TridiagonalInverse(blocks, cross, dampings), blocks), torch.linalg.inv(fisher), 1e-8)


def test_an_automatic_damping_keeps_correlations():
    """TKFAC's automatic damping expands small blocks, and the blocks next to them with them."""
    blocks, cross = made((4, 3, 2))
    damping = kl.damping.TraceRestrictedAuto(1e3)
    values = torch.linalg.eigvalsh(dense_inverse(TridiagonalInverse(blocks, cross, damping), blocks))
    assert values[0] > 0


def test_the_dtype_is_that_of_the_blocks():
    blocks, cross = made((6, 5, 4), dtype=torch.float32)
    damping = kl.damping.FactoredTikhonov(1e-2)
    matrices = {b.name: torch.randn(2, *b.shape) for b in blocks}
    solved = TridiagonalInverse(blocks, cross, damping).solve(matrices)
    in_double = [KroneckerBlock(b.gradient_factor.double(), b.activation_factor.double(), name=b.name) for b in blocks]
    links = [CrossMoments(*(moment.double() for moment in link)) for link in cross]
    expected = TridiagonalInverse(in_double, links, damping).solve({name: m.double() for name, m in matrices.items()})
    for name, matrix in solved.items():
        assert matrix.dtype == torch.float32
        assert_close(matrix.double(), expected[name], 1e-5)


def test_a_checkpoint_solves_to_the_bit():
    blocks, cross = made((4, 3, 2), dtype=torch.float32)
    inverse = TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(0.1))
    again = TridiagonalInverse.from_tensors(inverse.to_tensors())
    matrices = {b.name: torch.randn(*b.shape) for b in blocks}
    for found, expected in zip(again.solve(matrices).values(), inverse.solve(matrices).values(), strict=True):
        assert torch.equal(found, expected)


def test_indefinite_moments():
    """A moment that rounding has made more indefinite than its damping is taken without its negative eigenvalues."""
    blocks, cross = made((4, 3, 2))
    values, vectors = torch.linalg.eigh(blocks[0].activation_factor)
    values[0] = -0.01
    moment, clean = ((vectors * v) @ vectors.T for v in (values, values.clamp_min(0)))
    damping = kl.damping.TraceRestricted(1e-6)
    found, expected = (
        dense_inverse(
            TridiagonalInverse([KroneckerBlock(blocks[0].gradient_factor, m, name="0"), blocks[1]], cross, damping),
            blocks,
        )
        for m in (moment, clean)
    )
    assert_close(found, expected, 1e-2)  # the traces differ a little


def test_singular_blocks_need_damping():
    blocks, cross = made((4, 3, 2), n=2)
    with pytest.raises(ValueError, match="layer '0' is singular; use a damping larger than 0"):
        TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(0.0))


def test_nan_is_refused():
    blocks, cross = made((4, 3, 2))
    blocks[1].gradient_factor[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite entries in the gradient factor of layer '1'"):
        TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(0.1))


def test_exact_damping_is_refused():
    blocks, cross = made((4, 3, 2))
    with pytest.raises(
        TypeError, match=r"needs a damping of each factor, such as kl.damping.FactoredTikhonov\(...\); got"
    ):
        TridiagonalInverse(blocks, cross, kl.damping.Tikhonov(0.1))


def test_moments_that_do_not_fit_are_refused():
    blocks, cross = made((4, 3, 2))
    damping = kl.damping.FactoredTikhonov(0.1)
    with pytest.raises(ValueError, match="2 layers have 1 moments between them, got 0"):
        TridiagonalInverse(blocks, [], damping)
    with pytest.raises(ValueError, match="between the layers '0' and '1' must have the shapes"):
        TridiagonalInverse(blocks, [CrossMoments(cross[0].gradient, cross[0].activation)], damping)


def test_matrices_that_do_not_fit_are_refused():
    blocks, cross = made((4, 3, 2))
    inverse = TridiagonalInverse(blocks, cross, kl.damping.FactoredTikhonov(0.1))
    with pytest.raises(ValueError, match=r"solve needs matrices for the layers \['0', '1'\], got \['0'\]"):
        inverse.solve({"0": torch.zeros(3, 5).double()})
    with pytest.raises(ValueError, match=r"layer '1' must have the shape \(..., 2, 4\)"):
        inverse.solve({"0": torch.zeros(3, 5).double(), "1": torch.zeros(4, 2).double()})
