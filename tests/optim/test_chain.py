"""Which networks are chains of linear layers, and the moments between their layers."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.one_batch import accumulate_batch
from kronlaplace.layers import find_layers
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.observer import NetworkObserver
from kronlaplace.optim.chain import find_chain
from kronlaplace.optim.chain_accumulation import ChainAccumulation
from tests.support.assertions import assert_close
from tests.support.chains import SIZES, chain, moments

EXACT = DirectionSampling("exact")


def chain_of(model, x, layers=None):
    with NetworkObserver(model, find_layers(model, layers), layout=kl.find_layout(model, x)) as observer:
        outputs = model(x)
        return [layer.name for layer in find_chain(observer, len(outputs))]


class Net(nn.Module):
    """A network of three linear layers that the function puts together."""

    def __init__(self, function, sizes=((3, 4), (4, 4), (4, 2))):
        super().__init__()
        self.c, self.b, self.a = (nn.Linear(*s) for s in reversed(sizes))  # not registered in the order of their use
        self.function = function

    def forward(self, x):
        return self.function(self, x)


# -- which networks are chains -------------------------------------------------------------------------------


CHAINS = {
    "activations": lambda m, x: m.c(m.b(m.a(x).tanh()).relu()),
    "no activation": lambda m, x: m.c(m.b(m.a(x))),
    "in place": lambda m, x: m.c(m.b(m.a(x).relu_()).sigmoid_()),
    "dropout and fixed maps": lambda m, x: m.c(nn.functional.dropout(m.b(m.a(x) @ torch.ones(4, 4) + 1).tanh(), 0.1)),
    "softmax of the outputs": lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()).log_softmax(1),
}


@pytest.mark.quick(5)
@pytest.mark.parametrize("function", CHAINS.values(), ids=CHAINS)
def test_chains(function):
    """In the order of their use."""
    assert chain_of(Net(function), torch.randn(5, 3)) == ["a", "b", "c"]


def test_a_part_of_a_network_is_a_chain():
    """Layers before and after it do not matter."""
    model = chain((3, 4, 4, 2))
    assert chain_of(model, torch.randn(5, 3).double(), ["2", "4"]) == ["2", "4"]
    assert chain_of(model, torch.randn(5, 3).double(), ["0", "2"]) == ["0", "2"]


def test_one_layer_is_a_chain():
    assert chain_of(nn.Linear(3, 2), torch.randn(5, 3)) == [""]


def skipping(m, x):
    h = m.a(x).tanh()
    return m.c(m.b(h).tanh() + h)


def two_heads(m, x):
    h = m.a(x).tanh()
    return m.b(h)[:, :2] + m.c(h)


OTHERS = {
    "skip connection": (Net(skipping), (5, 3), r"'c' also gets outputs of \['a'\]"),
    "branches": (Net(two_heads), (5, 3), r"'c' (also gets outputs of|does not get its inputs from)"),
    "parallel layers": (
        Net(lambda m, x: m.c(m.a(x) + m.b(x)), ((3, 4), (3, 4), (4, 2))),
        (5, 3),
        "'b' does not get its inputs from 'a'",
    ),
    "several uses": (Net(lambda m, x: m.c(m.b(m.b(m.a(x))))), (5, 3), "'b' is called several times"),
    "positions": (Net(lambda m, x: m.c(m.b(m.a(x))).mean(1)), (5, 6, 3), r"'a' is used at several positions"),
    "positions among the rows": (
        Net(lambda m, x: m.c(m.b(m.a(x.flatten(0, 1)))).unflatten(0, (-1, 6)).mean(1)),
        (5, 6, 3),
        "'a' is used at several positions",
    ),
    "concatenated inputs": (
        Net(lambda m, x: m.c(torch.cat([m.b(m.a(x)), x], 1)), ((3, 4), (4, 4), (7, 2))),
        (5, 3),
        "'c' has 7 inputs, but 'b', the layer before it, has 4 outputs",
    ),
    "convolution": (
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 2)),
        (4, 2, 5),
        "'0' is not an nn.Linear but of type Conv1d",
    ),
    "normalization": (
        nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
        (5, 3),
        "'1' is not an nn.Linear but of type LayerNorm",
    ),
}


@pytest.mark.quick(9)
@pytest.mark.parametrize(("model", "shape", "message"), OTHERS.values(), ids=OTHERS)
def test_other_networks_are_refused(model, shape, message):
    with pytest.raises(ValueError, match=message) as error:
        chain_of(model, torch.randn(*shape))
    assert 'Use structure="block-diagonal"' in str(error.value)


def test_a_layer_in_between_that_is_left_out():
    """What comes before is then a function of the layer before that one, which is all that the structure needs."""
    model = chain((3, 4, 4, 4, 2))
    assert chain_of(model, torch.randn(5, 3).double(), ["0", "4", "6"]) == ["0", "4", "6"]


# -- moments -------------------------------------------------------------------------------------------------


def accumulated(model, batches, estimator=None, accumulation=ChainAccumulation, **options):
    """The accumulation of the batches, and the observer's layers."""
    layers = find_layers(model)
    accumulation = accumulation(estimator or kl.KFAC(), layers, **options)
    with NetworkObserver(model, layers) as observer:
        for i, x in enumerate(batches):
            accumulate_batch(observer, model(x), kl.Euclidean(), EXACT, accumulation, index=i)
    return accumulation


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_moments_are_those_of_the_same_draws(sizes, bias):
    model, x = chain(sizes, bias), torch.randn(12, sizes[0]).double()
    found = accumulated(model, x.split([5, 7])).cross_moments()
    activation, gradient = moments(model, x)
    assert len(found) == len(sizes) - 2
    for i, pair in enumerate(found):
        assert_close(pair.activation, activation[i][i + 1], 1e-12)
        assert_close(pair.gradient, gradient[i][i + 1], 1e-12)


