"""Networks in other coordinates: activations ``Ω φ(Φ s + τ) + γ`` and the weights that make them the same functions."""

import copy

import torch
from torch import nn


class Affine(nn.Module):
    """``M x + v`` on one axis: a part of the activation function, nothing to be learnt."""

    def __init__(self, matrix, shift, axis=-1):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("shift", shift)
        self.axis = axis

    def forward(self, x):
        return (x.movedim(self.axis, -1) @ self.matrix.T + self.shift).movedim(-1, self.axis)


def random_affine(size, axis=-1):
    """Invertible, with singular values between 0.6 and 1.6."""
    u, v = (torch.linalg.qr(torch.randn(size, size).double())[0] for _ in range(2))
    matrix = u @ torch.diag(torch.empty(size).double().uniform_(0.6, 1.6)) @ v
    return Affine(matrix, torch.randn(size).double(), axis)


def no_affine(size, axis=-1):
    return Affine(torch.eye(size).double(), torch.zeros(size).double(), axis)


@torch.no_grad()
def absorb(layer, before, after):
    """The same function with ``before`` in front of the layer and ``after`` behind it.

    ``W a + b = Φ (W† (Ω a + γ) + b†) + τ``; in a convolution ``Ω`` and ``γ`` act on the channels at every tap.
    """
    new = copy.deepcopy(layer)
    weight = torch.linalg.solve(after.matrix, layer.weight.flatten(1)).view_as(layer.weight)
    new.weight.copy_((weight.movedim(1, -1) @ torch.linalg.inv(before.matrix)).movedim(-1, 1))
    shifted = (new.weight.flatten(2).sum(2) if new.weight.ndim > 2 else new.weight) @ before.shift
    new.bias.copy_(torch.linalg.solve(after.matrix, layer.bias - after.shift) - shifted)
    return new


def transformed_mlp(model, last=random_affine):
    """Of ``linear, activation, linear, …``: every activation and every pre-activation in other coordinates."""
    modules, linears = [], [m for m in model if isinstance(m, nn.Linear)]
    activations = [m for m in model if not isinstance(m, nn.Linear)] + [nn.Identity()]
    for i, (linear, activation) in enumerate(zip(linears, activations, strict=True)):
        before = random_affine(linear.in_features)
        after = (last if i == len(linears) - 1 else random_affine)(linear.out_features)
        modules += [before, absorb(linear, before, after), after, activation]
    return nn.Sequential(*modules)


def mlp(outputs=3, hidden=(3, 3), activation=nn.Tanh):
    """No layer is wider than the outputs, or gradient factors are all but singular."""
    sizes, modules = [3, *hidden, outputs], []
    for i in range(len(sizes) - 1):
        modules += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
    return nn.Sequential(*modules[:-1]).double()


def difference(original, transformed, x):
    """Of two functions, relative."""
    with torch.no_grad():
        f, g = original(x), transformed(x)
    return float(torch.linalg.norm(f - g) / torch.linalg.norm(f))
