"""Every estimator against its slow definition on every network, and the laws that hold between estimators."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from kronlaplace.estimators import estimator_from_metadata
from tests.support import oracles
from tests.support.architectures import ARCHITECTURES
from tests.support.assertions import assert_blocks_are, assert_close, assert_no_worse, errors
from tests.support.cases import case
from tests.support.estimators import ADDITIVE, BASES, CONVERGED, CONVERGED_FULL, EVERYTHING, KRONECKER, TOLERANCE, TRACE
from tests.support.problems import NETWORKS, estimate, problem, several

pytestmark = pytest.mark.filterwarnings("ignore:sampling=.empirical.")


# -- definitions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", KRONECKER)
def test_kronecker_estimator_equals_its_definition(name, network):
    make, rule = KRONECKER[name]
    made, data = problem(network)
    fisher = estimate(made, make())
    assert fisher.n_examples == len(made.targets)
    assert_blocks_are(fisher, data, functools.partial(oracles.block_dense, rule), TOLERANCE.get(name, 1e-10))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["kfac", "kfac-reduce", "tkfac", "tkfac-uncorrelated"])
def test_each_factor_equals_its_definition(name, network):
    """With the scale where it belongs: K-FAC's is 1, TKFAC's factors have unit traces."""
    make, rule = KRONECKER[name]
    made, data = problem(network)
    fisher = estimate(made, make())
    for layer, d in data.items():
        if d.block.diagonal or not all(group.X.any() for group in d.groups):  # no direction to normalise by
            continue
        expected = [rule(group) for group in d.groups]
        scale, G, A = (torch.stack([torch.as_tensor(e[i]).double() for e in expected]) for i in range(3))
        block = fisher[layer]
        if d.block.groups == 1:
            assert_close(torch.as_tensor(block.scale).reshape(1), scale, 1e-10, layer)
            G, A = G[0], A[0]
        assert_close(block.gradient_factor, G, 1e-10, layer)
        assert_close(block.activation_factor, A, 1e-10, layer)


@pytest.mark.parametrize("network", NETWORKS)
def test_sua_equals_theorem_4(network):
    """On linear layers that are used once and on convolutions that are used once, with zero padding."""
    made, data = problem(network)
    fisher = estimate(made, kl.SUA())
    for name, d in data.items():
        if d.block.convolution and d.groups[0].images is None:
            continue
        if d.block.diagonal or (not d.block.convolution and d.groups[0].a.shape[1] > 1):
            continue
        assert_close(fisher[name].to_dense(), oracles.block_dense(oracles.sua, d), 1e-10, name)
        if d.block.groups == 1:
            scale, G, A = oracles.sua(d.groups[0])
            assert_close(fisher[name].activation_factor, A, 1e-10, name)
            assert_close(fisher[name].gradient_factor, G, 1e-10, name)
            assert_close(fisher[name].scale, scale, 1e-10, name)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("basis", BASES)
def test_ekfac_equals_its_definition(basis, network):
    make, rule = KRONECKER[basis]
    made, data = problem(network)
    fisher = estimate(made, kl.EKFAC(basis=make()))

    def dense(d):
        return torch.block_diag(*(oracles.ekfac(group, *rule(group)[1:]) for group in d.groups))

    assert_blocks_are(fisher, data, dense, 1e-9)


@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "lstm", "reused"])
@pytest.mark.parametrize("aggregation", ["full", "sweeps"])
def test_ekfac_uses_the_eigenbasis_of_any_kronecker_estimator(aggregation, network):
    """Of the same factors: those of K-FOC are converged to less than its eigenvectors would show."""
    made, data = problem(network)
    basis = kl.KFOC(aggregation=aggregation)
    factors = estimate(made, basis)
    fisher = estimate(made, kl.EKFAC(basis=basis))
    for name, d in data.items():
        if d.block.diagonal:
            continue
        G, A = (
            f.reshape(d.block.groups, *f.shape[-2:])
            for f in (factors[name].gradient_factor, factors[name].activation_factor)
        )
        expected = torch.block_diag(*(oracles.ekfac(*triple) for triple in zip(d.groups, G, A, strict=True)))
        assert_close(fisher[name].to_dense(), expected, 1e-8, name)


@pytest.mark.parametrize("network", NETWORKS)
def test_diagonal_equals_its_definition(network):
    made, data = problem(network)
    assert_blocks_are(estimate(made, kl.Diagonal()), data, lambda d: oracles.diagonal(d.X))


@pytest.mark.parametrize("network", NETWORKS)
def test_exact_block_equals_its_definition(network):
    """Also where a Kronecker block is block diagonal over groups, or diagonal: this one is the ground truth."""
    made, data = problem(network)
    fisher = estimate(made, kl.ExactBlock())
    assert list(fisher) == list(data)
    for name, d in data.items():
        if d.block.diagonal and isinstance(made.model.get_submodule(name), nn.Embedding):
            assert_close(fisher[name].to_dense().diagonal(), oracles.diagonal(d.X).diagonal(), 1e-10, name)
        else:
            assert_close(fisher[name].to_dense(), oracles.exact_block(d.X), 1e-10, name)


@pytest.mark.parametrize("likelihood", ["binary", "regression"])
@pytest.mark.parametrize("network", ["mlp", "depthwise", "lstm", "segmentation"])
@pytest.mark.parametrize("name", ["kfac", "kfac-reduce", "tkfac", "tkfac-uncorrelated"])
def test_other_likelihoods(name, network, likelihood):
    make, rule = KRONECKER[name]
    made, data = problem(network, likelihood)
    assert_blocks_are(estimate(made, make()), data, functools.partial(oracles.block_dense, rule))


@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "segmentation", "transformer", "gru", "tied"])
@pytest.mark.parametrize("name", KRONECKER)
def test_empirical_sampling_uses_the_gradients_of_the_labels(name, network):
    make, rule = KRONECKER[name]
    made, data = problem(network, empirical=True)
    fisher = estimate(made, make(), sampling="empirical")
    assert_blocks_are(fisher, data, functools.partial(oracles.block_dense, rule), TOLERANCE.get(name, 1e-10))


# -- K-FOC over batches --------------------------------------------------------------------------------------


def index_batches(made, size):
    return list(torch.arange(len(made.targets)).split(size))


BY_BATCH = {
    "running": ({"aggregation": "running"}, oracles.kfoc_running),
    "approx": ({"aggregation": "approx"}, oracles.kfoc_approx),
    "approx, other side": (
        {"aggregation": "approx", "unit_factor": "activation"},
        functools.partial(oracles.kfoc_approx, unit_factor="activation"),
    ),
}


@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "transformer", "gru", "reused"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("name", BY_BATCH)
def test_kfoc_merges_batches_by_its_definition(name, size, network):
    made, data = problem(network)
    options, rule = BY_BATCH[name]
    fisher = estimate(made, kl.KFOC(**options, **CONVERGED), size)

    def dense(d):
        return oracles.block_dense(lambda group: rule(group, index_batches(made, size)), d)

    assert_blocks_are(fisher, data, dense, 1e-8)


@pytest.mark.parametrize(("network", "size"), [("depthwise", 2), ("depthwise", 1), ("rnn_tanh", 2), ("tied", 2)])
def test_kfoc_running_equals_the_published_method(network, size):
    """Which needs batches of one size."""
    made, data = problem(network)
    assert len(made.targets) % size == 0
    fisher = estimate(made, kl.KFOC(aggregation="running", rank=1, **CONVERGED), size)

    def dense(d):
        return oracles.block_dense(lambda group: oracles.kfoc_published(group, index_batches(made, size)), d)

    assert_blocks_are(fisher, data, dense, 1e-7)


def test_merging_single_examples_needs_no_power_iteration():
    """One example of a plain layer is rank one; two Kronecker products are merged in closed form."""
    made, data = problem("mlp")
    fisher = estimate(made, kl.KFOC(aggregation="running", max_iter=1, init="normal"), 1)

    def dense(d):
        return oracles.block_dense(lambda group: oracles.kfoc_running(group, index_batches(made, 1)), d)

    assert_blocks_are(fisher, data, dense, 1e-10)


def test_running_forgets_nothing_if_its_rank_holds_every_example():
    made, data = problem("mlp")
    n = len(made.targets)
    fisher = estimate(made, kl.KFOC(aggregation="running", rank=n, **CONVERGED), 1)
    assert_blocks_are(fisher, data, functools.partial(oracles.block_dense, oracles.kfoc_full), 1e-8)


@pytest.mark.parametrize("sizes", [(1,) * 40, (10,) * 4, (1, 3, 8, 20, 2, 2, 8, 9, 1, 5)])
@pytest.mark.parametrize("rank", [2, 3])
def test_running_sums_of_several_terms_equal_their_definition(rank, sizes):
    made, rows, data = several(sizes)
    fisher = kl.estimate_fisher(
        made.model, data, made.likelihood, kl.KFOC(aggregation="running", rank=rank, **CONVERGED), sampling="exact"
    )
    for name, d in oracles.gradients(made.model, made.inputs, made.likelihood).items():
        expected = oracles.kfoc_running_sum(d.groups[0], rows, rank)
        assert_close(fisher[name].to_dense(), expected, 1e-7, name)


@pytest.mark.parametrize("aggregation", ["running", "full"])
def test_examples_that_wait_survive_a_loader_that_reuses_its_memory(aggregation):
    torch.manual_seed(0)
    made = case(nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(12, 4), 3)

    class Reuses:
        def __iter__(self):
            buffer = torch.empty_like(made.inputs[:3])
            for x, y in zip(made.inputs.split(3), made.targets.split(3), strict=True):
                yield buffer.copy_(x), y
            buffer.fill_(1000.0)

    estimator = kl.KFOC(aggregation=aggregation, **({"rank": 8} if aggregation == "running" else {}))
    fisher = kl.estimate_fisher(made.model, Reuses(), made.likelihood, estimator, sampling="exact")
    assert_close(fisher["0"].to_dense(), estimate(made, estimator, 3)["0"].to_dense(), 1e-10)


@pytest.mark.parametrize("size", [1, 10])
def test_approx_is_exact_where_the_block_is_a_kronecker_product(size):
    """With one output all examples have the same gradient factor, and only the published side keeps that."""
    made, _, _ = several((10,) * 4, outputs=1, likelihood="regression")
    data = oracles.gradients(made.model, made.inputs, "regression")
    published, other = (
        errors(estimate(made, kl.KFOC(aggregation="approx", unit_factor=side), size), data)["2"]
        for side in ("gradient", "activation")
    )
    assert published < 1e-10
    assert other > 1e-3


@pytest.mark.parametrize("options", [{}, {"unit_factor": "activation"}])
@pytest.mark.parametrize("sizes", [(3, 2, 4, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise"])
def test_batches_without_gradient_have_no_unit_factor(network, sizes, options):
    """Whether they come first, between others or last; the block is that of the others, over all examples."""
    made, _ = problem(network, "regression", empirical=True)
    torch.manual_seed(0)
    picked = torch.arange(sum(sizes)) % len(made.inputs)
    x, y = made.inputs[picked], torch.randn(sum(sizes), *made.targets.shape[1:], dtype=made.targets.dtype)
    data = list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))
    silent = [(part, made.model(part).detach()) for part, _ in data]  # batch by batch: to the last digit
    estimator = kl.KFOC(aggregation="approx", **options, **CONVERGED)

    def of(batches_):
        return kl.estimate_fisher(made.model, batches_, "regression", estimator, sampling="empirical")

    alone, mixed = of(data), of([silent[0], data[0], silent[2], silent[1], data[1], *data[2:], silent[3]])
    nothing = of(silent)
    for layer, block in alone.items():
        assert_close(2 * mixed[layer].to_dense(), block.to_dense(), 1e-9, layer)
        assert not nothing[layer].to_dense().any(), layer


def test_ignored_targets_have_no_unit_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(12, 2, 4).double(), torch.randint(3, (12, 2))
    data = list(zip(x.split(3), y.split(3), strict=True))
    ignored = [(a, torch.full_like(b, -100)) for a, b in data]
    fishers = [
        kl.estimate_fisher(model, batches_, "classification", kl.KFOC(aggregation="approx"), sampling="exact")
        for batches_ in (data, [ignored[0], *data, *ignored[1:]])
    ]
    for layer in fishers[0]:
        assert_close(2 * fishers[1][layer].to_dense(), fishers[0][layer].to_dense(), 1e-9, layer)


@pytest.mark.parametrize(
    "options", [{}, {"rank": 3}, {"aggregation": "approx"}, {"aggregation": "full"}, {"aggregation": "sweeps"}]
)
@pytest.mark.parametrize("size", [1, 7, 60])
def test_small_gradients_in_single_precision(options, size):
    """Their fourth powers are zeros: nothing may depend on those."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x, y = torch.randn(60, 4), torch.randn(60, 3)
    estimator = kl.KFOC(**{"aggregation": "running", **options})
    dense, small = (
        kl.estimate_fisher(
            model,
            list(zip(x.split(size), targets.split(size), strict=True)),
            "regression",
            estimator,
            sampling="empirical",
        )["0"].to_dense()
        for targets in (y, 1e-12 * y)
    )
    assert_close(small.double() * 1e24, dense.double(), 1e-3)


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"aggregation": "full"}, {"aggregation": "sweeps", "sweeps": 5}])
@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rotated", [False, True])
def test_any_of_several_equally_good_products_will_do(options, positions, size, rotated):
    """Three orthogonal examples count the same: rounding chooses the leading singular pair, if anything does."""
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    a = basis if rotated else torch.eye(3).double()
    x = a if positions == 1 else torch.stack([a, torch.zeros(3, 3).double()], dim=1)
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    data = list(zip(x.split(size), x.split(size), strict=True))  # the gradients are the inputs
    estimator = kl.KFOC(**{"aggregation": "running", **options})
    fisher = kl.estimate_fisher(model, data, "regression", estimator, sampling="empirical")
    exact = oracles.exact_block((a.unsqueeze(2) * a.unsqueeze(1)).unsqueeze(1))
    assert oracles.error(fisher["0"].to_dense(), exact) <= (2 / 3) ** 0.5 + 1e-7


