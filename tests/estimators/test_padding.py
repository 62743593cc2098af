"""Padded text: which blocks stay the same when sentences are padded to a longer length."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.assertions import assert_close


class Reader(nn.Module):
    """Masked attention, and a head on the first token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.key, self.value, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x, attention_mask):
        scores = (self.key(x[:, :1]) @ self.key(x).mT).masked_fill(attention_mask[:, None] == 0, -torch.inf)
        return self.head(torch.tanh(scores.softmax(-1) @ self.value(x))[:, 0])


def batch(length):
    generator = torch.Generator().manual_seed(0)
    tokens, mask = torch.full((5, length, 3), 0.7, dtype=torch.float64), torch.zeros(5, length, dtype=torch.long)
    for n in range(5):
        size = 2 + n % 3
        tokens[n, :size] = torch.randn(size, 3, generator=generator, dtype=torch.float64)
        mask[n, :size] = 1
    return {"x": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1, 1])}


def moved(estimator):
    short, long = (
        kl.estimate_fisher(Reader(), [batch(length)], "classification", estimator, layers=["value"], sampling="exact")
        for length in (4, 9)
    )
    return short["value"].to_dense(), long["value"].to_dense()


@pytest.mark.parametrize(
    "estimator",
    [kl.TKFAC(), kl.KFOC(), kl.KFOC(aggregation="running"), kl.Diagonal(), kl.ExactBlock()],
    ids=["tkfac", "kfoc", "kfoc running", "diagonal", "exact"],
)
def test_padding_does_not_count(estimator):
    """No gradient reaches the padded tokens, and their inputs are weighted with it."""
    short, long = moved(estimator)
    assert_close(long, short, 1e-8)


def test_kfac_averages_over_padded_tokens():
    """As conventions.md says: inputs and gradients are averaged separately."""
    short, long = moved(kl.KFAC())
    assert torch.linalg.matrix_norm(long - short) > 0.05 * torch.linalg.matrix_norm(short)
