"""The loss, its Hessian and the Jacobian of one layer; its inputs and gradients, example by example."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


def weight_matrix(module):
    """``[W b]`` of a layer as (q, p)."""
    weight = module.weight.detach().flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.detach()[:, None]], dim=1)


def negative_log_likelihood(name, f, y, noise_std=1.0):
    """Of one example: f of shape (C,)."""
    if name == "classification":
        return F.cross_entropy(f[None], y[None], reduction="sum")
    if name == "binary":
        return F.binary_cross_entropy_with_logits(f, y, reduction="sum")
    return 0.5 * ((f - y) / noise_std).square().sum() + f.numel() * math.log(noise_std * math.sqrt(2 * math.pi))


def output_metric(name, f, noise_std=1.0):
    """Fisher of one example's output, (C, C): the Hessian of its loss (the same for any label, in these families).

    Outputs with more axes than the classes (pixels, tokens) are that many independent outputs, flattened.
    """
    y = torch.zeros(f.shape[1:], dtype=torch.long) if name == "classification" else torch.zeros_like(f)
    hessian = torch.autograd.functional.hessian(lambda f: negative_log_likelihood(name, f, y, noise_std), f)
    return hessian.reshape(f.numel(), f.numel())


def layer_io(model, module, x):
    """Of one example: a (T, p), the gradients of every network output (C, T, q), and the outputs (C,)."""
    seen = {}
    handle = module.register_forward_hook(lambda m, args, out: seen.update(x=args[0].detach().clone()))
    with torch.no_grad():
        f = model(x[None])[0].reshape(-1)
    handle.remove()
    return patches(module, seen["x"]), output_gradients(model, module, x), f


def patches(module, x):
    """What meets the weights of a layer's first output at each position: a (T, p) for an input of one example."""
    one = single_output(module)
    n_weights = one.weight.numel()

    def first_channel(w):
        parameters = {"weight": w[:n_weights].reshape(one.weight.shape)}
        if module.bias is not None:
            parameters["bias"] = w[n_weights:]
        return functional_call(one, parameters, (x,)).reshape(-1)

    # The output of a layer is linear in its weights: the derivative is the patch that meets them.
    p = n_weights + (module.bias is not None)
    return torch.autograd.functional.jacobian(first_channel, torch.zeros(p, dtype=torch.float64))


def single_output(module):
    """The same layer with one output channel; of a grouped convolution, that of one group."""
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, 1, bias=module.bias is not None, dtype=torch.float64)
    return type(module)(
        module.in_channels // module.groups,
        1,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        bias=module.bias is not None,
        padding_mode=module.padding_mode,
        dtype=torch.float64,
    )


def output_gradients(model, module, x):
    """Gradient of each network output by the layer's output, for one example: (C, T, q).

    The layer's output is shifted by an extra variable; the derivative by that variable at zero is what we want.
    """
    shape = {}
    probe = module.register_forward_hook(lambda m, args, out: shape.update(s=out.shape))
    with torch.no_grad():
        model(x[None])
    probe.remove()

    def shifted(epsilon):
        handle = module.register_forward_hook(lambda m, args, out: out + epsilon)
        try:
            return model(x[None])[0].reshape(-1)
        finally:
            handle.remove()

    jacobian = torch.autograd.functional.jacobian(shifted, torch.zeros(shape["s"], dtype=torch.float64))
    jacobian = jacobian[:, 0]  # (C, *layer output of one example)
    if isinstance(module, nn.Linear):
        return jacobian.reshape(len(jacobian), -1, jacobian.shape[-1])
    return jacobian.flatten(2).transpose(1, 2)


def kfac_factors(model, module, inputs, name, noise_std=1.0):
    """A and G by their definition, one example at a time (K-FAC Eq. 1, KFC Eq. 30 and 31)."""
    A = G = 0
    for x in inputs:
        a, g, f = layer_io(model, module, x)
        A = A + a.T @ a
        G = G + torch.einsum("cti,cd,dtj->ij", g, output_metric(name, f, noise_std), g) / len(a)
    return A / len(inputs), G / len(inputs)


def layer_jacobian(model, module_name, x):
    """Derivative of the outputs of one example by a layer's ``[W b]``: (C, q·p)."""
    module = model.get_submodule(module_name)
    names = [n for n in ("weight", "bias") if getattr(module, n) is not None]
    prefix = f"{module_name}." if module_name else ""

    def run(*values):
        parameters = {prefix + n: v for n, v in zip(names, values, strict=True)}
        return functional_call(model, parameters, (x[None],))[0].reshape(-1)

    parts = torch.autograd.functional.jacobian(run, tuple(getattr(module, n).detach() for n in names))
    weight = parts[0].flatten(2)
    joined = weight if len(parts) == 1 else torch.cat([weight, parts[1][:, :, None]], dim=2)
    return joined.flatten(1)


def jacobian(model, layers, x):
    """Of one example, over all ``layers`` in their order: (C, P)."""
    return torch.cat([layer_jacobian(model, name, x) for name in layers], dim=1)


def log_likelihood(model, inputs, targets, name, noise_std=1.0):
    return -sum(
        negative_log_likelihood(
            name, model(x[None])[0].detach().reshape(-1), y.reshape(-1) if name != "classification" else y, noise_std
        )
        for x, y in zip(inputs, targets, strict=True)
    )
