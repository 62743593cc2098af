"""Natural gradients in dense algebra, and a training step of an optimizer."""

import torch
from torch.func import functional_call

import kronlaplace as kl
from kronlaplace.blocks import DiagonalBlock, KroneckerBlock
from tests.support import oracles
from tests.support.dampings import damped


def mean_loss(likelihood, outputs, targets):
    """The mean over examples of the negative log-likelihood."""
    losses = [oracles.negative_log_likelihood(likelihood, f, y) for f, y in zip(outputs, targets, strict=True)]
    return torch.stack(losses).mean()


def step(optimizer, model, x, y, likelihood="classification"):
    optimizer.zero_grad()
    outputs = model(x)
    optimizer.update_curvature(outputs)
    mean_loss(likelihood, outputs, y).backward()
    optimizer.step()


def matrix(block, values):
    """A block's ``(q, p)`` matrix of values by parameter name."""
    return torch.cat([values[name].detach().reshape(block.q, -1) for name in block.parameters], 1)


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def flat(values):
    return torch.cat([v.detach().flatten() for v in values.values()])


def move(model, step):
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += step[name]


def block_of(data, rule):
    """The block of a layer as the estimator's rule makes it: a container of the oracle's tensors."""
    if rule is None or data.block.diagonal:
        return DiagonalBlock(oracles.diagonal(data.X).diagonal().view(data.X.shape[2:]).clone(), data.block.name)
    scales, G, A = zip(*(rule(group) for group in data.groups), strict=True)
    scale = torch.stack([torch.as_tensor(s, dtype=torch.float64) for s in scales])
    return KroneckerBlock(torch.stack(G), torch.stack(A), scale, data.block.name)


def natural_direction(model, x, y, damping, decay=0.0, likelihood="classification", strategy=kl.damping.Tikhonov):
    """``−(F̂ + (γ + η) I)⁻¹ (∇h + η θ)`` with K-FAC's blocks at the present weights, as a dict by parameter name."""
    data = oracles.gradients(model, x, likelihood)
    parameters = dict(model.named_parameters())
    loss = mean_loss(likelihood, model(x), y)
    gradient = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    gradient = {name: g + decay * parameters[name].detach() for name, g in gradient.items()}
    direction = {}
    for d in data.values():
        full = damped(strategy, block_of(d, oracles.kfac_expand), damping + decay)
        solved = torch.linalg.solve(full, matrix(d.block, gradient).flatten()).view(d.X.shape[2:])
        sizes = [parameters[p].numel() // d.block.q for p in d.block.parameters]
        for p, part in zip(d.block.parameters, solved.split(sizes, 1), strict=True):
            direction[p] = -part.reshape(parameters[p].shape)
    return direction, gradient


def exact_fisher(model, x, likelihood="classification"):
    """The Fisher of all parameters of the batch, dense: per-example Jacobians by autograd, with the Hessian of the loss."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total = 0
    for example in x:

        def outputs(values, example=example):
            return functional_call(model, values, (example[None],))[0]

        rows = torch.func.jacrev(outputs)(parameters)
        J = torch.cat([rows[name].flatten(1) for name in parameters], 1)
        total = total + J.T @ oracles.output_metric(likelihood, outputs(parameters)) @ J
    return total / len(x)