def test_blocks_are_those_of_the_ordinary_accumulation():
    model, x = chain((4, 3, 2)), torch.randn(8, 4).double()
    found, expected = (
        accumulated(model, [x], accumulation=kind).finish() for kind in (ChainAccumulation, Accumulation)
    )
    for name, block in expected.items():
        assert torch.equal(found[name].gradient_factor, block.gradient_factor)
        assert torch.equal(found[name].activation_factor, block.activation_factor)


def test_drawn_labels_are_the_same_for_all_moments():
    """With one draw, the joint moment of the gradients has the rank of one draw per example."""
    model, x = chain((4, 6, 5)), torch.randn(3, 4).double()
    layers = find_layers(model)
    accumulation = ChainAccumulation(kl.KFAC(), layers)
    with NetworkObserver(model, layers) as observer:
        accumulate_batch(observer, model(x), kl.Euclidean(), DirectionSampling("mc"), accumulation)
    (cross,), blocks = accumulation.cross_moments(), accumulation.so_far()
    g, h = (blocks[layer.name].gradient_factor for layer in layers)
    joint = torch.cat([torch.cat([g, cross.gradient], 1), torch.cat([cross.gradient.T, h], 1)])
    values = torch.linalg.eigvalsh(joint)
    assert values[0] > -1e-12
    assert int((values > 1e-10 * values[-1]).sum()) == 3


def test_moving_average():
    """Moments between layers have the weights of the factors."""
    model, batches = chain((4, 3, 2)), [torch.randn(n, 4).double() for n in (5, 7, 2)]
    found = accumulated(model, batches, ema_decay=0.7).cross_moments()
    weights = [0.7 ** (2 - i) * len(x) for i, x in enumerate(batches)]
    each = [accumulated(model, [x]).cross_moments() for x in batches]
    for i, pair in enumerate(found):
        for j, moment in enumerate(pair):
            expected = sum(w * one[i][j] for w, one in zip(weights, each, strict=True)) / sum(weights)
            assert_close(moment, expected, 1e-12)


