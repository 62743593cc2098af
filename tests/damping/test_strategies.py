"""Damped inverses against dense algebra: every strategy on every kind of block, dampings of single weights, refusals."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks import KroneckerBlock, block_from_tensors
from kronlaplace.damping import Tikhonov, TraceRestrictedAuto
from tests.support.cases import case
from tests.support.dampings import (
    BY_NUMBER,
    KINDS,
    STRATEGIES,
    assert_is_inverse_of,
    damped,
    dampings,
    dense,
    eye,
    groups,
    make,
    ranks,
    seeds,
    sizes,
    triples,
)
from tests.support.networks import cnn

# -- one number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=seeds, r=sizes, p=sizes, k=groups, rank=ranks, damping=dampings, as_tensor=st.booleans())
def test_every_answer_is_that_of_the_dense_formula(strategy, kind, seed, r, p, k, rank, damping, as_tensor):
    """Also for blocks without full rank, down to zero."""
    block = make(kind, seed, r, p, k, rank)
    given_damping = (
        torch.tensor(damping, dtype=torch.float64) if as_tensor and strategy is not TraceRestrictedAuto else damping
    )
    inverse = strategy(given_damping).invert(block)
    assert_is_inverse_of(inverse, damped(strategy, block, damping), (k * r, p))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(seed=seeds, k=groups, a=st.floats(1e-3, 1e3), b=st.floats(1e-3, 1e3), damping=dampings)
def test_how_a_scalar_is_split_between_scale_and_factors_does_not_matter(strategy, seed, k, a, b, damping):
    block = make("by-group", seed, k=k)
    other = KroneckerBlock(a * block.gradient_factor, b * block.activation_factor, block.scale / (a * b))
    expected, actual = (strategy(damping).invert(one) for one in (block, other))
    M = torch.randn(2, *block.shape).double()
    torch.testing.assert_close(actual.solve(M), expected.solve(M), rtol=1e-8, atol=1e-8 * float(expected.weights.max()))
    torch.testing.assert_close(actual.logdet(), expected.logdet(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", BY_NUMBER)
def test_without_damping_a_regular_block_is_inverted_as_it_is(strategy, kind):
    block = make(kind, 0, k=2)
    assert_is_inverse_of(strategy(0.0).invert(block), dense(block), block.shape)
    nearly = strategy(1e-24).invert(block)
    torch.testing.assert_close(nearly.eigenvalues, block.eigenvalues(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["by-group", "eigen", "diagonal", "dense"])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("strategy", BY_NUMBER)
def test_logdet_is_differentiable_in_damping_and_scale(strategy, rank, kind):
    block = make(kind, 0, k=2, rank=rank)
    at = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 2.0)]
    assert torch.autograd.gradcheck(lambda g, s: strategy(g).invert(block.scaled(s)).logdet(), at)
    M = torch.randn(2, *block.shape).double()
    assert torch.autograd.gradcheck(lambda g, s: strategy(g).invert(block.scaled(s)).sqrt_solve(M), at)


# -- decompositions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_of_damping_makes_no_new_decomposition(kind, decomposed):
    block = make(kind, 0, k=2)
    Tikhonov(1.0).invert(block)
    decomposed.clear()
    for strategy in STRATEGIES:
        for one in (block, block.scaled(3.0)):
            inverse = strategy(0.1).invert(one)
            inverse.solve(torch.randn(one.shape).double()), inverse.logdet(), inverse.diagonal()
    assert decomposed == []


@pytest.mark.parametrize("estimator", ["tkfac", "exact", "ekfac"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_whole_fisher_is_decomposed_in_one_call_for_every_size(strategy, estimator, decomposed):
    made = cnn()
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, estimator)
    decomposed.clear()
    inverses = strategy(0.1).invert_all(fisher)
    assert list(inverses) == list(fisher)
    shapes = [block.shape for block in fisher.values()]
    numbers = {"tkfac": [n for shape in shapes for n in shape], "exact": map(math.prod, shapes), "ekfac": []}
    assert sorted(decomposed) == sorted((count, n, n) for n, count in Counter(numbers[estimator]).items())


# -- TKFAC's automatic damping -------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Convolutions, one of them with groups, a normalisation, linear layers, and a layer whose gradient is zero."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 2)
        self.grouped = nn.Conv2d(4, 4, 2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.hidden = nn.Linear(4, 5)
        self.dead = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.norm(self.grouped(torch.tanh(self.first(x))))).mean((2, 3))
        return self.head(torch.tanh(self.hidden(x) + 0 * self.dead(x)))


@pytest.mark.quick(2)
@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_automatic_damping_of_a_network_equals_eq_5_16_and_5_17(quantile):
    """Convolutions get max(ν, δ), all others max(ν, β δ) with β = max max(ν, δ) / δ over the Kronecker layers."""
    made = case(Mixed(), torch.randn(6, 1, 4, 4), 3)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "tkfac", sampling="exact")
    kronecker = [block for block in fisher.values() if isinstance(block, KroneckerBlock)]
    traces = torch.stack([s * G.trace() * A.trace() for block in kronecker for s, G, A in triples(block)])
    traces = traces[traces > 0]
    assert (len(kronecker), len(traces)) == (5, 5)  # two groups, and a layer without a gradient
    minimum = float(traces.quantile(quantile)) * 1.01
    beta = float((traces.clamp_min(minimum) / traces).max())
    assert beta > 1
    inverses = TraceRestrictedAuto(minimum).invert_all(fisher)
    assert list(inverses) == list(fisher) == ["first", "grouped", "norm", "hidden", "dead", "head"]
    for name, block in fisher.items():
        expansion = 1.0 if name in ("first", "grouped") else beta
        matrix = damped(TraceRestrictedAuto, block, minimum, expansion=expansion)
        assert_is_inverse_of(inverses[name], matrix, block.shape)
    for name, block in fisher.items():  # blocks without a network: each by itself
        alone = block_from_tensors(
            block.kind, {k: t for k, t in block.to_tensors().items() if k != "least_trace"}, name
        )
        plain = TraceRestrictedAuto(minimum).invert(alone)
        assert_is_inverse_of(plain, damped(TraceRestrictedAuto, block, minimum), block.shape)


@pytest.mark.quick(3)
@pytest.mark.parametrize("estimator", ["tkfac", "kfac", "ekfac", "exact"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layer_is_damped_the_same_alone_in_a_dict_and_in_its_network(strategy, estimator, tmp_path):
    """To the bit, also where some layers are left out, and after a file."""
    made = case(Mixed(), torch.randn(6, 1, 4, 4), 3)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, estimator, sampling="exact")
    damping = strategy(float(fisher["first"].trace()) * 3)
    fisher.decompose()
    fisher.save(tmp_path / "fisher")
    fisher.restricted_to(["grouped", "head"]).save(tmp_path / "some")
    expected = damping.invert_all(fisher)
    others = {
        "one by one": {name: damping.invert(block) for name, block in fisher.items()},
        "dict": damping.invert_all(dict(fisher)),
        "some": damping.invert_all(fisher.restricted_to(["head", "hidden"])),
        "some in a dict": damping.invert_all({"head": fisher["head"]}),
    }
    for inverses in others.values():
        for name, inverse in inverses.items():
            assert torch.equal(inverse.eigenvalues, expected[name].eigenvalues)
    for file in ("fisher", "some"):
        for name, inverse in damping.invert_all(kl.KroneckerFisher.load(tmp_path / file)).items():
            torch.testing.assert_close(inverse.eigenvalues, expected[name].eigenvalues, rtol=1e-9, atol=1e-15)


def test_a_file_without_least_traces_is_damped_as_the_network():
    """As files of earlier versions are."""
    made = case(Mixed(), torch.randn(6, 1, 4, 4), 3)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "tkfac", sampling="exact")
    tensors = {name: tensor for name, tensor in fisher.to_tensors().items() if not name.endswith("least_trace")}
    assert len(tensors) < len(fisher.to_tensors())
    old = kl.KroneckerFisher.from_tensors(tensors, fisher.to_json())
    damping = TraceRestrictedAuto(float(fisher["first"].trace()) * 3)
    for name, inverse in damping.invert_all(old).items():
        torch.testing.assert_close(inverse.eigenvalues, damping.invert(fisher[name]).eigenvalues, rtol=1e-9, atol=1e-15)


def test_a_layer_with_a_gradient_of_rounding_expands_no_other():
    made = case(Mixed(), torch.randn(6, 1, 4, 4), 3)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "tkfac", sampling="exact")
    noisy = dict(fisher) | {"dead": KroneckerBlock(1e-36 * eye(5), eye(5), name="dead")}
    known = fisher["head"].least_trace
    for block in noisy.values():
        block.least_trace = None
    noisy = kl.KroneckerFisher(noisy, fisher.n_examples, fisher.metadata)
    torch.testing.assert_close(noisy["head"].least_trace, known)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fisher_of_zeros_is_damped_all_the_same(strategy):
    made = case(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)), torch.zeros(3, 1, 3, 3), 3)
    nn.init.zeros_(made.model[2].weight)
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "tkfac", layers=["0"])
    assert fisher["0"].trace() == 0
    inverse = strategy(0.1).invert_all(fisher)["0"]
    expected = 0.1**2 / (2 * 5) if strategy is TraceRestrictedAuto else 0.1
    torch.testing.assert_close(inverse.eigenvalues, torch.full((2, 5), expected).double())
