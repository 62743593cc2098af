"""Moving averages are what they say, for every estimator."""

import pytest
import torch

import kronlaplace as kl
from tests.support import oracles
from tests.support.accumulations import (
    ALL,
    DECAY,
    NETWORKS,
    ONE_PASS,
    SEVERAL_PASSES,
    assert_same,
    average,
    in_batches,
    tolerance,
)
from tests.support.assertions import assert_close
from tests.support.estimators import CONVERGED
from tests.support.problems import batches, estimate, problem, several


def weighted(made, estimator, value):
    """``Σ_b d^(B−b) n_b value(block of batch b) / Σ_b d^(B−b) n_b``, for every layer."""
    data = in_batches(made)
    fishers = [kl.estimate_fisher(made.model, [b], made.likelihood, estimator, sampling="exact") for b in data]
    weights = [DECAY ** (len(data) - 1 - i) * len(y) for i, (_, y) in enumerate(data)]
    return {
        layer: sum(w * value(fisher[layer]) for w, fisher in zip(weights, fishers, strict=True)) / sum(weights)
        for layer in fishers[0]
    }


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["exact", "diagonal"])
def test_moving_average_of_blocks(name, network):
    made, _ = problem(network)
    fisher = average(made, ONE_PASS[name](), in_batches(made))
    for layer, expected in weighted(made, ONE_PASS[name](), lambda block: block.to_dense()).items():
        assert_close(fisher[layer].to_dense(), expected, 1e-10, layer)


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(2)
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


@pytest.mark.quick(3)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", ["mlp", "cnn", "lstm", "norms"])
@pytest.mark.parametrize("name", ALL)
def test_a_decay_of_one_is_the_plain_mean(name, network):
    made, _ = problem(network)
    assert_same(average(made, ALL[name](), batches(made), decay=1), estimate(made, ALL[name]()), tolerance(name))


def several_passes_next_to_one(names, networks):
    return [(name, network) for name in names for network in networks]


@pytest.mark.quick(3)
@pytest.mark.parametrize(("name", "network"), several_passes_next_to_one(ALL, ["mlp", "cnn", "lstm", "norms"]))
def test_a_decay_of_zero_is_the_last_batch(name, network):
    made, _ = problem(network)
    *_, last = data = batches(made)
    expected = kl.estimate_fisher(made.model, [last], made.likelihood, ALL[name](), sampling="exact")
    assert_same(average(made, ALL[name](), data, decay=0), expected, 1e-7)


@pytest.mark.quick(7)
@pytest.mark.parametrize(("name", "network"), several_passes_next_to_one(ALL, ["mlp", "norms"]))
def test_the_first_batch_is_not_biased(name, network):
    made, _ = problem(network)
    expected = estimate(made, ALL[name](), 100)
    assert_same(average(made, ALL[name](), batches(made, 100), decay=0.95), expected, tolerance(name))


@pytest.mark.quick(2)
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