@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("name", [name for name in EVERYTHING if name.startswith("kfoc") and "one" not in name])
def test_what_overflows_is_refused_with_the_name_of_the_layer(name, size):
    made = case(nn.Sequential(nn.Linear(3, 2)), torch.randn(6, 3), 2, "regression")
    made.model.float()
    x, y = made.inputs.float(), made.targets.float()
    x[1] = 1e30
    data = list(zip(x.split(size), y.split(size), strict=True))
    with pytest.raises(ValueError, match=r"NaN or infinite entries in .* of layer '0'"):
        kl.estimate_fisher(made.model, data, "regression", EVERYTHING[name](), sampling="exact")


@pytest.mark.parametrize("aggregation", ["sweeps", "running", "full"])
def test_a_unit_factor_without_effect_is_refused(aggregation):
    with pytest.raises(ValueError, match=r"unit_factor='activation' only applies when aggregation=\"approx\""):
        kl.KFOC(aggregation=aggregation, unit_factor="activation")


def test_an_unknown_unit_factor_is_refused():
    with pytest.raises(ValueError, match="unknown unit_factor 'input'; allowed are 'gradient', 'activation'"):
        kl.KFOC(aggregation="approx", unit_factor="input")


@pytest.mark.parametrize("unit_factor", ["gradient", "activation"])
def test_the_unit_factor_comes_back_from_a_file(unit_factor, tmp_path):
    made, _ = problem("mlp")
    estimator = kl.KFOC(aggregation="approx", unit_factor=unit_factor)
    estimate(made, estimator).save(tmp_path / "fisher.safetensors")
    settings = kl.KroneckerFisher.load(tmp_path / "fisher.safetensors").metadata.settings
    assert settings["unit_factor"] == unit_factor
    assert estimator_from_metadata(settings) == estimator


