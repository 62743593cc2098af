"""An accumulation in a checkpoint goes on bit for bit; looking at it and letting it decay change nothing else."""

import copy
import io
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kronlaplace as kl
from kronlaplace.layers import find_layers
from tests.support.accumulations import ALL, BY_BATCH, ONE_PASS, accumulated, assert_same, one_pass
from tests.support.assertions import assert_close
from tests.support.problems import batches, problem, several


def empty(made, name):
    return kl.Accumulation(ALL[name](), find_layers(made.model))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal(blocks, expected):
    assert list(blocks) == list(expected)
    for name, block in blocks.items():
        assert equal(block.to_tensors(), expected[name].to_tensors()), name


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.quick(12)
@pytest.mark.parametrize("network", ["mlp", "cnn", "norms", "gru"])
@pytest.mark.parametrize("name", ALL)
def test_a_restored_accumulation_goes_on_bit_for_bit(name, network):
    """Restored in the middle of every pass, and once more at the end."""
    made, _ = problem(network)
    first, *rest = batches(made, 2)
    straight, stopped = empty(made, name), empty(made, name)
    for i in range(straight.passes):
        for accumulation in (straight, stopped):
            if i:
                accumulation.next_pass()
            one_pass(accumulation, made, [first])
        saved = through_a_file(stopped.state_dict())
        before = copy.deepcopy(saved)
        stopped = empty(made, name)
        stopped.load_state_dict(saved)
        for accumulation in (straight, stopped):
            one_pass(accumulation, made, rest)
        assert equal(saved, before)  # what was loaded shares no memory
    assert stopped.weight == straight.weight == len(made.targets)
    assert_equal(stopped.finish(), straight.finish())


@pytest.mark.parametrize("name", ["kfoc-running-rank-3", "kfoc-full"])
def test_examples_that_wait_are_in_the_checkpoint(name):
    made, _, data = several((1, 3, 2, 5))
    straight, stopped = (kl.Accumulation(ALL[name](), find_layers(made.model)) for _ in range(2))
    one_pass(straight, made, data)
    one_pass(stopped, made, data[:2])
    restored = kl.Accumulation(ALL[name](), find_layers(made.model))
    restored.load_state_dict(through_a_file(stopped.state_dict()))
    one_pass(restored, made, data[2:])
    assert_equal(restored.finish(), straight.finish())


@pytest.mark.quick(4)
@pytest.mark.parametrize("network", ["cnn", "norms"])
@pytest.mark.parametrize("name", {**ONE_PASS, **BY_BATCH})
def test_looking_changes_nothing(name, network):
    made, _ = problem(network)
    accumulation = accumulated(made, ALL[name](), batches(made, 2))
    before = accumulation.state_dict()
    blocks = accumulation.so_far()
    assert equal(accumulation.state_dict(), before)
    memory = {
        t.untyped_storage().data_ptr()
        for layer in accumulation.layers
        for t in accumulation.state(layer.name).values()
        if isinstance(t, torch.Tensor)
    }
    for block in blocks.values():
        assert not memory & {t.untyped_storage().data_ptr() for t in block.to_tensors().values()}
    assert_equal(blocks, accumulation.finish())


@pytest.mark.parametrize("name", ["kfac", "tkfac", "diagonal"])
def test_looking_at_sums_copies_none(name, monkeypatch):
    made, _ = problem("cnn")
    accumulation = accumulated(made, ALL[name](), batches(made, 2))
    monkeypatch.setattr(copy, "deepcopy", None)
    accumulation.so_far()


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ["diagonal", "exact"])
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_decay_counts_what_was_seen_less(network, name):
    """With a factor that limits the total weight, as in training, the result is the mean with these weights."""
    made, _ = problem(network)
    data = batches(made, 2)
    most, weights = 5.0, []
    accumulation = empty(made, name)
    for batch in data:
        size = len(batch[1])
        factor = min(1.0, (most - size) / accumulation.weight) if accumulation.weight else 1.0
        weights = [w * factor for w in weights] + [size]
        accumulation.decay(factor)
        one_pass(accumulation, made, [batch])
        assert accumulation.weight == pytest.approx(sum(weights))
    assert accumulation.weight == pytest.approx(most)
    alone = [accumulated(made, ALL[name](), [batch]).finish() for batch in data]
    for layer, block in accumulation.so_far().items():
        expected = sum(w * one[layer].to_dense() for w, one in zip(weights, alone, strict=True)) / sum(weights)
        assert_close(block.to_dense(), expected, 1e-10, layer)


@pytest.mark.parametrize("name", {**ONE_PASS, **BY_BATCH})
def test_decay_before_every_batch_is_the_moving_average(name):
    made, _ = problem("mlp")
    by_hand = empty(made, name)
    itself = kl.Accumulation(ALL[name](), find_layers(made.model), ema_decay=0.9)
    for batch in batches(made, 2):
        by_hand.decay(0.9)
        for accumulation in (by_hand, itself):
            one_pass(accumulation, made, [batch])
    assert by_hand.weight == itself.weight
    assert_same(by_hand.finish(), itself.finish(), 1e-12)


def test_other_layers_and_estimators_are_refused():
    made, _ = problem("mlp")
    saved = accumulated(made, kl.KFAC(), batches(made)).state_dict()
    with pytest.raises(ValueError, match=r'different estimator: \{"name": "kfac".*instead of.*"tkfac"'):
        empty(made, "tkfac").load_state_dict(saved)
    with pytest.raises(ValueError, match=r"different layers \(with the shapes of their matrices\)"):
        kl.Accumulation(kl.KFAC(), find_layers(made.model)[:1]).load_state_dict(saved)


def test_a_state_that_a_file_cannot_hold():
    @dataclass(frozen=True)
    class Objects(kl.Estimator):
        name: ClassVar[str] = "objects"
        for_any_layer: ClassVar[bool] = True

        def start(self, layer):
            return {"object": object()}

        def add_gradients(self, state, gradients): ...

        def finish(self, state, layer, weight): ...

    made, _ = problem("mlp")
    message = (
        r"Objects accumulates a object, which a checkpoint cannot hold. Define Objects.to_plain and Objects.from_pl"
    )
    with pytest.raises(TypeError, match=message):
        kl.Accumulation(Objects(), find_layers(made.model)).state_dict()
