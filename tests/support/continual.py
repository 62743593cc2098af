"""Sequences of tasks for small float64 networks, and what a memory of them is, densely."""

import torch
from torch import nn

import kronlaplace as kl

N = 12


class Images(nn.Module):
    """A grouped convolution, a normalization and a linear layer."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(2, 4, 2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.grouped(x)).mean((2, 3))))


class MultiHead(nn.Module):
    """A body and one head for each task; ``task`` says which."""

    def __init__(self, heads=3):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(heads))
        self.task = 0

    def forward(self, x):
        return self.heads[self.task](torch.tanh(self.body(x)))


def network(kind="mlp"):
    made = {
        "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        "images": Images,
        "heads": MultiHead,
    }
    return made[kind]().double().eval()


def data(kind="mlp", n=N, classes=3):
    shape = (2, 3, 3) if kind == "images" else (4,)
    return [(torch.randn(n, *shape).double(), torch.randint(2 if kind == "heads" else classes, (n,)))]


def move(model, size=0.3):
    """Change the weights, as training does."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))


def flat(model, values=None):
    """The row-major matrices ``[W b]`` of all modules with parameters, joined."""
    parts = []
    values = dict(model.named_parameters()) if values is None else values
    for name, module in model.named_modules():
        own = [f"{name}.{key}" if name else key for key in module._parameters if module._parameters[key] is not None]
        if own:
            rows = values[own[0]].shape[0]
            parts.append(torch.cat([values[key].reshape(rows, -1) for key in own], 1).flatten())
    return torch.cat(parts)


def learned(memory, kind="mlp", tasks=3, estimator="kfac"):
    """Let a memory see some tasks.

    Returns:
        The sum over data of each task's dense Fisher, and the weights at its end.
    """
    fishers, ends = [], []
    for _ in range(tasks):
        move(memory.model)
        task = data(kind)
        memory.consolidate(task)
        fishers.append(N * kl.estimate_fisher(memory.model, task, "classification", estimator).to_dense())
        ends.append(flat(memory.model).detach())
    return fishers, ends


def penalty_and_gradient(memory):
    """The penalty at the weights now, and its gradient by autograd as `flat` has it."""
    names, parameters = zip(*memory.model.named_parameters(), strict=True)
    value = memory.penalty()
    grads = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
    return value.detach(), flat(memory.model, dict(zip(names, grads, strict=True)))


def rearranged(dense, q, p):
    """Van Loan's rearrangement, whose rank-one matrices are the Kronecker products ``G ⊗ A``: shape ``(q², p²)``."""
    return dense.reshape(q, p, q, p).permute(0, 2, 1, 3).reshape(q * q, p * p)


def arranged(matrix, q, p):
    """The inverse of `rearranged`."""
    return matrix.reshape(q, q, p, p).permute(0, 2, 1, 3).reshape(q * p, q * p)


def best_rank(dense, q, p, rank):
    u, s, v = torch.linalg.svd(rearranged(dense, q, p), full_matrices=False)
    return arranged((u[:, :rank] * s[:rank]) @ v[:rank], q, p)


def blockwise(model, dense, function):
    """Apply a function ``(block, q, p)`` to the diagonal blocks of a dense matrix, one for each group of rows of a layer."""
    blocks, start = [], 0
    for layer in kl.find_layers(model):
        q, p = layer.shape
        for _ in range(layer.groups):
            stop = start + q * p // layer.groups
            diagonal = not layer.has_kronecker_factors
            part = dense[start:stop, start:stop]
            blocks.append(part if diagonal else function(part, q // layer.groups, p))
            start = stop
    return torch.block_diag(*blocks)


def partial_traces(block, q, p):
    """The traces over inputs, ``(q, q)``, and over outputs, ``(p, p)``."""
    four = block.reshape(q, p, q, p)
    return torch.einsum("iaja->ij", four), torch.einsum("iaib->ab", four)


def marginal_product(block, q, p):
    """The Kronecker product with the same partial traces."""
    gradient, activation = partial_traces(block, q, p)
    return torch.kron(gradient, activation) / block.trace()


def in_common_basis(block, q, p):
    """Only the diagonal in the eigenbasis of the partial traces."""
    basis = torch.kron(*(torch.linalg.eigh(moment).eigenvectors for moment in partial_traces(block, q, p)))
    return basis @ torch.diag((basis.mT @ block @ basis).diagonal()) @ basis.mT


def close(actual, expected, rtol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
