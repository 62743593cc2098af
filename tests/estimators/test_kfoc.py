"""K-FOC: batches are merged by its definition, and no product is better."""

import functools

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.estimators import estimator_from_json
from tests.support import oracles
from tests.support.assertions import assert_blocks_are, assert_close, assert_no_worse, errors
from tests.support.cases import case
from tests.support.estimators import CONVERGED, CONVERGED_FULL, EVERYTHING
from tests.support.problems import estimate, problem, regression_network, several

pytestmark = pytest.mark.filterwarnings("ignore:sampling=.empirical.")


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


@pytest.mark.quick(2)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(2)
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
    assert estimator_from_json(settings) == estimator


@pytest.mark.quick(2)
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


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "rnn_relu", "transformer"])
def test_sweeps_converge_to_the_best_possible(network):
    made, data = problem(network)
    many = errors(estimate(made, kl.KFOC(aggregation="sweeps", sweeps=25)), data)
    best = {name: oracles.block_dense(oracles.kfoc_full, data[name]) for name in many}
    best = {name: oracles.error(dense, oracles.exact_block(data[name].X)) for name, dense in best.items()}
    assert_no_worse(many, best, factor=1.0005)


@pytest.mark.grid
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