@pytest.mark.parametrize("aggregation", ["approx", "running", "full"])
def test_start_of_the_power_iteration_does_not_matter(aggregation):
    made, _ = problem("cnn")
    options = CONVERGED_FULL if aggregation == "full" else CONVERGED
    first, second = (
        estimate(made, kl.KFOC(aggregation=aggregation, init=init, **options), 3) for init in ("identity", "normal")
    )
    for name in first:
        assert_close(second[name].to_dense(), first[name].to_dense(), 1e-8, name)


@pytest.mark.parametrize("aggregation", ["approx", "running"])
def test_with_one_batch_there_is_nothing_to_merge(aggregation):
    made, data = problem("cnn")
    fisher = estimate(made, kl.KFOC(aggregation=aggregation, **CONVERGED), 100)
    assert_blocks_are(fisher, data, functools.partial(oracles.block_dense, oracles.kfoc_full), 1e-8)


@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "rnn_relu", "transformer"])
def test_sweeps_converge_to_the_best_possible(network):
    made, data = problem(network)
    many = errors(estimate(made, kl.KFOC(aggregation="sweeps", sweeps=25)), data)
    best = {name: oracles.block_dense(oracles.kfoc_full, data[name]) for name in many}
    best = {name: oracles.error(dense, oracles.exact_block(data[name].X)) for name, dense in best.items()}
    assert_no_worse(many, best, factor=1.0005)


