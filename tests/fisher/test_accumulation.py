"""Sums over batches: halves of the data merge to the whole, moving averages are what they say, passes are counted."""

import copy

import pytest

import kronlaplace as kl
from kronlaplace.layers import find_layers
from tests.support.accumulations import (
    ALL,
    BY_BATCH,
    NETWORKS,
    ONE_PASS,
    SEVERAL_PASSES,
    accumulated,
    assert_same,
    one_pass,
    tolerance,
)
from tests.support.assertions import assert_close
from tests.support.estimators import CONVERGED, CONVERGED_FULL
from tests.support.problems import batches, estimate, problem, several

# -- merging -------------------------------------------------------------------------------------------------


@pytest.mark.quick(3)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ONE_PASS)
def test_two_parts_merge_to_the_whole(name, network):
    made, _ = problem(network)
    first, *rest = batches(made, 1)
    one, other = accumulated(made, ONE_PASS[name](), [first]), accumulated(made, ONE_PASS[name](), rest)
    one.merge(other)
    assert one.weight == len(made.targets)
    assert_same(one.finish(), estimate(made, ONE_PASS[name]()), tolerance(name))


@pytest.mark.quick(5)
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


@pytest.mark.quick(2)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(5)
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


@pytest.mark.quick(8)
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
