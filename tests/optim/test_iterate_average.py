"""The moving average of the weights against the recursion written out."""

import copy
import math

import pytest
import torch
from torch import nn

from kronlaplace.optim.iterate_average import IterateAverage


def network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)).double()


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model.train()(torch.randn(5, 1, 4, 4).double())  # moves the running statistics


def values(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("timescale", [0.5, 7, -1 / math.log(0.99)])
def test_it_is_the_recursion_from_the_start(timescale):
    model = network()
    expected, average = values(model), IterateAverage(model, timescale)
    decay = math.exp(-1 / timescale)
    for _ in range(5):
        perturb(model)
        average.update()
        expected = {name: decay * expected[name] + (1 - decay) * t for name, t in values(model).items()}
    last = values(model)
    with average.applied():
        for name, t in values(model).items():
            if t.is_floating_point():
                torch.testing.assert_close(t, expected[name])
    assert all(torch.equal(t, last[name]) for name, t in values(model).items())


def test_the_weights_return_after_an_error():
    model = network()
    average = IterateAverage(model, 3)
    perturb(model)
    last = values(model)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert all(torch.equal(t, last[name]) for name, t in values(model).items())
    average.update()


def test_no_updates_and_no_nesting_while_applied():
    average = IterateAverage(network(), 3)
    with average.applied():
        with pytest.raises(RuntimeError, match="average the average"):
            average.update()
        with pytest.raises(RuntimeError, match="nested"), average.applied():
            pass


def test_copies_and_checkpoints():
    model = network()
    average = IterateAverage(model, 3)
    perturb(model)
    average.update()
    other = copy.deepcopy(model)
    resumed = IterateAverage(other, 3)
    resumed.load_state_dict(average.state_dict())
    for m, a in ((model, average), (other, resumed)):
        torch.manual_seed(1)
        perturb(m)
        a.update()
    target = network()
    average.copy_to(target)
    with resumed.applied():
        for (name, t), (_, expected) in zip(target.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(t, expected) or not t.is_floating_point(), name
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        average.copy_to(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="checkpoint"):
        average.load_state_dict({"average": {}})


def test_half_precision_is_averaged_in_single_precision():
    model = nn.Linear(2, 2, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1)
    average = IterateAverage(model, 1000)
    with torch.no_grad():
        model.weight.fill_(2)
    for _ in range(1000):
        average.update()
    with average.applied():
        torch.testing.assert_close(model.weight.float(), torch.full((2, 2), 2 - 1 / math.e), rtol=0.01, atol=0)


def test_a_timescale_is_positive():
    for timescale in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="timescale"):
            IterateAverage(nn.Linear(2, 2), timescale)
