"""`kl.relative_error`: against the slow definition, as an estimate with a standard error, and what it refuses."""

import copy
import math
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.networks import mlp
from tests.support.problems import batches, estimate, problem
from tests.support.unchanged import assert_unchanged, everything

pytestmark = pytest.mark.filterwarnings("ignore:sampling=.empirical.")

ESTIMATORS = {
    "kfac": lambda: kl.KFAC(),
    "sua": lambda: kl.SUA(),
    "tkfac": lambda: kl.TKFAC(),
    "kfoc": lambda: kl.KFOC(),
    "ekfac": lambda: kl.EKFAC(),
    "diagonal": lambda: kl.Diagonal(),
    "exact": lambda: kl.ExactBlock(),
}
NETWORKS = ["mlp", "cnn", "depthwise", "norms", "transformer", "lstm", "tied", "from_dict"]


def errors_of(made, fisher, size=2, **options):
    return kl.relative_error(fisher, made.model, batches(made, size), **options)


# -- dense ---------------------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("sampling", ["exact", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_dense_equals_its_definition(name, network, sampling):
    made, data = problem(network, empirical=sampling == "empirical")
    fisher = estimate(made, ESTIMATORS[name](), sampling=sampling)
    errors = errors_of(made, fisher, method="dense")
    assert list(errors) == list(fisher)
    for layer, error in errors.items():
        exact = oracles.exact_block(data[layer].X)
        if not exact.any():
            assert math.isnan(error)
            continue
        assert float(error) == pytest.approx(oracles.error(fisher[layer].to_dense(), exact), rel=1e-8, abs=1e-9)
        assert error.standard_error == 0
        assert error.method == "dense"
        if name == "exact":
            assert error < 1e-12


