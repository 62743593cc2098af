"""Sums over batches: halves of the data merge to the whole, moving averages are what they say, passes are counted."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.batches import Inputs
from kronlaplace.curvature_pass import accumulate, accumulate_batch
from kronlaplace.forward import NetworkForward
from kronlaplace.layers import find_layers
from kronlaplace.likelihoods import Sampling, resolve_likelihood
from kronlaplace.likelihoods.sampling import DirectionSampling
from tests import oracles
from tests.architectures import case
from tests.test_estimators import CONVERGED, CONVERGED_FULL, assert_close, batches, estimate, problem, several

NETWORKS = ["mlp", "cnn", "depthwise", "transformer", "lstm", "norms", "reused", "language_model"]
ONE_PASS = {
    "kfac": lambda: kl.KFAC(),
    "kfac-reduce": lambda: kl.KFAC(weight_sharing="reduce"),
    "sua": lambda: kl.SUA(),
    "tkfac": lambda: kl.TKFAC(),
    "tkfac-uncorrelated": lambda: kl.TKFAC(spatial="uncorrelated"),
    "kfoc-one-sweep": lambda: kl.KFOC(sweeps=1),
    "kfoc-full": lambda: kl.KFOC(aggregation="full", **CONVERGED_FULL),
    "diagonal": lambda: kl.Diagonal(),
    "exact": lambda: kl.ExactBlock(),
}
SEVERAL_PASSES = {
    "kfoc": lambda: kl.KFOC(),
    "kfoc-three-sweeps": lambda: kl.KFOC(sweeps=3),
    "ekfac": lambda: kl.EKFAC(),
    "ekfac-kfoc": lambda: kl.EKFAC(basis=kl.KFOC()),
}
BY_BATCH = {
    "kfoc-running": lambda: kl.KFOC(aggregation="running", **CONVERGED),
    "kfoc-running-rank-3": lambda: kl.KFOC(aggregation="running", rank=3, **CONVERGED),
    "kfoc-approx": lambda: kl.KFOC(aggregation="approx", **CONVERGED),
    "kfoc-approx-other-side": lambda: kl.KFOC(aggregation="approx", unit_factor="activation", **CONVERGED),
}
ALL = {**ONE_PASS, **SEVERAL_PASSES, **BY_BATCH}


def accumulated(made, estimator, data):
    """What the public driver makes of some batches, by the parts it is made of."""
    accumulation = kl.Accumulation(estimator, find_layers(made.model))
    accumulate(
        made.model,
        data,
        resolve_likelihood(made.likelihood),
        accumulation,
        DirectionSampling(Sampling.EXACT),
        progress=False,
        description="",
    )
    return accumulation


def one_pass(accumulation, made, data):
    """The same, one pass only, written out."""
    likelihood = resolve_likelihood(made.likelihood)
    with NetworkForward(made.model, accumulation.layers) as forward:
        for x, y in data:
            f = forward(Inputs(x))
            accumulate_batch(
                forward.observer, f, likelihood, DirectionSampling(Sampling.EXACT), accumulation, targets=y
            )


def assert_same(blocks, expected, rtol=1e-10):
    assert list(blocks) == list(expected)
    for name, block in blocks.items():
        assert_close(block.to_dense(), expected[name].to_dense(), rtol, name)


def tolerance(name):
    return 1e-8 if "kfoc" in name else 1e-10


# -- merging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ONE_PASS)
def test_two_parts_merge_to_the_whole(name, network):
    made, _ = problem(network)
    first, *rest = batches(made, 1)
    one, other = accumulated(made, ONE_PASS[name](), [first]), accumulated(made, ONE_PASS[name](), rest)
    one.merge(other)
    assert one.weight == len(made.targets)
    assert_same(one.finish(), estimate(made, ONE_PASS[name]()), tolerance(name))


@pytest.mark.parametrize("name", ONE_PASS)
def test_merging_is_associative_and_nothing_is_its_neutral_element(name):
    made, _ = problem("cnn")
    empty = [kl.Accumulation(ONE_PASS[name](), find_layers(made.model)) for _ in range(2)]
    parts = [accumulated(made, ONE_PASS[name](), [batch]) for batch in batches(made, 1)]
    middle = parts[1]
    middle.merge(parts[2])
    middle.merge(parts[3])
    total = empty[0]
    for part in (parts[0], middle, empty[1], parts[4]):
        total.merge(part)
    assert_same(total.finish(), estimate(made, ONE_PASS[name]()), tolerance(name))


@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "gru"])
@pytest.mark.parametrize("rank", [1, 3])
def test_merging_running_sums_equals_appending(rank, network):
    """A sum of one batch is its best rank one, and that is what a running sum appends."""
    made, _ = problem(network)

    def estimator():
        return kl.KFOC(aggregation="running", rank=rank, **CONVERGED)

    parts = [accumulated(made, estimator(), [batch]) for batch in batches(made, 2)]
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    assert_same(total.finish(), estimate(made, estimator()), 1e-7)


def test_merging_with_a_running_sum_that_has_seen_nothing():
    made, _ = problem("mlp")
    empty = kl.Accumulation(kl.KFOC(aggregation="running"), find_layers(made.model))
    full = accumulated(made, kl.KFOC(aggregation="running"), batches(made))
    expected = copy.deepcopy(full).finish()
    empty.merge(full)
    empty.merge(kl.Accumulation(kl.KFOC(aggregation="running"), find_layers(made.model)))
    assert_same(empty.finish(), expected)


@pytest.mark.parametrize("name", ["kfoc-approx", "kfoc-approx-other-side"])
def test_merging_batches_whose_factors_are_added(name):
    made, _ = problem("cnn")
    first, *rest = batches(made, 2)
    one, other = (
        accumulated(made, BY_BATCH[name](), [first]),
        accumulated(made, BY_BATCH[name](), rest),
    )
    one.merge(other)
    assert_same(one.finish(), estimate(made, BY_BATCH[name]()), 1e-7)


@pytest.mark.parametrize("splits", [(1, 2), (3, 7), (7, 8)])
def test_merging_running_sums_with_examples_that_wait(splits):
    """With two outputs the last layer's block has three terms at most: a running sum of rank three loses nothing."""
    made, _, data = several((1, 3, 8, 12, 2, 2, 8, 9, 1, 5), outputs=2)
    estimator = kl.KFOC(aggregation="running", rank=3)
    i, j = splits
    total, *others = (accumulated(made, estimator, part) for part in (data[:i], data[i:j], data[j:]))
    alone = [copy.deepcopy(other).finish()["2"].to_dense() for other in others]
    for other in others:
        total.merge(other)
    best = estimate(made, kl.KFOC(aggregation="full", **CONVERGED_FULL))["2"]
    assert_close(total.finish()["2"].to_dense(), best.to_dense(), 1e-7)
    for other, expected in zip(others, alone, strict=True):  # what was merged is as it was
        assert_close(other.finish()["2"].to_dense(), expected, 1e-12)


