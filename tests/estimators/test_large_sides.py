"""Sides that are never formed: K-FAC and TKFAC keep a sketch of them, or their diagonal, against the dense factors."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.blocks import TruncatedBlock
from kronlaplace.blocks.basis import CoordinateBasis
from kronlaplace.fisher.merging import merge_fishers
from tests.support.assertions import assert_close
from tests.support.cases import case
from tests.support.padded import Reader, batch

LARGE = kl.Sketch(limit=6, rank=128)
ESTIMATORS = [kl.KFAC(), kl.KFAC(weight_sharing="reduce"), kl.TKFAC(), kl.TKFAC(spatial="uncorrelated")]
NAMES = ["kfac", "kfac-reduce", "tkfac", "tkfac-uncorrelated"]
by_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=NAMES)


def network(tokens):
    """Both sides of each layer have more rows than examples, so that sketches of drawn labels find the whole range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 33))
    made = case(model, torch.randn(3, 2, 40) if tokens else torch.randn(5, 40), 33)
    if tokens:
        made.targets = torch.randint(33, (3, 2))
    return made


def estimate(made, estimator, sketch=None, order=None, size=2, likelihood="classification", **options):
    options = {"sampling": "mc"} | options
    estimator = dataclasses.replace(estimator, sketch=sketch)
    return kl.estimate_fisher(made.model, made.batches(size, order), likelihood, estimator, **options)


@by_estimator
@pytest.mark.parametrize("tokens", [False, True])
def test_sketches_of_low_rank_are_the_factors(estimator, tokens):
    made = network(tokens)
    whole, large = estimate(made, estimator), estimate(made, estimator, LARGE)
    for name in ("0", "2"):
        assert isinstance(large[name], TruncatedBlock)
        assert_close(large[name].to_dense(), whole[name].to_dense(), 1e-8)
    assert "eigenpairs of G" in str(large.coverage())


@by_estimator
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression"])
def test_the_outputs_own_factor_is_the_exact_diagonal(estimator, tokens, likelihood):
    """Without a backward pass, whatever the sampling; of `Categorical` the diagonal of the exact factor."""
    made = network(tokens)
    if likelihood != "classification":
        made.targets = torch.rand(*made.targets.shape, 33).double().round()
    exact = estimate(made, estimator, sampling="exact", likelihood=likelihood)["4"]
    for sampling in ("mc", "exact"):
        found = estimate(made, estimator, LARGE, sampling=sampling, likelihood=likelihood)["4"]
        basis = found.bases()[0]
        assert isinstance(basis, CoordinateBasis)
        diagonal = exact.scale * exact.gradient_factor.diagonal()
        ratio = found.scale * basis.expand(found.eigen()[0].values[0]) / diagonal
        assert ratio.min() > 1 / 1.06
        assert ratio.max() < 1.06
        assert_close(found.activation_factor, exact.activation_factor, 1e-8)
        assert_close(found.trace(), exact.trace(), 1e-10)


def test_the_last_layer_alone_needs_no_directions(monkeypatch):
    made = network(False)
    expected = estimate(made, kl.KFAC(), LARGE)["4"].to_dense()
    monkeypatch.setattr("kronlaplace.network.observer.NetworkObserver.backward", None)
    monkeypatch.setattr("kronlaplace.fisher.curvature_pass.check_layers", lambda *args: None)
    alone = estimate(made, kl.KFAC(), LARGE, layers=["4"])["4"]
    assert_close(alone.to_dense(), expected, 1e-12)


@by_estimator
@pytest.mark.parametrize("columns", [2, 8])
def test_sums_do_not_depend_on_batches_and_their_order(estimator, columns):
    made = network(False)
    sketch = kl.Sketch(limit=6, rank=columns)
    options = {"sampling": "empirical", "sketch": sketch}  # no draws, which differ by batch
    with pytest.warns(UserWarning, match="empirical"):
        one = estimate(made, estimator, **options)
        other = estimate(made, estimator, order=torch.tensor([3, 1, 4, 0, 2]), size=3, **options)
        whole = estimate(made, estimator, sampling="empirical")
    for name in one:
        assert_close(other[name].to_dense(), one[name].to_dense(), 1e-8)
        assert_close(one[name].trace(), whole[name].trace(), 1e-8)


