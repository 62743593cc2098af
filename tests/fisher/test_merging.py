"""Finished Fishers of two data sets make that of both, or say why they cannot."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.fisher.merging import merge_fishers
from tests.support.assertions import assert_close
from tests.support.estimators import White
from tests.support.problems import batches, problem

NETWORKS = [
    "mlp",
    "cnn",
    "depthwise",
    "segmentation",
    "transformer",
    "lstm",
    "gru",
    "norms",
    "reused",
    "tied",
    "language_model",
    "from_dict",
]
ADDITIVE = {
    "kfac": lambda: kl.KFAC(),
    "kfac-reduce": lambda: kl.KFAC(weight_sharing="reduce"),
    "tkfac": lambda: kl.TKFAC(),
    "tkfac-uncorrelated": lambda: kl.TKFAC(spatial="uncorrelated"),
    "diagonal": lambda: kl.Diagonal(),
    "exact": lambda: kl.ExactBlock(),
}
NOT_ADDITIVE = {
    "sua": (lambda: kl.SUA(), "products of the channels' means"),
    **{
        f"kfoc-{aggregation}": (
            functools.partial(kl.KFOC, aggregation=aggregation),
            "nearest to the Fisher of all data",
        )
        for aggregation in ("sweeps", "running", "approx", "full")
    },
    "ekfac": (lambda: kl.EKFAC(), "the eigenbasis of their own data"),
    "white": (lambda: White(), "knows only its name"),
}


def estimate(made, estimator, data, sampling="exact", **options):
    return kl.estimate_fisher(made.model, data, made.likelihood, estimator, sampling=sampling, **options)


def parts_and_whole(network, estimator, *counts, likelihood="classification"):
    """Fishers of the first examples, of the next and so on, the last of the rest; and that of all."""
    made, _ = problem(network, likelihood)
    data = batches(made, 1)
    ends = [*torch.tensor(counts).cumsum(0).tolist(), len(data)]
    starts = [0, *ends[:-1]]
    parts = [estimate(made, estimator, data[i:j]) for i, j in zip(starts, ends, strict=True)]
    return *parts, estimate(made, estimator, data)


def assert_same(fisher, expected, rtol=1e-12):
    """Factor by factor, not only their product."""
    assert list(fisher) == list(expected)
    assert fisher.n_examples == expected.n_examples
    assert_close(fisher.statistics, expected.statistics, rtol, "statistics")
    tensors, wanted = (
        # The least trace is of the whole network, which Fishers of some of its layers do not tell when they are combined.
        {name: tensor for name, tensor in one.to_tensors().items() if not name.endswith(".least_trace")}
        for one in (fisher, expected)
    )
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert_close(tensor.double(), wanted[name].double(), rtol, name)


# -- the same as from all data at once -----------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ADDITIVE)
def test_two_parts_make_the_whole(name, network):
    one, other, whole = parts_and_whole(network, ADDITIVE[name](), 1)
    both = merge_fishers(one, other)
    assert_same(both, whole)
    assert both.metadata == one.metadata
    assert {block.name for block in both.values()} == set(both)


@pytest.mark.quick(2)
@pytest.mark.parametrize("likelihood", ["binary", "regression"])
@pytest.mark.parametrize("name", ADDITIVE)
def test_with_other_likelihoods(name, likelihood):
    one, other, whole = parts_and_whole("cnn", ADDITIVE[name](), 2, likelihood=likelihood)
    assert_same(merge_fishers(one, other), whole)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["sua", "kfoc-sweeps", "ekfac"])
def test_diagonal_blocks_beside_any_estimator(name):
    estimator = NOT_ADDITIVE[name][0]()
    one, other, whole = parts_and_whole("norms", estimator, 1)
    diagonal = [layer for layer, block in whole.items() if block.kind == "diagonal"]
    assert len(diagonal) == 6
    one, other, whole = (fisher.restricted_to(diagonal) for fisher in (one, other, whole))
    assert_same(merge_fishers(one, other), whole)


@pytest.mark.parametrize("name", ["kfac", "kfac-reduce", "tkfac", "tkfac-uncorrelated"])
def test_sequences_of_different_lengths(name):
    """Each batch counts with the number of its own positions, as it does in one pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    data = [(torch.randn(n, t, 3).double(), torch.randn(n, t, 2).double()) for n, t in ((2, 3), (4, 5), (1, 2))]
    one, other, whole = (
        kl.estimate_fisher(model, some, "regression", ADDITIVE[name](), sampling="exact")
        for some in (data[:1], data[1:], data)
    )
    assert_same(merge_fishers(one, other), whole)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ADDITIVE)