@pytest.mark.parametrize("name", BY_BATCH)
def test_blocks_so_far_are_those_of_the_batches_so_far(name):
    made, _, data = several()
    accumulation = kl.Accumulation(BY_BATCH[name](), find_layers(made.model))
    for seen in range(1, len(data) + 1):
        one_pass(accumulation, made, data[seen - 1 : seen])
        expected = kl.estimate_fisher(made.model, data[:seen], made.likelihood, BY_BATCH[name](), sampling="exact")
        assert_same(accumulation.so_far(), expected, 1e-7)


def test_a_running_sum_does_not_grow():
    made, _, data = several((3,) * 60)
    rank, estimator = 2, kl.KFOC(aggregation="running", rank=2)
    accumulation = kl.Accumulation(estimator, find_layers(made.model))
    most = 0
    for batch in data:
        one_pass(accumulation, made, [batch])
        for layer in accumulation.layers:
            state, (q, p) = accumulation.state(layer.name), layer.shape
            kept = [*state.get("terms", ()), *(x for examples in state["waiting"] for x in (examples.a, examples.g))]
            most = max(most, sum(x.numel() for x in kept) - rank * (1 + q**2 + p**2) - 4 * rank * (p + 3 * q))
    assert most <= 0


@pytest.mark.parametrize(
    "network",
    [
        "mlp",
        "cnn",
        "lstm",
        "norms",
    ],
)
@pytest.mark.parametrize("name", SEVERAL_PASSES)
def test_several_passes_merge_pass_by_pass(name, network):
    """Two workers with half of the data each: after every pass both have the sums of both."""
    if network == "lstm":
        network = "gru"  # the same without an embedding, which has a block of one pass
    made, _ = problem(network)
    first, *rest = batches(made, 1)
    halves = [[first], rest]
    workers = [kl.Accumulation(SEVERAL_PASSES[name](), find_layers(made.model)) for _ in halves]
    for i in range(workers[0].passes):
        for worker, half in zip(workers, halves, strict=True):
            if i:
                worker.next_pass()
            one_pass(worker, made, half)
        before = copy.deepcopy(workers[0])
        workers[0].merge(copy.deepcopy(workers[1]))
        workers[1].merge(before)
    expected = estimate(made, SEVERAL_PASSES[name](), 1)
    for worker in workers:
        assert worker.weight == len(made.targets)
        assert_same(worker.finish(), expected, 1e-7)