@pytest.mark.grid
@pytest.mark.parametrize("network", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("mc_samples", [1, 3])
def test_sampled_labels_are_drawn_again(mc_samples, network):
    """The approximation alone is measured: the same draws, also if the Fisher took two passes over the data."""
    made, _ = problem(network)
    options = {"sampling": "mc", "mc_samples": mc_samples, "seed": 5}
    exact = estimate(made, kl.ExactBlock(), **options)
    for make in ESTIMATORS.values():
        fisher = estimate(made, make(), **options)
        for layer, error in errors_of(made, fisher).items():
            expected = oracles.error(fisher[layer].to_dense(), exact[layer].to_dense())
            assert float(error) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_batches_do_not_matter_without_draws():
    made, _ = problem("cnn")
    fisher = estimate(made, kl.TKFAC())
    one, all_ = (errors_of(made, fisher, size) for size in (1, 100))
    assert {k: float(v) for k, v in one.items()} == pytest.approx({k: float(v) for k, v in all_.items()}, rel=1e-9)


def test_of_some_layers():
    made, _ = problem("cnn")
    whole = errors_of(made, estimate(made, "kfac"))
    some = errors_of(made, estimate(made, "kfac", layers=["2"]))
    assert list(some) == ["2"]
    assert float(some["2"]) == pytest.approx(float(whole["2"]), rel=1e-9)


def test_single_precision():
    made, _ = problem("mlp")
    wide = errors_of(made, estimate(made, "kfac"))
    model, data = copy.deepcopy(made.model).float(), [(made.inputs.float(), made.targets)]
    narrow = kl.relative_error(
        kl.estimate_fisher(model, data, "classification", sampling="exact"), model, data, method="dense"
    )
    assert {k: float(v) for k, v in narrow.items()} == pytest.approx({k: float(v) for k, v in wide.items()}, rel=1e-4)


# -- probing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_probing_is_within_its_standard_error(name, network):
    made, _ = problem(network)
    fisher = estimate(made, ESTIMATORS[name]())
    dense = errors_of(made, fisher, method="dense")
    probed = errors_of(made, fisher, method="probing", n_probes=2000)
    for layer, error in probed.items():
        assert error.method == "probing"
        if math.isnan(dense[layer]):
            assert math.isnan(error)
        else:
            assert abs(error - dense[layer]) <= 4 * error.standard_error + 1e-12, layer
            assert error.standard_error < 0.1 * dense[layer] + 1e-12


def test_standard_error_falls_with_the_root_of_the_number_of_probes():
    made, _ = problem("cnn")
    fisher = estimate(made, "kfac")
    few, many = (errors_of(made, fisher, method="probing", n_probes=n) for n in (1000, 16_000))
    for layer in fisher:
        assert few[layer].standard_error / many[layer].standard_error == pytest.approx(4, rel=0.2)


@pytest.mark.grid
def test_standard_error_covers_the_truth():
    """Over 200 seeds: 95 % within 1.96 standard errors, two binomial standard errors (and a little for few probes) off."""
    made, _ = problem("mlp")
    fisher = estimate(made, "kfac")
    dense = errors_of(made, fisher, method="dense")
    deviations = {layer: [] for layer in fisher}
    for seed in range(200):
        for layer, error in errors_of(made, fisher, 100, method="probing", n_probes=200, seed=seed).items():
            deviations[layer].append((error - dense[layer]) / error.standard_error)
    for values in deviations.values():
        values = np.array(values)
        assert 0.90 <= np.mean(np.abs(values) < 1.96) <= 0.99
        assert abs(values.mean()) < 0.3
        assert values.std() == pytest.approx(1, rel=0.2)


def test_probes_are_reproducible():
    made, _ = problem("mlp")
    fisher = estimate(made, "kfac")
    first, again, other = (errors_of(made, fisher, method="probing", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert all(first[layer] != other[layer] for layer in fisher)


def test_auto_is_dense_up_to_a_size():
    made, _ = problem("cnn")
    fisher = estimate(made, "kfac")
    sizes = {layer: math.prod(block.shape) for layer, block in fisher.items()}
    limit = sorted(sizes.values())[1]
    dense, probed = (errors_of(made, fisher, method=method) for method in ("dense", "probing"))
    for layer, error in errors_of(made, fisher, max_dense=limit).items():
        assert error == (dense if sizes[layer] <= limit else probed)[layer]
        assert error.method == ("dense" if sizes[layer] <= limit else "probing")
    assert all(error.method == "dense" for error in errors_of(made, fisher).values())


@pytest.mark.parametrize(
    "method",
    [
        "dense",
        "probing",
    ],
)
def test_data_without_any_gradient_gives_nan(method):
    """Where the exact block vanishes there is nothing to be relative to, whatever the method."""
    made, _ = problem("mlp")
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    fisher = kl.estimate_fisher(model, [(made.inputs, made.targets)], "classification")
    zeros = [(torch.zeros_like(made.inputs), made.targets)]
    assert math.isnan(kl.relative_error(fisher, model, zeros, method=method)["0"])


# -- the result ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "probing"])
def test_the_result_is_a_float_that_knows_how_it_came_about(method):
    made, _ = problem("mlp")
    error = errors_of(made, estimate(made, "kfac"), method=method)["0"]
    assert isinstance(error, float)
    assert isinstance(error, kl.RelativeError)
    assert f"{error:.3f}" == f"{float(error):.3f}"
    assert error + 0 == float(error)
    for copied in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (copied, copied.standard_error, copied.method) == (error, error.standard_error, error.method)
        assert type(copied) is kl.RelativeError
    assert ("±" in repr(error)) == (method == "probing")


@pytest.mark.parametrize("method", ["dense", "probing"])
def test_nothing_is_left_behind(method):
    made = mlp()
    fisher = kl.estimate_fisher(made.model, made.batches(), "classification")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(made.inputs, made.targets), batch_size=3, shuffle=True
    )
    before = everything(made.model)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    kl.relative_error(fisher, made.model, loader, method=method)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]
    assert_unchanged(made.model, before)


# -- refusals ------------------------------------------------------------------------------------------------


def test_another_network():
    made, other = mlp(), mlp(outputs=2)
    fisher = kl.estimate_fisher(made.model, made.batches(), "classification")
    with pytest.raises(ValueError, match=r"belongs to a different network: its block for layer '2' .*\(3, 7\) matrix"):
        kl.relative_error(fisher, other.model, other.batches())
    with pytest.raises(ValueError, match="the model has no module '2'"):
        kl.relative_error(fisher, nn.Sequential(nn.Linear(4, 3)).double(), made.batches())


def test_changed_weights():
    made = mlp()
    fisher = kl.estimate_fisher(made.model, made.batches(), "classification")
    made.model[2].bias.data[0] += 1
    with pytest.raises(ValueError, match=r"the fisher was estimated at different weights: '2\.bias' differs"):
        kl.relative_error(fisher, made.model, made.batches())


@pytest.mark.parametrize(
    ("own", "other"),
    [("classification", "binary"), ("regression", kl.Gaussian(0.5)), ("regression", "euclidean")],
)
def test_another_likelihood(own, other):
    made = mlp(own)
    fisher = kl.estimate_fisher(made.model, made.batches(), own)
    kl.relative_error(fisher, made.model, made.batches(), own)
    with pytest.raises(ValueError, match=r"the fisher was estimated with .*; the likelihood passed here must match "):
        kl.relative_error(fisher, made.model, made.batches(), other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "sampling"}, ValueError, "unknown method 'sampling'; allowed are 'auto', 'dense', 'probing'"),
        ({"n_probes": 1}, ValueError, "n_probes must be at least 2"),
        ({"n_probes": 0}, ValueError, "n_probes must be at least 1"),
        ({"max_dense": 0}, ValueError, "max_dense must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"likelihood": "softmax"}, ValueError, "unknown likelihood 'softmax'"),
    ],
)
def test_bad_options(options, error, message):
    made = mlp()
    fisher = kl.estimate_fisher(made.model, made.batches(), "classification")
    with pytest.raises(error, match=message):
        kl.relative_error(fisher, made.model, made.batches(), **options)


def test_a_mode_in_which_outputs_are_random():
    made = mlp()
    model = nn.Sequential(*made.model, nn.Dropout(0.5)).eval()
    fisher = kl.estimate_fisher(model, made.batches(), "classification")
    with pytest.raises(ValueError, match=r"is in training mode.*Call model.eval\(\) first"):
        kl.relative_error(fisher, model.train(), made.batches())


def test_empty_data():
    made = mlp()
    fisher = kl.estimate_fisher(made.model, made.batches(), "classification")
    with pytest.raises(ValueError, match="the data is empty"):
        kl.relative_error(fisher, made.model, [])
