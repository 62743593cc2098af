"""What a test is run on: a small float64 network with data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.support.oracles.blocks import n_examples


@dataclass
class Case:
    model: nn.Module
    inputs: Any  # a tensor or a dict of tensors
    targets: torch.Tensor
    likelihood: str
    layers: list  # names of the modules with parameters of their own
    batch_size: int = 2

    def batches(self, size=None, order=None):
        """The data in batches; ``order`` are indices of examples."""
        order = torch.arange(len(self.targets)) if order is None else order
        return [(select(self.inputs, part), self.targets[part]) for part in order.split(size or self.batch_size)]


def select(inputs, index):
    return {k: v[index] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[index]


def case(model, inputs, outputs, likelihood="classification", per_pixel=False):
    """Random parameters (also of the normalisations, which start at ones and zeros) and targets for a network."""
    model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 or "bias" in name:
                nn.init.normal_(parameter, std=0.5)
                parameter.data += name == "weight"
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
        inputs = inputs.double()
    n, pixels = n_examples(inputs), inputs.shape[2:] if per_pixel else ()
    targets = {
        "classification": lambda: torch.randint(outputs, (n, *pixels)),
        "binary": lambda: torch.randint(2, (n, outputs, *pixels)).double(),
        "regression": lambda: torch.randn(n, outputs, *pixels).double(),
    }[likelihood]()
    layers = [name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))]
    return Case(model, inputs, targets, likelihood, layers)
