"""Sums of Kronecker products replaced by fewer, against the singular value decomposition of the rearranged dense matrix."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.estimators.kfoc.nearest import merged_to
from tests.support.continual import best_rank, close


def psd(n, rank, generator):
    x = torch.randn(n, rank, generator=generator).double()
    return x @ x.mT


def products(seed, m=4, q=3, p=5, rank=2, groups=None):
    """Positive semidefinite products, singular if ``rank`` is small, of sizes that differ."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if groups is None else (groups,)

    def factor(n):
        made = [psd(n, rank, generator) for _ in range(groups or 1)]
        return torch.stack(made) if lead else made[0]

    return [kl.KroneckerBlock(factor(q), factor(p), 0.5**i, name="layer") for i in range(m)]


def dense(blocks):
    return sum(block.to_dense() for block in ([blocks] if isinstance(blocks, kl.Block) else blocks))


def least(matrix):
    """The smallest eigenvalue relative to the largest."""
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0] / values[-1])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_best_of_its_rank(seed, rank):
    blocks = products(seed)
    close(dense(kl.nearest_kronecker(blocks, rank)), best_rank(dense(blocks), 3, 5, rank))


def test_as_many_products_as_there_are_is_the_sum():
    blocks = products(0, m=3)
    for rank in (3, 7):
        found = kl.nearest_kronecker(blocks, rank)
        assert len(found) == 3
        close(dense(found), dense(blocks))


def test_each_group_of_rows_has_its_own():
    blocks = products(0, groups=2)
    found = kl.nearest_kronecker(blocks)
    for k in range(2):
        single = [kl.KroneckerBlock(b.gradient_factor[k], b.activation_factor[k], b.scale) for b in blocks]
        expected = best_rank(dense(single), 3, 5, 1)
        close(torch.kron(found.scale[k] * found.gradient_factor[k], found.activation_factor[k]), expected)


def test_one_block_is_itself():
    (block,) = products(0, m=1)
    close(kl.nearest_kronecker([block]).to_dense(), block.to_dense())


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 3), st.integers(1, 3))
def test_everything_kept_is_positive_semidefinite(seed, m, factor_rank, rank):
    blocks = products(seed, m=m, rank=factor_rank)
    single = kl.nearest_kronecker(blocks)
    assert min(least(single.gradient_factor), least(single.activation_factor)) > -1e-12
    for block in merged_to(blocks, rank):
        assert float(block.scale) > 0
        assert min(least(block.gradient_factor), least(block.activation_factor)) > -1e-12


def test_the_truncated_decomposition_itself_is_not():
    """The reason why a memory is merged pair by pair."""
    found = [least(dense(kl.nearest_kronecker(products(seed, m=6), 2))) for seed in range(10)]
    assert min(found) < -1e-3


@pytest.mark.parametrize("seed", range(5))
def test_the_pair_that_loses_least_is_merged(seed):
    blocks = products(seed, m=4)
    total = dense(blocks)

    def after(i, j):
        pair = best_rank(blocks[i].to_dense() + blocks[j].to_dense(), 3, 5, 1)
        return pair + sum(b.to_dense() for k, b in enumerate(blocks) if k not in (i, j))

    best = min((after(i, j) for i, j in combinations(range(4), 2)), key=lambda kept: float((total - kept).norm()))
    found = merged_to(blocks, 3)
    assert len(found) == 3
    close(dense(found), best)


@pytest.mark.parametrize("side", ["gradient_factor", "activation_factor"])
def test_products_that_share_a_factor_are_merged_without_loss(side):
    """However much their other factors differ, and however alike those of others are."""
    generator = torch.Generator().manual_seed(0)
    shared, other, one, two = (psd(4, 2, generator) for _ in range(4))
    nearly = one + 1e-2 * torch.eye(4).double()
    pairs = [(shared, one), (shared, two), (other, nearly)]
    if side == "activation_factor":
        pairs = [(second, first) for first, second in pairs]
    blocks = [kl.KroneckerBlock(g, a) for g, a in pairs]
    close(dense(merged_to(blocks, 2)), dense(blocks))


def test_single_precision_keeps_small_numbers():
    blocks = [b.scaled(1e-30).to("cpu", torch.float32) for b in products(0)]
    expected = best_rank(dense(products(0)), 3, 5, 1)
    close(dense(kl.nearest_kronecker(blocks)).double() * 1e30, expected, rtol=1e-5)


def test_bad_arguments():
    blocks = products(0)
    with pytest.raises(ValueError, match="there are no blocks"):
        kl.nearest_kronecker([])
    with pytest.raises(TypeError, match="must be a list of Kronecker blocks, got a KroneckerBlock"):
        kl.nearest_kronecker(blocks[0])
    with pytest.raises(TypeError, match="got a DiagonalBlock"):
        kl.nearest_kronecker([*blocks, kl.DiagonalBlock(torch.ones(3, 5))])
    with pytest.raises(ValueError, match="factors of the same shapes"):
        kl.nearest_kronecker([*blocks, *products(0, q=4)])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        kl.nearest_kronecker(blocks, 0)
