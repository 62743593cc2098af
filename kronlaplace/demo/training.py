"""Training a network to the maximum a posteriori (MAP): Adam with a cosine schedule.

The objective is the mean loss plus `(weight_decay + prior_precision / N) / 2 · ‖θ‖²`: where the loss is a negative
log-likelihood, the negative log posterior over `N` under a Gaussian prior. Its minimum is where a Laplace approximation
expands. So the decay is the coupled kind, added to the gradient; the decoupled decay of AdamW belongs to no objective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = ["GaussianNLL", "Recipe", "train"]


@dataclass(frozen=True)
class Recipe:
    """The settings of the training of a network."""

    steps: int
    batch_size: int
    learning_rate: float
    prior_precision: float = 0.0
    """Precision of a Gaussian prior over all weights and biases."""
    weight_decay: float = 0.0
    """Weight decay of `torch.optim.Adam`, whatever the number of examples; the prior's, if any, comes on top."""


class GaussianNLL(nn.Module):
    """Mean Gaussian negative log-likelihood (except for the constant) whose noise is learned along with the weights.

    With the noise learned, one prior precision serves tables whose noise differs by a factor of hundreds; under a plain
    squared error each would need a weight decay of its own. At the minimum the noise variance is the mean squared
    residual.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of outputs `(N, C)` against targets `(N, C)`, a scalar."""
        return 0.5 * (outputs - targets).square().mean() * torch.exp(-2.0 * self.log_std) + self.log_std


def train(
    model: nn.Module,
    loss: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    description: str | None = None,
) -> None:
    """Train `model` in place and leave it in evaluation mode.

    The data are held as tensors and batches are drawn by index, each epoch in a new order, the last short batch left
    out (all examples in one batch where there are fewer than the batch size).

    Args:
        model: Network, on the device of the data.
        loss: Mean loss of a batch, from outputs and targets. Parameters of its own (a noise) are
            trained too, without a prior.
        x: Inputs, `(N, ...)`.
        y: Targets, `(N,)` or `(N, C)`.
        recipe: Steps, batch size, learning rate, prior precision or weight decay.
        seed: Seed of the batch order.
        description: Label of a progress bar, which shows on a terminal only; None for no bar.
    """
    generator = torch.Generator().manual_seed(seed)
    loss = loss.to(x.device)
    groups = [
        {"params": list(model.parameters()), "weight_decay": recipe.weight_decay + recipe.prior_precision / len(x)},
        {"params": list(loss.parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))
    )
    batch_size = min(recipe.batch_size, len(x))
    per_epoch = len(x) // batch_size
    model.train()
    quiet = True if description is None else None
    for step in tqdm(range(recipe.steps), desc=description, disable=quiet, leave=False, mininterval=0.2):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
        start = step % per_epoch * batch_size
        batch = order[start : start + batch_size]
        optimizer.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