# -- moving averages -----------------------------------------------------------------------------------------

DECAY = 0.7
UNEQUAL = [1, 3, 2]  # sizes of batches


def in_batches(made, sizes=UNEQUAL):
    order = torch.arange(sum(sizes)) % len(made.targets)
    return [batches(made, len(part), part)[0] for part in order.split(sizes)]


def average(made, estimator, data, **options):
    return kl.estimate_fisher(
        made.model, data, made.likelihood, estimator, sampling="exact", ema_decay=options.get("decay", DECAY)
    )


def weighted(made, estimator, value):
    """``Σ_b d^(B−b) n_b value(block of batch b) / Σ_b d^(B−b) n_b``, for every layer."""
    data = in_batches(made)
    fishers = [kl.estimate_fisher(made.model, [b], made.likelihood, estimator, sampling="exact") for b in data]
    weights = [DECAY ** (len(data) - 1 - i) * len(y) for i, (_, y) in enumerate(data)]
    return {
        layer: sum(w * value(fisher[layer]) for w, fisher in zip(weights, fishers, strict=True)) / sum(weights)
        for layer in fishers[0]
    }


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["exact", "diagonal"])
def test_moving_average_of_blocks(name, network):
    made, _ = problem(network)
    fisher = average(made, ONE_PASS[name](), in_batches(made))
    for layer, expected in weighted(made, ONE_PASS[name](), lambda block: block.to_dense()).items():
        assert_close(fisher[layer].to_dense(), expected, 1e-10, layer)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["kfac", "kfac-reduce"])
def test_moving_average_of_both_factors(name, network):
    made, _ = problem(network)
    fisher = average(made, ONE_PASS[name](), in_batches(made))
    for key in ("activation_factor", "gradient_factor", "values"):
        expected = weighted(made, ONE_PASS[name](), lambda block, key=key: getattr(block, key, torch.zeros(())))
        for layer, factor in expected.items():
            if hasattr(fisher[layer], key):
                assert_close(getattr(fisher[layer], key), factor, 1e-10, (layer, key))
                assert torch.equal(
                    torch.as_tensor(getattr(fisher[layer], "scale", 1.0)).double(), torch.ones(()).double()
                )


def test_moving_average_of_sua():
    """Of the scale on all layers; of the activations where they are K-FAC's."""
    made, _ = problem("cnn")
    fisher = average(made, kl.SUA(), in_batches(made))
    for layer, scale in weighted(made, kl.SUA(), lambda block: block.scale).items():
        assert_close(fisher[layer].scale, scale, 1e-10, layer)
    factors = weighted(made, kl.SUA(), lambda block: block.activation_factor)
    assert_close(fisher["5"].activation_factor, factors["5"], 1e-10)


@pytest.mark.parametrize("network", ["mlp", "cnn", "depthwise", "transformer", "norms"])
@pytest.mark.parametrize("name", ["tkfac", "tkfac-uncorrelated", "kfoc-one-sweep"])
def test_moving_average_of_traces(name, network):
    """TKFAC's factors are normalised after the average, so that each batch counts with its trace."""
    made, _ = problem(network)
    estimator = ONE_PASS[name]()
    fisher = average(made, estimator, in_batches(made))

    def times_scale(key):
        def value(block):
            if block.kind == "diagonal":
                return block.values
            scale, factor = torch.as_tensor(block.scale), getattr(block, key)
            return factor * scale.view(-1, 1, 1) if factor.ndim == 3 else factor * scale

        return value

    for key in ("activation_factor", "gradient_factor"):
        for layer, expected in weighted(made, estimator, times_scale(key)).items():
            assert_close(times_scale(key)(fisher[layer]), expected, 1e-10, (layer, key))


