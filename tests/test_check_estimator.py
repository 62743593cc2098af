"""`kronlaplace.testing.check_estimator` passes for the package's estimators and fails for wrong ones, naming the law."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import kronlaplace as kl
from kronlaplace.testing import check_estimator, temporary_registrations

ESTIMATORS = {
    "kfac": (kl.KFAC(), {}),
    "reduce": (kl.KFAC("reduce"), {}),
    "sua": (kl.SUA(), {}),
    "tkfac": (kl.TKFAC(), {"keeps_trace": True}),
    "uncorrelated": (kl.TKFAC("uncorrelated"), {}),
    "kfoc": (kl.KFOC(sweeps=1), {}),
    "running": (kl.KFOC(aggregation="running", rank=4), {"sums": False}),
    "ekfac": (kl.EKFAC(basis=kl.TKFAC()), {"keeps_trace": True}),
    "diagonal": (kl.Diagonal(), {"keeps_trace": True}),
    "exact": (kl.ExactBlock(), {"keeps_trace": True}),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_of_the_package(name):
    estimator, options = ESTIMATORS[name]
    check_estimator(estimator, **options)


@dataclass(frozen=True)
class Own(kl.Estimator):
    """The diagonal, written out."""

    name: ClassVar[str] = "own"
    for_any_layer: ClassVar[bool] = True

    def start(self, layer):
        return {"values": torch.zeros(layer.shape, dtype=layer.dtype, device=layer.device)}

    def add_gradients(self, state, gradients):
        state["values"] += gradients.vectors().square().sum(0).view(state["values"].shape)

    def finish(self, state, layer, weight):
        return kl.DiagonalBlock(state["values"] / weight, layer.name)

    def combine(self, first, second, weights):
        return kl.DiagonalBlock(weights[0] * first.values + weights[1] * second.values, first.name)


class Absolute(Own):
    name = "absolute"

    def add_gradients(self, state, gradients):
        state["values"] += gradients.vectors().abs().sum(0).view(state["values"].shape)


class OverGroups(Own):
    name = "over groups"

    def add_gradients(self, state, gradients):
        x = gradients.weight_gradients().square().sum((0, 1))
        state["values"] += x.repeat(gradients.layer.groups, 1)


class Single(Own):
    name = "single"

    def start(self, layer):
        return {"values": torch.zeros(layer.shape)}


class MeanOfMeans(Own):
    name = "mean of means"

    def add_gradients(self, state, gradients):
        state["values"] += gradients.vectors().square().mean(0).view(state["values"].shape)

    def finish(self, state, layer, weight):
        return kl.DiagonalBlock(state["values"] / weight, layer.name)


class LastBatch(Own):
    name = "last batch"

    def end_batch(self, state, batch):
        state["examples"] = torch.tensor(float(batch.n_examples))

    def finish(self, state, layer, weight):
        return kl.DiagonalBlock(state["values"] / weight * state["examples"], layer.name)

    def merge(self, state, other):
        return {"values": state["values"] + other["values"], "examples": state["examples"]}


class Forgetful(Own):
    name = "forgetful"

    def merge(self, state, other):
        return state


class Undecayed(Own):
    name = "undecayed"

    def decay(self, state, factor):
        pass


class Negative(Own):
    name = "negative"

    def finish(self, state, layer, weight):
        return kl.DiagonalBlock(state["values"] / weight - 1, layer.name)


class Asymmetric(Own):
    name = "asymmetric"

    def finish(self, state, layer, weight):
        size = state["values"].numel()
        return kl.DenseBlock(
            state["values"].flatten().expand(size, size).clone() / weight, layer.shape, 1.0, layer.name
        )


class Transposed(Own):
    name = "transposed"

    def finish(self, state, layer, weight):
        return kl.DiagonalBlock(state["values"].T / weight, layer.name)


class Nameless(Own):
    name = "nameless"

    def finish(self, state, layer, weight):
        return kl.DiagonalBlock(state["values"] / weight)


class Sum(Own):
    name = "sum"

    def combine(self, first, second, weights):
        return kl.DiagonalBlock(first.values + second.values, first.name)


class Restarted(Own):
    name = "restarted"

    def state_from(self, block, layer, weight):
        return {"values": block.values.clone()}


class Half(Own):
    name = "half"

    def finish(self, state, layer, weight):
        return kl.DiagonalBlock(0.5 * state["values"] / weight, layer.name)


@dataclass(frozen=True)
class Counting(Own):
    name = "counting"
    seen: list = field(default_factory=list)

    def add_gradients(self, state, gradients):
        self.seen.append(gradients.n_examples)
        super().add_gradients(state, gradients)


@dataclass(frozen=True)
class Pair(Own):
    name = "pair"
    sizes: tuple = (1, 2)


class Growing(Own):
    """Keeps in its class what belongs into the state."""

    name = "growing"
    factor = 1.0

    def finish(self, state, layer, weight):
        Growing.factor *= 1.1
        return kl.DiagonalBlock(Growing.factor * state["values"] / weight, layer.name)


BROKEN = {
    Absolute: r"layer '0' of the perceptron: a metric four times as large makes the block four times as large; at",
    OverGroups: r"the same data|the trace is that of the exact block",
    Single: r"the block is in torch\.float64 on cpu; .*torch\.float32",
    MeanOfMeans: r"the size of batches does not matter; at",
    LastBatch: r"the size of batches does not matter|the order of batches does not matter",
    Forgetful: r"merge returns the state of both data sets",
    Undecayed: r"data decayed to a quarter, with a quarter of the weight, give the same block",
    Negative: r"the block is positive semidefinite; .*eigenvalues go from -",
    Asymmetric: r"the block is symmetric",
    Transposed: r"the block's shape is \(5, 5\)|the block's shape is \(5, 2\)|estimate_fisher works",
    Nameless: r"the block has the layer's name; .*block",
    Sum: r"combine returns the block of both data sets",
    Restarted: r"state_from returns the state that data with a known block would have left",
    Half: r"the trace is that of the exact block; .* instead of",
    Counting: r"an estimator holds only settings",
    Pair: r"JSON restores Pair",
    Growing: r"the same data give the same block again",
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_an_estimator_that_breaks_a_law(broken):
    with temporary_registrations():
        kl.register_estimator(broken)
        with pytest.raises(AssertionError, match=BROKEN[broken]):
            check_estimator(broken(), keeps_trace=True)


def test_an_estimator_that_keeps_them():
    with temporary_registrations():
        kl.register_estimator(Own)
        check_estimator(Own(), keeps_trace=True)
    with pytest.raises(AssertionError, match=r"Own is registered.*@kl\.register_estimator"):
        check_estimator(Own())
    with pytest.raises(TypeError, match=r"check_estimator takes a kl\.Estimator"):
        check_estimator(Own)


def test_a_summary_is_no_sum():
    with pytest.raises(AssertionError, match="the size of batches does not matter"):
        check_estimator(kl.KFOC(aggregation="approx"))
    check_estimator(kl.KFOC(aggregation="approx"), sums=False)