def test_the_order_of_two_does_not_matter(name):
    one, other, _ = parts_and_whole("depthwise", ADDITIVE[name](), 1)
    assert_same(merge_fishers(one, other), merge_fishers(other, one))


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", ["cnn", "depthwise", "norms"])
@pytest.mark.parametrize("name", ADDITIVE)
def test_three_in_any_order(name, network):
    a, b, c, whole = parts_and_whole(network, ADDITIVE[name](), 1, 2)
    assert_same(merge_fishers(merge_fishers(a, b), c), whole)
    assert_same(merge_fishers(a, merge_fishers(b, c)), whole)
    assert_same(merge_fishers(merge_fishers(c, a), b), whole)


@pytest.mark.parametrize("name", ADDITIVE)
def test_a_fisher_with_itself_is_the_same_mean(name):
    made, _ = problem("depthwise")
    fisher = estimate(made, ADDITIVE[name](), batches(made))
    twice = merge_fishers(fisher, fisher)
    assert_same(twice, kl.KroneckerFisher(fisher, 2 * fisher.n_examples, fisher.metadata, 2 * fisher.statistics))


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ADDITIVE)
def test_what_was_combined_is_left_as_it_was_and_shares_no_memory(name):
    one, other, _ = parts_and_whole("depthwise", ADDITIVE[name](), 1)
    before = [{key: t.clone() for key, t in fisher.to_tensors().items()} for fisher in (one, other)]
    for tensor in merge_fishers(one, other).to_tensors().values():
        tensor.fill_(7)
    for fisher, tensors in zip((one, other), before, strict=True):
        for key, tensor in fisher.to_tensors().items():
            assert torch.equal(tensor, tensors[key]), key


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ADDITIVE)
def test_saved_loaded_and_combined(name, tmp_path):
    one, other, whole = parts_and_whole("norms", ADDITIVE[name](), 1)
    other.save(tmp_path / "other")
    both = merge_fishers(one, kl.KroneckerFisher.load(tmp_path / "other"))
    both.save(tmp_path / "both")
    assert_same(kl.KroneckerFisher.load(tmp_path / "both"), whole)


@pytest.mark.parametrize("name", ["kfac", "tkfac"])
def test_a_scale_that_a_block_was_given_counts(name):
    one, other, whole = parts_and_whole("depthwise", ADDITIVE[name](), 1)
    scaled = [
        kl.KroneckerFisher({k: b.scaled(3.0) for k, b in f.items()}, f.n_examples, f.metadata, f.statistics)
        for f in (one, other)
    ]
    for layer, block in merge_fishers(*scaled).items():
        assert_close(block.to_dense(), 3 * whole[layer].to_dense(), 1e-12, layer)


# -- layers that see nothing ---------------------------------------------------------------------------------