@pytest.mark.parametrize("network", ["mlp", "cnn", "transformer", "reused"])
@pytest.mark.parametrize("name", ["ekfac", "ekfac-kfoc"])
def test_moving_average_of_second_moments(name, network):
    """EKFAC's eigenvalues are the diagonal of the averaged exact block in the basis of the averaged factors."""
    made, _ = problem(network)
    fisher, exact = (average(made, e, in_batches(made)) for e in (SEVERAL_PASSES[name](), kl.ExactBlock()))
    for layer, block in fisher.items():
        if block.kind != "eigen":
            continue
        identity = torch.eye(exact[layer].to_dense().shape[0]).double().view(-1, *block.shape)
        basis = block.from_eigenbasis(identity).flatten(1)  # rows are the eigenvectors
        expected = (basis @ exact[layer].to_dense() * basis).sum(1).view(block.shape)
        assert_close(block.values, expected, 1e-9, layer)


@pytest.mark.parametrize("network", ["mlp", "cnn", "gru", "reused"])
def test_moving_average_of_what_is_nearest(network):
    """K-FOC of all examples: the nearest Kronecker product of the averaged exact block."""
    made, _ = problem(network)
    fisher = average(made, ONE_PASS["kfoc-full"](), in_batches(made))
    exact = average(made, kl.ExactBlock(), in_batches(made))
    for layer, block in fisher.items():
        expected = oracles.dense(*oracles.best_rank_one(exact[layer].to_dense(), *block.shape))
        assert_close(block.to_dense(), expected, 1e-8, layer)


def test_moving_average_of_a_running_sum_that_forgets_nothing():
    made, _ = problem("mlp")
    data = in_batches(made, [1] * 6)
    fisher = average(made, kl.KFOC(aggregation="running", rank=6, **CONVERGED), data)
    exact = average(made, kl.ExactBlock(), data)
    for layer, block in fisher.items():
        expected = oracles.dense(*oracles.best_rank_one(exact[layer].to_dense(), *block.shape))
        # A batch of one example has more than one direction: nearly rank one.
        assert oracles.error(block.to_dense(), expected) < 0.2, layer


def test_moving_average_of_a_running_sum():
    """By its definition: what there is, decayed, and the best rank one of the batch; cut to rank one."""
    made, _ = problem("mlp")
    fisher = average(made, kl.KFOC(aggregation="running", **CONVERGED), in_batches(made))
    for layer, block in fisher.items():
        total, weight = 0, 0.0
        for batch in in_batches(made):
            alone = estimate_one(made, batch)[layer].to_dense()
            q, p = block.shape
            part = len(batch[1]) * oracles.dense(*oracles.best_rank_one(alone, q, p))
            rearranged = oracles.rearranged(DECAY * total + part, q, p)
            u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
            cut = (u[:, :1] * s[:1]) @ v[:1]
            total = cut.view(q, q, p, p).permute(0, 2, 1, 3).reshape(q * p, q * p)
            weight = DECAY * weight + len(batch[1])
        expected = oracles.dense(*oracles.best_rank_one(total, *block.shape)) / weight
        assert_close(block.to_dense(), expected, 1e-7, layer)


@pytest.mark.parametrize("sizes", [(1,) * 20, (1, 3, 8, 20, 2, 2, 8)])
def test_moving_average_of_a_running_sum_of_several_terms(sizes):
    """Examples that wait fade like those that have been merged."""
    made, rows, data = several(sizes)
    fisher = average(made, kl.KFOC(aggregation="running", rank=2, **CONVERGED), data)
    for layer, d in oracles.gradients(made.model, made.inputs, made.likelihood).items():
        expected = oracles.kfoc_running_sum(d.groups[0], rows, 2, DECAY)
        assert_close(fisher[layer].to_dense(), expected, 1e-7, layer)


@pytest.mark.parametrize("unit_factor", ["gradient", "activation"])
def test_moving_average_of_factors_that_are_added(unit_factor):
    """Every batch counts with its weight on both sides."""
    made, rows, data = several((1, 3, 2, 4))
    weights = [DECAY ** (len(data) - 1 - i) for i in range(len(data))]
    fisher = average(made, kl.KFOC(aggregation="approx", unit_factor=unit_factor, **CONVERGED), data)
    for layer, d in oracles.gradients(made.model, made.inputs, made.likelihood).items():
        expected = oracles.dense(*oracles.kfoc_approx(d.groups[0], rows, unit_factor, weights))
        assert_close(fisher[layer].to_dense(), expected, 1e-7, layer)


