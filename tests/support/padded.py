"""Padded text, and a network that masks the padding."""

import torch
from torch import nn


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
