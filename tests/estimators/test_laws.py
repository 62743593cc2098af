"""Laws that hold for every estimator, and between estimators."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.architectures import ARCHITECTURES
from tests.support.assertions import assert_close, assert_no_worse, errors
from tests.support.cases import case
from tests.support.estimators import ADDITIVE, EVERYTHING, TRACE
from tests.support.problems import NETWORKS, estimate, problem, regression_network
from tests.support.tiers import examples

pytestmark = pytest.mark.filterwarnings("ignore:sampling=.empirical.")


@pytest.fixture(scope="module")
def many():
    torch.manual_seed(1)
    return regression_network()


@pytest.mark.quick(1)
@pytest.mark.parametrize("sampling", ["exact", "empirical"])
@pytest.mark.parametrize("name", ADDITIVE)
def test_neither_size_nor_order_of_batches_matters(name, sampling, many):
    n = len(many.targets)
    whole = estimate(many, ADDITIVE[name](), n, sampling=sampling)
    rtol = 1e-8 if "kfoc" in name else 1e-10
    for size, order in [(1, torch.randperm(n)), (10, None), (100, torch.arange(n).flip(0))]:
        parts = estimate(many, ADDITIVE[name](), size, order, sampling)
        for layer in whole:
            assert_close(parts[layer].to_dense(), whole[layer].to_dense(), rtol, (layer, size))


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", ARCHITECTURES)
@pytest.mark.parametrize("name", ["kfac", "kfac-reduce", "tkfac", "sua", "kfoc-sweeps", "diagonal"])
def test_neither_size_nor_order_of_batches_matters_in_any_architecture(name, network):
    made, _ = problem(network)
    whole = estimate(made, ADDITIVE[name](), 100)
    parts = estimate(made, ADDITIVE[name](), 1, torch.arange(len(made.targets)).flip(0))
    for layer in whole:
        assert_close(parts[layer].to_dense(), whole[layer].to_dense(), 1e-9, layer)


def assert_positive_semidefinite(matrices, where):
    assert_close(matrices.mT, matrices, 1e-12, where)
    values = torch.linalg.eigvalsh(matrices)
    assert (values >= -1e-11 * values.abs().amax(-1, keepdim=True)).all(), where


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "transformer", "lstm", "language_model"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_blocks_and_factors_are_positive_semidefinite(name, network):
    made, data = problem(network)
    fisher = estimate(made, EVERYTHING[name](), 2)
    for layer, block in fisher.items():
        assert_positive_semidefinite(block.to_dense(), layer)
        if data[layer].block.diagonal or name in ("diagonal", "exact") or name.startswith("ekfac"):
            continue
        assert (torch.as_tensor(block.scale) >= 0).all()
        assert_positive_semidefinite(block.gradient_factor, layer)
        assert_positive_semidefinite(block.activation_factor, layer)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", TRACE)
def test_trace_is_that_of_the_fisher(name, network):
    made, data = problem(network)
    fisher = estimate(made, TRACE[name]())
    for layer, d in data.items():
        torch.testing.assert_close(fisher[layer].trace(), oracles.exact_block(d.X).trace(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("network", ["mlp", "tied", "cells"])
def test_both_spatial_rules_agree_where_nothing_is_shared(network):
    made, data = problem(network)
    exact, uncorrelated = estimate(made, kl.TKFAC()), estimate(made, kl.TKFAC(spatial="uncorrelated"))
    for name, d in data.items():
        if not d.block.diagonal and d.groups[0].a.shape[1] == 1:
            assert_close(uncorrelated[name].to_dense(), exact[name].to_dense(), 1e-12, name)


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", ["mlp", "cnn", "transformer", "gru"])
def test_every_pass_and_every_estimator_sees_the_same_draws(network):
    """Estimators with the Fisher's trace agree on it in Monte Carlo sampling, also if they pass over the data twice."""
    made, _ = problem(network)
    options = {"sampling": "mc", "mc_samples": 2, "seed": 5}
    fishers = {name: estimate(made, make(), **options) for name, make in TRACE.items()}
    for layer, block in fishers["exact"].items():
        for fisher in fishers.values():
            torch.testing.assert_close(fisher[layer].trace(), block.trace(), rtol=1e-10, atol=1e-14)
        assert_close(fishers["kfoc-one-sweep"][layer].to_dense(), fishers["tkfac"][layer].to_dense(), 1e-10, layer)