def estimate_one(made, batch):
    return kl.estimate_fisher(made.model, [batch], made.likelihood, kl.ExactBlock(), sampling="exact")


@pytest.mark.parametrize("network", ["mlp", "cnn", "lstm", "norms"])
@pytest.mark.parametrize("name", ALL)
def test_a_decay_of_one_is_the_plain_mean(name, network):
    made, _ = problem(network)
    assert_same(average(made, ALL[name](), batches(made), decay=1), estimate(made, ALL[name]()), tolerance(name))


def several_passes_next_to_one(names, networks):
    return [(name, network) for name in names for network in networks]


@pytest.mark.parametrize(("name", "network"), several_passes_next_to_one(ALL, ["mlp", "cnn", "lstm", "norms"]))
def test_a_decay_of_zero_is_the_last_batch(name, network):
    made, _ = problem(network)
    *_, last = data = batches(made)
    expected = kl.estimate_fisher(made.model, [last], made.likelihood, ALL[name](), sampling="exact")
    assert_same(average(made, ALL[name](), data, decay=0), expected, 1e-7)


@pytest.mark.parametrize(("name", "network"), several_passes_next_to_one(ALL, ["mlp", "norms"]))
def test_the_first_batch_is_not_biased(name, network):
    made, _ = problem(network)
    expected = estimate(made, ALL[name](), 100)
    assert_same(average(made, ALL[name](), batches(made, 100), decay=0.95), expected, tolerance(name))


@pytest.mark.parametrize(("name", "network"), several_passes_next_to_one(SEVERAL_PASSES, ["mlp", "norms"]))
def test_blocks_that_need_one_pass_do_not_depend_on_how_many_there_are(name, network):
    """Diagonal blocks beside estimators of several passes."""
    made, _ = problem(network)
    fisher, expected = (average(made, e, in_batches(made)) for e in (SEVERAL_PASSES[name](), kl.Diagonal()))
    for layer, block in fisher.items():
        if block.kind == "diagonal":
            assert_close(block.to_dense(), expected[layer].to_dense(), 1e-10, layer)


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan"), float("inf")])
def test_bad_decays(decay):
    made, _ = problem("mlp")
    with pytest.raises(ValueError, match=r"ema_decay must be a number from 0 to 1, or None for a plain mean; got "):
        average(made, "kfac", batches(made), decay=decay)


# -- passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEVERAL_PASSES)
def test_iterators_can_be_read_only_once(name):
    made, _ = problem("mlp")
    passes = SEVERAL_PASSES[name]().passes
    message = (
        rf"this estimator makes {passes} passes over the data, but an iterator can be read only once. Give a DataLoader"
    )
    for data in (iter(batches(made)), (b for b in batches(made)), zip(*zip(*batches(made), strict=True), strict=True)):
        with pytest.raises(TypeError, match=message):
            estimate_from(made, data, SEVERAL_PASSES[name]())


@pytest.mark.parametrize("name", {**ONE_PASS, **BY_BATCH})
def test_one_pass_takes_an_iterator(name):
    made, _ = problem("mlp")
    assert_same(estimate_from(made, iter(batches(made)), ALL[name]()), estimate(made, ALL[name]()), tolerance(name))


@pytest.mark.parametrize("name", SEVERAL_PASSES)
def test_data_that_hides_an_iterator(name):
    made, _ = problem("mlp")

    class Once:
        def __init__(self, data):
            self.data = iter(data)

        def __iter__(self):
            return self.data

    with pytest.raises(ValueError, match=r"the data is empty.*An iterator can be read only once"):
        estimate_from(made, Once(batches(made)), SEVERAL_PASSES[name]())


@pytest.mark.parametrize("name", ALL)
def test_the_data_is_read_as_often_as_announced(name):
    made, _ = problem("mlp")
    seen = []

    class Loader:
        def __iter__(self):
            seen.append(None)
            return iter(batches(made))

    fisher = estimate_from(made, Loader(), ALL[name]())
    assert len(seen) == ALL[name]().passes == len(seen)
    assert fisher.n_examples == len(made.targets)