def test_ignored_targets_and_weights_of_classes_count():
    made = network(True)
    made.targets[0, 1] = -100
    likelihood = kl.Categorical(class_weights=torch.rand(33) + 0.1)
    whole = estimate(made, kl.KFAC(), sampling="exact", likelihood=likelihood)["4"]
    large = estimate(made, kl.KFAC(), LARGE, likelihood=likelihood)["4"]
    assert_close(large.trace(), whole.trace(), 1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padding_does_not_count(sharing):
    estimator = kl.KFAC(sharing, kl.Sketch(limit=2, rank=4))
    found = [
        kl.estimate_fisher(Reader(), [batch(length)], "classification", estimator, layers=["value"], sampling="exact")
        for length in (4, 9)
    ]
    assert_close(found[1]["value"].trace(), found[0]["value"].trace(), 1e-8)
    assert_close(found[1]["value"].to_dense(), found[0]["value"].to_dense(), 1e-6)


def test_moving_averages_and_checkpoints():
    made = network(False)
    parts = [kl.Accumulation(kl.KFAC(sketch=LARGE), kl.find_layers(made.model), 0.9) for _ in range(2)]
    for accumulation in parts:
        for x, y in made.batches(2):
            with kl.NetworkObserver(made.model, accumulation.layers) as observer:
                f = made.model(x)
                rule = kl.DirectionSampling("mc")
                kl.accumulate_batch(observer, f, kl.Categorical(), rule, accumulation, targets=y)
            saved = accumulation.state_dict()
            accumulation.load_state_dict(saved)
    so_far = parts[0].so_far()
    whole = estimate(made, kl.KFAC(), ema_decay=0.9)
    finished = parts[1].finish()
    for name in ("0", "2"):
        assert_close(so_far[name].to_dense(), finished[name].to_dense(), 1e-12)
    assert_close(finished["4"].activation_factor, whole["4"].activation_factor, 1e-8)


def test_an_optimizer_steps_with_large_sides():
    made = network(False)
    model = made.model.train()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = kl.NaturalGradient(model, "classification", lr=0.1, estimator=kl.KFAC(sketch=LARGE))
    for x, y in made.batches(5):
        optimizer.zero_grad()
        f = model(x)
        optimizer.update_curvature(f)
        nn.functional.cross_entropy(f, y).backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_would_be_too_large_is_refused(monkeypatch):
    made = network(False)
    for module in ("layers.base", "blocks.basis", "blocks.truncated"):
        monkeypatch.setattr(sys.modules[f"kronlaplace.{module}"], "check_size", _refuse)
    monkeypatch.setattr(sys.modules["kronlaplace.estimators.ekfac"], "check_size", _refuse)
    for estimator, needed in (
        (kl.KFOC(), "a factor"),
        (kl.KFAC(sketch=None), "a factor"),
        (kl.EKFAC(), "an eigenbasis"),
    ):
        with pytest.raises(NotImplementedError, match=f"needs {needed}"):
            kl.estimate_fisher(made.model, made.batches(), "classification", estimator)
    fisher = estimate(made, kl.KFAC(), LARGE)
    with pytest.raises(NotImplementedError, match="whole factor"):
        _ = fisher["0"].gradient_factor
    with pytest.raises(NotImplementedError, match="whole eigenbasis"):
        fisher["0"].bases()[0].full()


@pytest.mark.parametrize("estimator", [kl.KFAC(sketch=LARGE), kl.TKFAC(sketch=LARGE)])
def test_a_sketch_does_not_start_from_a_block(estimator):
    made = network(False)
    accumulation = kl.Accumulation(estimator, kl.find_layers(made.model))
    with pytest.raises(NotImplementedError, match=r"layer '0' cannot start from a given block.*sketch=None"):
        accumulation.start_from(estimate(made, kl.KFAC()), 10)


def _refuse(rows, what):
    raise NotImplementedError(what)


def test_the_error_says_the_ways_out(monkeypatch):
    monkeypatch.setattr("kronlaplace._dense.LARGEST_DENSE", 32)
    made = network(False)
    with pytest.raises(NotImplementedError, match=r"layer '4' needs a factor of 49 rows.*KFAC\(\) or TKFAC\(\)"):
        kl.estimate_fisher(made.model, made.batches(), "classification", kl.KFOC())
    fisher = estimate(made, kl.KFAC(), LARGE)
    monkeypatch.setattr("kronlaplace.estimators.sides.LARGEST_DENSE", 32)
    with pytest.raises(NotImplementedError, match="made from a sketch"):
        merge_fishers(fisher, estimate(made, kl.KFAC(), LARGE))


@pytest.mark.parametrize("sampling", [None, "mc", "exact"])
def test_labels_are_drawn_where_there_are_too_many_directions(sampling, monkeypatch, recwarn):
    monkeypatch.setattr("kronlaplace.likelihoods.sampling.MOST_EXACT", 20)
    made = network(False)
    fisher = estimate(made, kl.KFAC(), LARGE, sampling=sampling)
    assert fisher.metadata.sampling == ("mc" if sampling is None else sampling)
    said = [str(w.message) for w in recwarn if "directions" in str(w.message)]
    assert len(said) == (sampling is None)
    for text in said:
        assert "have 32 directions" in text
        assert "The last layer, '4', needs none" in text
    again = estimate(made, kl.KFAC(), LARGE, sampling="mc")
    if sampling is None:
        assert_close(fisher["0"].to_dense(), again["0"].to_dense(), 0)
    monkeypatch.setattr("kronlaplace.likelihoods.sampling.MOST_EXACT", 32)
    assert estimate(made, kl.KFAC(), LARGE, sampling=None).metadata.sampling == "exact"