class Dead(nn.Module):
    """A grouped convolution and a linear layer, whose groups are dead where the input is not positive."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 1, groups=2, bias=False)
        self.linear = nn.Linear(4, 3, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.relu(self.linear(self.conv(torch.relu(x)).sum(2))))


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("alive", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_dead_layers(name, alive):
    """Of zeros come zeros, and what one data set does not see is made of the other."""
    torch.manual_seed(0)
    model = Dead().double().eval()
    x = torch.randn(5, 2, 3).double().abs()
    x[:2] *= alive[0]
    x[2:] *= alive[1]
    x[2:, 1] = 0  # the second group is dead on the second data set anyway
    data = list(zip(x.split(1), torch.randn(5, 2).double().split(1), strict=True))
    one, other, whole = (
        kl.estimate_fisher(model, some, "regression", ADDITIVE[name](), sampling="exact")
        for some in (data[:2], data[2:], data)
    )
    assert bool(whole["conv"].to_dense().any()) == any(alive)
    both = merge_fishers(one, other)
    assert all(torch.isfinite(tensor).all() for tensor in both.to_tensors().values())
    assert_same(both, whole)


# -- what a Fisher comes with --------------------------------------------------------------------------------


def test_statistics_are_summed_and_used():
    made, _ = problem("cnn", "regression")
    data = batches(made, 1)
    one, other = (estimate(made, kl.KFAC(), some) for some in (data[:2], data[2:]))
    both = merge_fishers(one, other)
    assert both.n_examples == len(made.targets)
    torch.testing.assert_close(both.statistics, one.statistics + other.statistics)
    squared_error = (made.model(made.inputs) - made.targets).square().sum()
    torch.testing.assert_close(both.statistics[0], squared_error.detach(), rtol=1e-10, atol=0)


def test_without_targets_there_are_no_statistics():
    made, _ = problem("mlp")
    one, other = (estimate(made, kl.KFAC(), [x]) for x in (made.inputs[:2], made.inputs[2:]))
    assert merge_fishers(one, other).statistics is None
    with_targets = estimate(made, kl.KFAC(), batches(made))
    message = "the content of the data is inputs and targets in the first and inputs only in the second"
    with pytest.raises(ValueError, match=message):
        merge_fishers(with_targets, other)
    with pytest.raises(ValueError, match="the data is inputs only in the first and inputs and targets in the second"):
        merge_fishers(other, with_targets)


def test_draws_of_other_seeds_are_combined():
    made, _ = problem("mlp")
    one, other = (estimate(made, kl.KFAC(), batches(made), "mc", seed=seed) for seed in (0, 1))
    both = merge_fishers(one, other)
    assert both.metadata.seed == 0
    for layer, block in both.items():
        expected = (one[layer].gradient_factor + other[layer].gradient_factor) / 2
        assert_close(block.gradient_factor, expected, 1e-12)
        assert not torch.equal(one[layer].gradient_factor, other[layer].gradient_factor)


# -- what cannot be combined ---------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", ["cnn", "depthwise", "norms"])
@pytest.mark.parametrize("name", NOT_ADDITIVE)
def test_estimators_whose_blocks_do_not_add_up(name, network):
    make, reason = NOT_ADDITIVE[name]
    one, other, _ = parts_and_whole(network, make(), 2)
    shorthand = make().name
    with pytest.raises(NotImplementedError, match=f"of the estimator '{shorthand}' cannot be combined: .*{reason}.*"):
        merge_fishers(one, other)
    with pytest.raises(NotImplementedError, match=r"torch\.utils\.data\.ConcatDataset.*or use KFAC\(\) or TKFAC\(\)"):
        merge_fishers(one, other)


def test_an_estimator_that_says_nothing():
    """The default of the base class."""
    block = kl.DiagonalBlock(torch.ones(2, 3), "layer")
    with pytest.raises(
        NotImplementedError, match=r"estimator 'white' cannot be combined: it does not define how .*combine"
    ):
        White().combine(block, block, (0.5, 0.5))


def test_an_estimator_of_ones_own_beside_which_a_layer_gets_a_diagonal_block():
    @dataclass(frozen=True)
    class Factors(White):
        for_any_layer: ClassVar[bool] = False

    one, other, whole = parts_and_whole("norms", Factors(), 1)
    assert all(block.kind == "diagonal" for block in whole.values())
    with pytest.raises(NotImplementedError, match="knows only its name"):
        merge_fishers(one, other)
    beside = [row.layer for row in whole.coverage() if row.estimator == "diagonal"]
    assert 0 < len(beside) < len(whole)
    one, other, whole = (fisher.restricted_to(beside) for fisher in (one, other, whole))
    assert_same(merge_fishers(one, other), whole)


def test_two_blocks_of_sua_do_not_determine_that_of_both():
    """Data sets of opposite sign have one and the same activation factor, and different ones with a third."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 2, bias=False), nn.Flatten(), nn.Linear(6, 2)).double().eval()
    x, third = torch.rand(3, 1, 4).double(), torch.rand(2, 1, 4).double()

    def factor(*parts):
        fisher = kl.estimate_fisher(model, list(parts), "euclidean", kl.SUA(), sampling="exact")
        return fisher["0"].activation_factor

    assert_close(factor(x), factor(-x), 1e-12)
    plus, minus = factor(x, third), factor(-x, third)
    assert torch.linalg.norm(plus - minus) > 0.1 * torch.linalg.norm(plus)


@pytest.mark.parametrize("bad", [None, {}, "fisher", torch.ones(3)])
def test_what_is_no_fisher(bad):
    made, _ = problem("mlp")
    fisher = estimate(made, kl.KFAC(), batches(made))
    for pair in ((fisher, bad), (bad, fisher)):
        with pytest.raises(TypeError, match=f"both arguments must be Fishers, .* got {type(bad).__name__}"):
            merge_fishers(*pair)


