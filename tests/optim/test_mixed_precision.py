"""Training under autocast, with a gradient scaler, in one or several passes per step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl


def losses_of(optimizer_type, dtype, scaled, passes=1, factor=1.0, steps=8, n=60, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(n, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    optimizer = optimizer_type(model, "classification", **{"model_fraction": 1.0} | options)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for part in range(passes):
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                outputs = model(x[part::passes])
                loss = factor * F.cross_entropy(outputs, y[part::passes]) / passes
            optimizer.update_curvature(outputs)
            scaler.scale(loss).backward()
            total += float(loss.detach())
        scaler.step(optimizer)
        scaler.update()
        losses.append(total)
    optimizer.close()
    return losses


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", [kl.NaturalGradient, kl.AdaptiveKFAC])
def test_training_is_almost_that_in_single_precision(optimizer, dtype, scaled, passes):
    rounded = losses_of(optimizer, dtype, scaled, passes)
    plain = losses_of(optimizer, None, False, passes)
    assert rounded[-1] < rounded[0]
    assert rounded[:3] == pytest.approx(plain[:3], rel=0.05)


@pytest.mark.parametrize("scaled", [False, True])
def test_wrong_losses_are_still_found(scaled):
    with pytest.raises(ValueError, match="not that of the mean"):
        losses_of(kl.NaturalGradient, torch.bfloat16, scaled, factor=2.5)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.3, 0.25])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("optimizer", [kl.NaturalGradient, kl.AdaptiveKFAC])
def test_the_scale_is_exact_on_a_small_part_of_a_small_batch(optimizer, passes, factor):
    """A scale that is a power of two rounds nothing, so training is the same; a factor of the loss is not taken for one."""
    settings = {"passes": passes, "factor": factor, "steps": 12, "n": 20, "model_fraction": 1 / 10, "weight_decay": 0.1}
    scaled = losses_of(optimizer, None, True, **settings)
    assert scaled == pytest.approx(losses_of(optimizer, None, False, **settings), rel=1e-4)


@pytest.mark.parametrize("optimizer", [kl.NaturalGradient, kl.AdaptiveKFAC])
def test_a_scaler_at_the_default_part_of_a_batch(optimizer):
    settings = {"steps": 12, "n": 20, "model_fraction": None if optimizer is kl.NaturalGradient else 1 / 8}
    losses = losses_of(optimizer, torch.float16, True, **settings)
    assert losses[-1] < losses[0]


def test_gradients_of_a_step_that_the_scaler_left_out_do_not_count():
    """Also where the gradients are cleared between the forward and the backward pass."""
    model = nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu")
    x, y = torch.randn(8, 3), torch.randint(2, (8,))
    scales = []
    with kl.NaturalGradient(model, "classification") as optimizer:
        for factor in (1.0, float("inf"), 1.0):
            outputs = model(x)
            optimizer.update_curvature(outputs)
            optimizer.zero_grad()
            scale = scaler.get_scale()
            (scaler.scale(F.cross_entropy(outputs, y)) * factor).backward()
            scaler.unscale_(optimizer)
            scales.append(float(optimizer._passes.scale.power_of_two(torch.ones(()))) / scale)
            scaler.step(optimizer)
            scaler.update()
    assert scales[::2] == [1, 1]


def test_no_hook_stays_on_the_parameters():
    model = nn.Linear(3, 2)
    optimizer = kl.NaturalGradient(model, "classification")
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(torch.randn(8, 3))
        optimizer.update_curvature(outputs)
        F.cross_entropy(outputs, torch.randint(2, (8,))).backward()
        optimizer.step()
        assert not any(p._backward_hooks for p in model.parameters())
    optimizer.update_curvature(model(torch.randn(8, 3)))
    optimizer.close()
    assert not any(p._backward_hooks for p in model.parameters())
