"""How many examples of a batch something is computed on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace.layers import LayerBatch, LayerCall, find_layers
from kronlaplace.optim.part import Part, part_of
from tests.support.assertions import assert_close


@pytest.mark.parametrize("n", [1, 7, 30, 1000])
@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_fraction_is_rounded_up(n, tenths):
    """As integers, so that the rounding of ``0.1 · 30`` plays no role."""
    assert Part(tenths / 10).count(n) == -(-n * tenths // 10)


@pytest.mark.parametrize(("n", "count"), [(3, 3), (20, 20), (30, 24), (96, 24), (100, 25)])
def test_small_batches_have_a_larger_part(n, count):
    assert Part(1 / 4, fewest=24).count(n) == count


def test_the_users_fraction_has_no_fewest():
    assert part_of(0.1, "model_fraction", Part(1 / 4, fewest=24)).count(30) == 3
    assert part_of(None, "model_fraction", Part(1 / 4, fewest=24)).count(30) == 24
    for value, error in ((0.0, ValueError), (1.5, ValueError), ("half", TypeError)):
        with pytest.raises(error, match="model_fraction"):
            part_of(value, "model_fraction", Part(1.0))


@pytest.mark.parametrize(("n", "fraction"), [(30, 1.0), (64, 1 / 2), (320, 1 / 4)])
def test_the_averages_have_a_quarter_of_a_large_batch_unless_told_otherwise(n, fraction):
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(n, 3)
    blocks = []
    for settings in ({}, {"curvature_fraction": fraction}):
        network = copy.deepcopy(model)
        with kl.NaturalGradient(network, "classification", sampling="exact", **settings) as optimizer:
            outputs = network(x)
            optimizer.update_curvature(outputs)
            F.cross_entropy(outputs, torch.zeros(n, dtype=torch.long)).backward()
            optimizer.step()
            blocks.append(optimizer.blocks["0"].to_dense())
    assert torch.equal(*blocks)


# -- Moments of inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape", "n", "counts"),
    [
        (nn.Conv2d(16, 16, 3, padding=1), (16, 32, 32), 32, (8, 16)),
        (nn.Conv2d(16, 16, 3, padding=1), (16, 32, 32), 128, (32, 64)),
        (nn.Conv2d(16, 16, 3, padding=1), (16, 32, 32), 5, (5, 5)),
        (nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8), 32, (10, 16)),  # 577 columns, 64 positions
        (nn.Conv2d(64, 64, 3, stride=2, padding=1), (64, 8, 8), 30, (30, 16)),
        (nn.Linear(70, 3), (10, 70), 64, (16, 32)),
        (nn.Linear(90, 3), (5, 90), 64, (19, 32)),
        (nn.Linear(2, 3), (2,), 64, (64, 64)),
    ],
)
def test_many_positions_allow_for_fewer_examples(module, shape, n, counts):
    """Of the inputs at least a quarter, eight, and as many positions as columns; of weight gradients half, and 16."""
    (layer,) = find_layers(nn.Sequential(module))
    batch = LayerBatch(layer, [LayerCall(torch.zeros(n, *shape))])
    assert Part(1 / 4, fewer_for_moments=True).moment_examples(batch) == counts
    assert Part(1 / 4).moment_examples(batch) == (n, n)


@pytest.mark.parametrize("estimator", ["kfac", "tkfac"])
@pytest.mark.parametrize("fraction", [None, 1.0])
def test_a_moment_is_the_mean_over_its_examples(fraction, estimator):
    """Without a word from the user, some are over fewer examples than the 40 of 160 that count."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)).double()
    batches = [torch.randn(160, 2, 4, 4).double() for _ in range(2)]
    settings = {"sampling": "exact", "curvature_every": 1, "curvature_fraction": fraction}
    with kl.NaturalGradient(model, "classification", estimator=estimator, **settings) as optimizer:
        for x in batches:
            outputs = model(x)
            optimizer.update_curvature(outputs)
        blocks = optimizer.blocks
    counted = 160 if fraction else 40
    gradients, inputs = (counted, counted) if fraction else (40, 10) if estimator == "kfac" else (20, 20)

    def mean_of(n, name):
        examples = [x[:n] for x in batches]
        return kl.estimate_fisher(model, examples, "classification", estimator, sampling="exact")[name]

    for name, numbers in (("0", (gradients, inputs)), ("3", (counted, counted))):
        of_gradients, of_inputs = (mean_of(n, name) for n in numbers)
        # The scale of factors is free: that of the optimizer's blocks has the least trace.
        expected = of_inputs.scale * torch.kron(of_gradients.gradient_factor, of_inputs.activation_factor)
        assert_close(blocks[name].to_dense(), expected, 1e-12)


@pytest.mark.parametrize("number, counts", [(3, True), (50, False)])
def test_only_the_inputs_of_examples_that_count_must_have_squares(number, counts):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(64, 3)
    x[number] *= 1e30
    with kl.NaturalGradient(model, "classification", curvature_every=1) as optimizer:
        outputs = model(x)
        if counts:
            with pytest.raises(ValueError, match="layer '0' are NaN, infinite, or so large"):
                optimizer.update_curvature(outputs)
        else:
            optimizer.update_curvature(outputs)
            assert optimizer.blocks["0"].to_dense().isfinite().all()