def regression_network(activation=nn.ReLU, n=120, likelihood="classification", outputs=3):
    return case(
        nn.Sequential(nn.Linear(5, 12), activation(), nn.Linear(12, outputs)), torch.randn(n, 5), outputs, likelihood
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("likelihood", "outputs"), [("regression", 1), ("classification", 3)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_two_sweeps_are_within_half_a_percent_of_the_best_possible(activation, likelihood, outputs, seed):
    """On ordinary networks with ordinary amounts of data (on a few examples of a tiny network they need not be)."""
    torch.manual_seed(seed)
    made = regression_network(activation, 120, likelihood, outputs)
    data = oracles.gradients(made.model, made.inputs, likelihood)
    two = errors(estimate(made, kl.KFOC(aggregation="sweeps", sweeps=2), 50), data)
    best = {
        n: oracles.error(oracles.block_dense(oracles.kfoc_full, data[n]), oracles.exact_block(data[n].X)) for n in two
    }
    assert_no_worse(two, best, factor=1.005)
    assert_no_worse(best, two)


# -- laws ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    torch.manual_seed(1)
    return regression_network()


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


@settings(max_examples=30)
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


@settings(max_examples=15)
@given(networks())
def test_ekfac_is_never_worse_than_its_basis(made):
    """Its eigenvalues are the best possible in that basis."""
    data = oracles.gradients(made.model, made.inputs, made.likelihood)
    for basis in (kl.KFAC(), kl.TKFAC(), kl.SUA(), kl.KFOC(aggregation="full")):
        assert_no_worse(errors(estimate(made, kl.EKFAC(basis=basis)), data), errors(estimate(made, basis), data))


@settings(max_examples=15)
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

    with pytest.raises(ValueError, match="the data came in another order than in the first pass"):
        kl.estimate_fisher(made.model, Shuffled(), made.likelihood, kl.KFOC())
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
