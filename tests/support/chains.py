"""Chains of linear layers with their moments by autograd, and the dense Fisher of K-FAC section 3.3, in float64."""

from itertools import pairwise

import torch
from torch import nn

from kronlaplace.blocks import KroneckerBlock
from kronlaplace.optim.chain_accumulation import CrossMoments

SIZES = {
    "one layer": (4, 3),
    "two layers": (3, 4, 2),
    "narrowing": (5, 4, 3, 2),
    "widening": (2, 3, 4, 5),
    "bottleneck": (4, 3, 2, 3, 4),
}


def chain(sizes, bias=True, activation=nn.Tanh):
    """A multilayer perceptron in float64."""
    modules = []
    for n_in, n_out in pairwise(sizes):
        modules += [nn.Linear(n_in, n_out, bias=bias), activation()]
    return nn.Sequential(*modules[:-1]).double()


def moments(model, x):
    """``E[a_i a_jᵀ]`` and ``E[Σ_v g_i g_jᵀ]`` for all pairs of layers; the directions are the outputs themselves."""
    outputs = []
    linears = [m for m in model if isinstance(m, nn.Linear)]
    a, inputs = x, []
    for module in model:
        if module in linears:
            inputs.append(torch.cat([a, torch.ones(len(a), 1).to(a)], 1) if module.bias is not None else a)
        a = module(a)
        if module in linears:
            outputs.append(a)
    by_direction = [torch.autograd.grad(a[:, c].sum(), outputs, retain_graph=True) for c in range(a.shape[1])]
    gradients = [torch.cat(parts).detach() for parts in zip(*by_direction, strict=True)]
    inputs = [a.detach() for a in inputs]
    return [[[u.T @ v / len(x) for v in some] for u in some] for some in (inputs, gradients)]


def blocks_of(activation, gradient, dtype=torch.float64):
    """The K-FAC blocks of all layers and the moments between adjacent ones, from all moments."""
    pairs = range(len(activation) - 1)
    blocks = [
        KroneckerBlock(gradient[i][i].to(dtype), activation[i][i].to(dtype), name=str(i))
        for i in range(len(activation))
    ]
    return blocks, [CrossMoments(activation[i][i + 1].to(dtype), gradient[i][i + 1].to(dtype)) for i in pairs]


def damped(block, damping):
    """``G + √γ/π I`` and ``A + π √γ I`` with ``π² = (tr A / p) / (tr G / q)``."""
    gradient, activation = block.gradient_factor.double(), block.activation_factor.double()
    pi = (activation.trace() / len(activation) / (gradient.trace() / len(gradient))).sqrt()
    root = damping**0.5
    eyes = torch.eye(len(gradient)).double(), torch.eye(len(activation)).double()
    return gradient + root / pi * eyes[0], activation + pi * root * eyes[1]


def dense_blocks(factors, cross):
    """All blocks of the dense ``F̂``: those given, and the others from the Markov property of its inverse."""
    n = len(factors)
    dense = [[None] * n for _ in range(n)]
    for i, pair in enumerate(factors):
        dense[i][i] = torch.kron(*pair)
    for i, link in enumerate(cross):
        dense[i][i + 1] = torch.kron(link.gradient.double(), link.activation.double())
    for distance in range(2, n):
        for i in range(n - distance):
            j = i + distance
            dense[i][j] = dense[i][i + 1] @ torch.linalg.solve(dense[i + 1][i + 1], dense[i + 1][j])
    for i in range(n):
        for j in range(i):
            dense[i][j] = dense[j][i].T
    return dense


def dense_fisher_of(factors, cross):
    """The dense ``F̂`` from the damped factors of all layers and the moments between them."""
    return torch.cat([torch.cat(row, 1) for row in dense_blocks(factors, cross)])


def dense_fisher(blocks, cross, damping):
    """The dense ``F̂`` with factored Tikhonov damping."""
    return dense_fisher_of([damped(block, damping) for block in blocks], cross)


def unit_matrices(blocks):
    """The columns of the identity, as a batch of matrices for every layer, and how to make columns of such batches."""
    sizes = [b.shape[0] * b.shape[1] for b in blocks]
    parts = torch.eye(sum(sizes)).double().split(sizes, 1)
    matrices = {b.name: part.unflatten(1, b.shape) for b, part in zip(blocks, parts, strict=True)}
    return matrices, lambda solved: torch.cat([solved[b.name].flatten(1) for b in blocks], 1).T