def test_start_from_moments():
    """Eq. 33 of KFC for the moments between layers."""
    model, x, y = chain((4, 3, 2)), torch.randn(9, 4).double(), torch.randn(5, 4).double()
    start, layers = accumulated(model, [x]), find_layers(model)
    cross = start.cross_moments()
    accumulation = ChainAccumulation(kl.KFAC(), layers, ema_decay=0.75)
    accumulation.start_from(start.finish(), weight=5 / 0.25, cross=cross)
    with NetworkObserver(model, layers) as observer:
        accumulate_batch(observer, model(y), kl.Euclidean(), EXACT, accumulation)
    later = accumulated(model, [y]).cross_moments()
    for pair, before, after in zip(accumulation.cross_moments(), cross, later, strict=True):
        for moment, first, second in zip(pair, before, after, strict=True):
            assert_close(moment, 0.75 * first + 0.25 * second, 1e-12)


def test_merged():
    model, x = chain((4, 3, 2)), torch.randn(9, 4).double()
    one, other = (accumulated(model, [part]) for part in x.split([4, 5]))
    one.merge(other)
    for found, expected in zip(one.cross_moments(), accumulated(model, [x]).cross_moments(), strict=True):
        for moment, correct in zip(found, expected, strict=True):
            assert_close(moment, correct, 1e-12)


@pytest.mark.parametrize("estimator", [kl.TKFAC(), kl.EKFAC(), kl.Diagonal()])
def test_other_estimators_are_refused(estimator):
    with pytest.raises(ValueError, match='Use estimator="kfac"'):
        ChainAccumulation(estimator, find_layers(chain((3, 2))))


def test_a_checkpoint_continues_to_the_bit():
    model, batches = chain((4, 3, 2)), [torch.randn(5, 4).double() for _ in range(3)]
    first, second = (
        accumulated(model, batches[:2], ema_decay=0.9),
        ChainAccumulation(kl.KFAC(), find_layers(model), 0.9),
    )
    second.load_state_dict(first.state_dict())
    layers = find_layers(model)
    for accumulation in (first, second):
        with NetworkObserver(model, layers) as observer:
            accumulate_batch(observer, model(batches[2]), kl.Euclidean(), EXACT, accumulation)
    for one, other in zip(first.cross_moments(), second.cross_moments(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_the_order_of_the_layers():
    """It can be set before moments between the layers have been seen, and no longer afterwards."""
    model, x = chain((4, 3, 2)), torch.randn(5, 4).double()
    layers = find_layers(model)
    accumulation = ChainAccumulation(kl.KFAC(), layers[::-1])
    with NetworkObserver(model, layers) as observer:
        outputs = model(x)
        accumulation.order(find_chain(observer, len(x)))
        accumulate_batch(observer, outputs, kl.Euclidean(), EXACT, accumulation)
    assert accumulation.chain == ["0", "2"]
    assert_close(accumulation.cross_moments()[0].gradient, accumulated(model, [x]).cross_moments()[0].gradient, 1e-12)
    accumulation.order(layers)
    with pytest.raises(ValueError, match=r"in the order \['2', '0'\], but called them in the order \['0', '2'\]"):
        accumulation.order(layers[::-1])


def test_a_checkpoint_is_a_copy():
    model, x = chain((4, 3, 2)), torch.randn(5, 4).double()
    accumulation = accumulated(model, [x])
    saved, before = accumulation.state_dict(), accumulation.cross_moments()
    accumulation.decay(0.5)
    other = ChainAccumulation(kl.KFAC(), find_layers(model))
    other.load_state_dict(saved)
    assert all(torch.equal(*pair) for pair in zip(other.cross_moments()[0], before[0], strict=True))


def test_a_checkpoint_without_moments_between_layers_is_refused():
    model, x = chain((4, 3, 2)), torch.randn(5, 4).double()
    saved = accumulated(model, [x], accumulation=Accumulation).state_dict()
    with pytest.raises(ValueError, match='structure="block-diagonal"'):
        ChainAccumulation(kl.KFAC(), find_layers(model)).load_state_dict(saved)