def test_other_weights():
    one, other, _ = parts_and_whole("mlp", kl.KFAC(), 2)
    for weights in (
        {**other.metadata.weights, "2.weight": "0"},
        {name: digest for name, digest in other.metadata.weights.items() if name != "2.weight"},
    ):
        changed = with_metadata(other, weights=weights)
        for pair in ((one, changed), (changed, one)):
            with pytest.raises(
                ValueError, match=r"estimated at different weights: '2\.weight' differs\. .* both there"
            ):
                merge_fishers(*pair)


def test_weights_that_were_trained_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    data = [(torch.randn(4, 3).double(), torch.randn(4, 2).double())]
    one = kl.estimate_fisher(model, data, "regression")
    model[1].running_mean += 1
    with pytest.raises(ValueError, match=r"'1\.running_mean' differs"):
        merge_fishers(one, kl.estimate_fisher(model, data, "regression"))


def test_other_layers():
    one, other, whole = parts_and_whole("mlp", kl.KFAC(), 2)
    message = r"first Fisher has blocks for \['0', '2'\], the second for \['2'\]. .* restricted_to"
    with pytest.raises(ValueError, match=message):
        merge_fishers(one, other.restricted_to(["2"]))
    both = merge_fishers(one, other.restricted_to(["2", "0"]))  # another order is no other Fisher
    assert_same(both, whole)


def with_metadata(fisher, **changes):
    metadata = dataclasses.replace(fisher.metadata, **changes)
    return kl.KroneckerFisher(fisher, fisher.n_examples, metadata, fisher.statistics)


PARTICULARS = {
    "likelihood": ({"likelihood": kl.Gaussian(noise_std=2.0)}, r"the likelihood is Categorical.* and Gaussian.*2\.0"),
    "settings": (
        {"settings": {"name": "kfac", "weight_sharing": "reduce"}},
        r"the estimator is .*'expand'.* and .*'reduce'",
    ),
    "estimator": ({"settings": {"name": "sua"}}, r"the estimator is KFAC\(.*\) in the first and SUA\(\)"),
    "sampling": ({"sampling": kl.Sampling.MC}, "the sampling is exact in the first and mc in the second"),
    "mc_samples": ({"mc_samples": 4}, "mc_samples is 1 in the first and 4 in the second"),
    "input_axis": ({"input_axis": 1}, "the axis of the inputs that counts the examples is 0 in the first and 1"),
    "parameters": (
        {"parameters": {"0": ("0.weight", "0.bias"), "2": ("2.weight",)}},
        r"the block of layer '2' is kronecker of shape \(3, 7\) for 2\.weight, 2\.bias in .* and .* for 2\.weight in",
    ),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", PARTICULARS)
def test_fishers_that_were_not_estimated_in_the_same_way(name):
    changes, message = PARTICULARS[name]
    one, other, _ = parts_and_whole("mlp", kl.KFAC(), 2)
    with pytest.raises(ValueError, match=f"not estimated in the same way: {message}.*Estimate both in the same way"):
        merge_fishers(one, with_metadata(other, **changes))


def test_blocks_of_other_shapes_kinds_and_places():
    one, other, _ = parts_and_whole("mlp", kl.KFAC(), 2)
    block = other["2"]
    for wrong, message in (
        (kl.KroneckerBlock(torch.eye(2), torch.eye(7)), r"and kronecker of shape \(2, 7\)"),
        (kl.DiagonalBlock(torch.ones(3, 7)), "is kronecker of .* and diagonal of"),
        (
            kl.KroneckerBlock(block.gradient_factor.float(), block.activation_factor.float()),
            "float64 on cpu .* and .*float32",
        ),
        (
            kl.KroneckerBlock(block.gradient_factor.to("meta"), block.activation_factor.to("meta")),
            "on cpu .* on meta in",
        ),
    ):
        changed = kl.KroneckerFisher({**other, "2": wrong}, other.n_examples, other.metadata, other.statistics)
        with pytest.raises(ValueError, match=f"the block of layer '2' .*{message}"):
            merge_fishers(one, changed)


def test_moving_averages():
    made, _ = problem("mlp")
    mean, average = (estimate(made, kl.KFAC(), batches(made), ema_decay=decay) for decay in (None, 0.9))
    with pytest.raises(ValueError, match=r"the second Fisher is a moving average \(ema_decay=0\.9\).*ema_decay=None"):
        merge_fishers(mean, average)
    with pytest.raises(ValueError, match="the first Fisher is a moving average"):
        merge_fishers(average, average)