@st.composite
def networks(draw):
    """A small network of one of several kinds with a few examples."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(["mlp", "convolutions", "grouped", "tokens", "recurrent"]))
    n, hidden, outputs = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(2, 3))
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh]))()
    likelihood = draw(st.sampled_from(["classification", "binary", "regression"]))
    if kind == "mlp":
        model, shape = nn.Sequential(nn.Linear(3, hidden), activation, nn.Linear(hidden, outputs)), (3,)
    elif kind == "tokens":
        model, shape = nn.Sequential(nn.Linear(2, hidden), activation, nn.Flatten(), nn.LazyLinear(outputs)), (3, 2)
    elif kind == "recurrent":
        model, shape = nn.Sequential(nn.GRU(2, hidden, batch_first=True), Last(), nn.Linear(hidden, outputs)), (3, 2)
    else:
        groups = 2 if kind == "grouped" else 1
        convolution = nn.Conv2d(2, 2 * hidden, 2, padding=1, groups=groups)
        model, shape = nn.Sequential(convolution, activation, nn.Flatten(), nn.LazyLinear(outputs)), (2, 3, 2)
    x = torch.randn(n, *shape).double()
    model.double()(x)
    return case(model, x, outputs, likelihood)


class Last(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]


@settings(max_examples=examples(30))
@given(networks(), st.integers(1, 4))
def test_kfoc_is_never_worse_than_kfac_and_tkfac(made, size):
    data = oracles.gradients(made.model, made.inputs, made.likelihood)
    rivals = [
        errors(estimate(made, rival, size), data)
        for rival in (
            kl.KFAC(),
            kl.KFAC(weight_sharing="reduce"),
            kl.TKFAC(),
            kl.TKFAC(spatial="uncorrelated"),
            kl.SUA(),
        )
    ]
    full = errors(estimate(made, kl.KFOC(aggregation="full"), size), data)
    assert_no_worse(full, *rivals)
    assert_no_worse(errors(estimate(made, kl.KFOC(aggregation="sweeps"), size), data), *rivals, factor=1.005)
    assert_no_worse(full, errors(estimate(made, kl.KFOC(aggregation="running"), size), data))


@settings(max_examples=examples(15))
@given(networks())
def test_ekfac_is_never_worse_than_its_basis(made):
    """Its eigenvalues are the best possible in that basis."""
    data = oracles.gradients(made.model, made.inputs, made.likelihood)
    for basis in (kl.KFAC(), kl.TKFAC(), kl.SUA(), kl.KFOC(aggregation="full")):
        assert_no_worse(errors(estimate(made, kl.EKFAC(basis=basis)), data), errors(estimate(made, basis), data))


@settings(max_examples=examples(15))
@given(networks())
def test_tkfac_keeps_the_trace_of_drawn_networks(made):
    fisher = estimate(made, kl.TKFAC())
    for name, d in oracles.gradients(made.model, made.inputs, made.likelihood).items():
        torch.testing.assert_close(fisher[name].trace(), oracles.exact_block(d.X).trace(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("network", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_saturated_network_gives_zeros_and_not_nan(name, network):
    """Where every gradient vanishes there is no direction to normalise by."""
    torch.manual_seed(0)
    made = NETWORKS[network]()
    with torch.no_grad():
        for parameter in list(made.model.children())[-1].parameters():
            parameter.zero_()
    fisher = estimate(made, EVERYTHING[name]())
    for layer, block in list(fisher.items())[:-1]:
        dense = block.to_dense()
        assert torch.equal(dense, torch.zeros_like(dense)), layer


@pytest.mark.quick(1)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["kfoc", "ekfac"])
def test_shuffled_loaders_give_every_pass_the_same_draws(name, own):
    """Labels are drawn by batch: in another order an example would have other labels in every pass."""
    made = case(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(60, 3), 2)
    generator = torch.Generator().manual_seed(3) if own else None
    state = generator.get_state() if own else torch.get_rng_state()
    dataset = torch.utils.data.TensorDataset(made.inputs, made.targets)
    loader = torch.utils.data.DataLoader(dataset, batch_size=7, shuffle=True, generator=generator)
    fisher = kl.estimate_fisher(made.model, loader, made.likelihood, name)
    assert torch.equal(generator.get_state() if own else torch.get_rng_state(), state)
    order = list(loader)  # from the same state: the order that every pass has seen
    expected = kl.estimate_fisher(made.model, order, made.likelihood, name)
    for layer, block in fisher.items():
        assert_close(block.to_dense(), expected[layer].to_dense(), 1e-8, layer)


def test_data_in_another_order_in_the_second_pass_is_refused():
    made = case(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(60, 3), 2)
    orders = []

    class Shuffled:
        def __iter__(self):
            orders.append(np.random.default_rng(len(orders)).permutation(60))
            return iter([(made.inputs[rows], made.targets[rows]) for rows in np.array_split(orders[-1], 4)])

    with pytest.raises(ValueError, match="the data came in a different order than in the first pass"):
        kl.estimate_fisher(made.model, Shuffled(), made.likelihood, kl.KFOC(), sampling="mc")
    kl.estimate_fisher(made.model, Shuffled(), made.likelihood, kl.KFOC(), sampling="exact")


@pytest.mark.parametrize("rank", [1, 3])
def test_a_batch_that_has_nothing_in_common_with_those_before_still_counts(rank):
    """A first batch of zeros, then inputs that no batch before has had."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
    x = torch.randn(40, 6).double()
    batches_ = [torch.zeros(14, 6).double(), torch.cat([x[:, :3], torch.zeros(40, 3).double()], dim=1)]
    batches_.append(5 * torch.cat([torch.zeros(40, 3).double(), x[:, 3:]], dim=1))
    fisher = kl.estimate_fisher(
        model, batches_, "regression", kl.KFOC(aggregation="running", rank=rank), sampling="exact"
    )
    exact = kl.estimate_fisher(model, batches_, "regression", kl.KFAC(), sampling="exact")
    assert oracles.error(fisher["0"].to_dense(), exact["0"].to_dense()) < (0.1 if rank == 1 else 1e-6)
