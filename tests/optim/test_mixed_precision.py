"""Training under autocast, with a gradient scaler, in one or several passes per step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl


def losses_of(optimizer_type, dtype, scaled, passes=1, factor=1.0, steps=8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(60, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    optimizer = optimizer_type(model, "classification", model_fraction=1.0)
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