def estimate_from(made, data, estimator):
    return kl.estimate_fisher(made.model, data, made.likelihood, estimator, sampling="exact")


# -- an estimator of one's own -------------------------------------------------------------------------------


@dataclass(frozen=True)
class White(kl.Estimator):
    """``δ · I`` with the trace of the Fisher's block."""

    name: ClassVar[str] = "white"
    for_any_layer: ClassVar[bool] = True

    def start(self, layer):
        return {"trace": torch.zeros((), dtype=layer.dtype)}

    def add_gradients(self, state, gradients):
        state["trace"] += gradients.weight_gradients().square().sum()

    def finish(self, state, layer, weight):
        q, p = layer.shape
        return kl.DiagonalBlock((state["trace"] / (weight * q * p)).expand(q, p).contiguous(), layer.name)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_estimator_of_ones_own(network):
    made, data = problem(network)
    fisher = estimate(made, White())
    for layer, d in data.items():
        expected = oracles.exact_block(d.X).trace() / fisher[layer].to_dense().shape[0]
        assert_close(fisher[layer].to_dense(), expected * torch.eye(fisher[layer].to_dense().shape[0]).double(), 1e-10)
    first, *rest = batches(made, 1)
    one = accumulated(made, White(), [first])
    one.merge(accumulated(made, White(), rest))
    assert_same(one.finish(), fisher)
    assert_same(average(made, White(), batches(made), decay=1), fisher)
    assert fisher.metadata.estimator == "white"
    assert {row.estimator for row in fisher.coverage()} == {"white"}


def test_an_estimator_of_ones_own_as_a_basis_and_in_a_posterior():
    made, _ = problem("mlp")
    posterior = kl.KronLaplace(made.model, made.likelihood, White()).fit(batches(made)).tune()
    assert torch.isfinite(posterior.functional_variance(made.inputs)).all()
    errors = kl.relative_error(posterior.fisher, made.model, batches(made))
    assert all(0 < error < 1 for error in errors.values())


def test_a_posterior_with_an_estimator_of_ones_own_is_saved_and_loaded(tmp_path):
    made, _ = problem("mlp")
    posterior = kl.KronLaplace(made.model, made.likelihood, White()).fit(batches(made))
    posterior.save(tmp_path / "p")
    loaded = kl.KronLaplace.load(tmp_path / "p", made.model)
    assert torch.equal(loaded.log_marginal_likelihood(), posterior.log_marginal_likelihood())


def test_layers_without_factors_get_a_diagonal_block_beside_it():
    """Unless it says that it suits them."""

    @dataclass(frozen=True)
    class Factors(White):
        for_any_layer: ClassVar[bool] = False

    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    made = case(model, torch.randn(5, 3), 2)
    fisher = estimate(made, Factors())
    diagonal = estimate(made, kl.Diagonal())
    assert_close(fisher["1"].to_dense(), diagonal["1"].to_dense(), 1e-12)
    assert [row.estimator for row in fisher.coverage()] == ["white", "diagonal", "white"]


def test_a_list_that_does_not_say_how_it_decays():
    @dataclass(frozen=True)
    class Lists(White):
        def start(self, layer):
            return {**super().start(layer), "seen": []}

    made, _ = problem("mlp")
    estimate(made, Lists())
    with pytest.raises(AssertionError, match="Lists must say how its 'seen' decays"):
        average(made, Lists(), batches(made))


@pytest.mark.parametrize("lengths", [(2, 30), (30, 2), (1, 2), (30, 2, 30)])
def test_batches_of_sequences_of_different_lengths(lengths):
    """K-FOC keeps short sequences as pairs and long ones as products; both together are the nearest Kronecker product."""

    class Averaged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Linear(6, 5)
            self.out = torch.nn.Linear(5, 2)

        def forward(self, x):
            return self.out(torch.tanh(self.token(x)).mean(1))

    torch.manual_seed(0)
    model = Averaged().double()
    data = [(torch.randn(4, length, 6).double(), torch.randint(2, (4,))) for length in lengths]
    full = kl.estimate_fisher(model, data, "classification", kl.KFOC(aggregation="full", **CONVERGED))
    swept = kl.estimate_fisher(model, data, "classification", kl.KFOC(sweeps=40))
    for name in full:
        torch.testing.assert_close(full[name].to_dense(), swept[name].to_dense(), rtol=1e-7, atol=1e-10)
