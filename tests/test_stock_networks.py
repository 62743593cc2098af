"""Networks as practitioners bring them: nothing is refused, and the functional variance is that of the blocks."""

import copy
import warnings

import pytest
import torch

import kronlaplace as kl
from tests.support.assertions import assert_close
from tests.support.stock_networks import CLASSES, LARGE, NAMES, stock_network

FEWER_FACTORS = {
    "timm/beit_base_patch16_224": "the projections of query, key and value are used by a function",
    "torchvision/SwinTransformer": "attention uses its projections by a function",
    "torchvision/SwinTransformerV2": "attention uses its projections by a function",
}
"""Networks of whose parameters less than 90 % have Kronecker factors, and why."""

DENSE = [
    "timm/deit3_small_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/convnext_atto",
    "timm/convnextv2_atto",
    "transformers/GPT2",
    "transformers/Llama",
    "transformers/OPT",
    "transformers/ViT",
    "torchvision/SwinTransformer",
    "torchvision/ConvNeXt",
]
"""Networks that are small enough for the dense computation of the functional variance."""


def state_of(model):
    """Everything of a network that a fit might change."""
    return {
        name: (
            module.training,
            {key: id(value) for key, value in vars(module).items() if not key.startswith("_")},
            [len(getattr(module, hooks)) for hooks in vars(module) if hooks.endswith("_hooks")],
            [(key, id(p), p.requires_grad, p.grad) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.quick(6)
@pytest.mark.parametrize("estimator", ["kfac", "tkfac"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in NAMES])
def test_it_fits_and_predicts_and_is_left_as_it_was_found(name, estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        model, x = stock_network(name)
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    posterior = kl.KronLaplace(model, "classification", estimator).fit([(x, torch.arange(3))])
    probabilities = posterior.predict(x)
    assert probabilities.shape == (3, CLASSES)
    assert_close(probabilities.sum(1), torch.ones(3), 1e-5)
    assert state_of(model) == before
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    coverage = posterior.fisher.coverage()
    assert coverage.share == pytest.approx(1), coverage.reasons()
    share = sum(row.share for row in coverage if row.block in ("kronecker", "truncated"))
    assert (share >= 0.9) is (name not in FEWER_FACTORS), share


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
def test_functional_variance_is_that_of_the_blocks(name):
    """The dense computation from the same blocks, with Jacobians by autograd, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = stock_network(name)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    posterior = kl.KronLaplace(model, "classification").fit([(x, torch.arange(3))])
    layers = {layer.name: layer for layer in kl.find_layers(model)}
    own = dict(model.named_parameters())
    covariance = posterior.covariance()
    expected = torch.zeros(2, CLASSES, CLASSES, dtype=torch.float64)
    for n in range(2):
        outputs = model(x[n : n + 1])
        outputs = getattr(outputs, "logits", outputs)[0]
        grads = [torch.autograd.grad(out, list(own.values()), retain_graph=True, allow_unused=True) for out in outputs]
        filled = [
            {key: torch.zeros_like(p) if g is None else g for (key, p), g in zip(own.items(), some, strict=True)}
            for some in grads
        ]
        for block in posterior.fisher:
            rows = torch.stack([layers[block].assemble({k: f[k] for k in layers[block].parameters}) for f in filled])
            solved = covariance[block].solve(rows)
            expected[n] += rows.flatten(1) @ solved.flatten(1).T
    found = posterior.functional_variance(x[:2])
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6
