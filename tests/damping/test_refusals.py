"""Dampings and blocks that cannot be inverted are refused by name."""

import math
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks import DiagonalBlock
from kronlaplace.damping import FactoredTikhonov, Tikhonov, TraceRestricted, TraceRestrictedAuto
from tests.support.dampings import BY_NUMBER, KINDS, STRATEGIES, dense, groups, make, seeds, sizes


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, torch.tensor(-1.0), torch.ones(1), torch.ones(3), "1"])
@pytest.mark.parametrize("strategy", BY_NUMBER)
def test_damping_is_one_finite_number(strategy, bad):
    with pytest.raises(ValueError, match="damping must be a single finite number that is not negative, got"):
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
    with pytest.raises(ValueError, match="damping must be a single finite number"):
        strategy(torch.ones(3, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (3, 1), (6, 1)])
def test_dampings_of_another_shape_are_refused_with_the_layers_name(shape, kind):
    message = r"damping of layer 'layer' must be a single number or have shape \(3, 2\).*got shape"
    with pytest.raises(ValueError, match=message):
        Tikhonov(torch.ones(shape)).invert(make(kind, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "damping",
    [Tikhonov(torch.zeros(3, 2)), *(strategy(zero) for strategy in BY_NUMBER for zero in (0, torch.tensor(0.0)))],
)
def test_singular_blocks_need_a_damping(damping, kind):
    with pytest.raises(ValueError, match="block of layer 'layer' is singular; use a damping larger than 0"):
        damping.invert(make(kind, 0, rank=0))


def output_layer(seed, estimator, dtype=torch.float64):
    """The Fisher of a softmax output layer: a shift of all logits changes nothing, so its blocks are singular."""
    torch.manual_seed(seed)
    q, p = 2 + seed % 5, 1 + seed % 4
    model, x = nn.Linear(p, q).to(dtype), (torch.randn(50, p) * 10.0 ** (seed % 3)).to(dtype)
    return kl.estimate_fisher(model, [x], "classification", estimator, sampling="exact")


@pytest.mark.quick(1)
@pytest.mark.parametrize("estimator", ["exact", "kfac", "tkfac", "ekfac"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_softmax_output_layer_is_refused_in_every_draw(dtype, estimator):
    """Rounding makes its eigenvalues of zero positive in about every other draw."""
    for seed in range(60) if estimator == "exact" else range(0, 60, 7):
        fisher = output_layer(seed, estimator, dtype)
        (block,) = fisher.values()
        for damping in (Tikhonov(0), FactoredTikhonov(0), TraceRestricted(0), Tikhonov(torch.zeros(block.shape))):
            for invert, what in ((damping.invert, block), (damping.invert_all, fisher)):
                with pytest.raises(ValueError, match="block of layer '' is singular; use a damping larger than 0"):
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
    if kind not in ("eigen", "diagonal", "truncated", "coordinates"):  # to make these decomposes
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
