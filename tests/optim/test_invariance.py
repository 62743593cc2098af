"""Undamped natural-gradient training does not see affine changes of activations and pre-activations (K-FAC Theorem 1)."""

import pytest
import torch

import kronlaplace as kl
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.curvature_pass import accumulate_batch
from kronlaplace.layers import find_layers
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.observer import NetworkObserver
from kronlaplace.optim.chain import find_chain
from kronlaplace.optim.chain_accumulation import ChainAccumulation
from kronlaplace.optim.tridiagonal import TridiagonalInverse
from tests.support.reparameterizations import difference, mlp, transformed_mlp

STEPS = 20


def train(model, batches, lr, structure):
    layers = find_layers(model)
    kind = ChainAccumulation if structure == "block-tridiagonal" else Accumulation
    damping = kl.damping.FactoredTikhonov(0.0)
    with NetworkObserver(model, layers, layout=kl.find_layout(model, batches[0][0])) as observer:
        for x, y in batches:
            outputs = model(x)
            accumulation = kind(kl.KFAC(), layers)
            if structure == "block-tridiagonal":
                assert find_chain(observer, len(x)) == layers
            accumulate_batch(
                observer, outputs, kl.Gaussian(), DirectionSampling("exact"), accumulation, retain_graph=True
            )
            loss = 0.5 * (outputs - y).square().sum() / len(x)
            parameters = {name: p for layer in layers for name, p in layer.parameters.items()}
            gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
            matrices = {layer.name: layer.assemble({n: gradients[n] for n in layer.parameters}) for layer in layers}
            blocks = accumulation.so_far()
            if structure == "block-tridiagonal":
                inverse = TridiagonalInverse(list(blocks.values()), accumulation.cross_moments(), damping)
                solved = inverse.solve(matrices)
            else:
                solved = {name: damping.invert(block).solve(matrices[name]) for name, block in blocks.items()}
            with torch.no_grad():
                for layer in layers:
                    for name, part in layer.split_directions(solved[layer.name]).items():
                        parameters[name] -= lr * part


@pytest.mark.parametrize("structure", ["block-diagonal", "block-tridiagonal"])
def test_reparameterized_networks_stay_the_same_function(structure):
    torch.manual_seed(0)
    model = mlp(hidden=(3, 3))
    transformed, fresh = transformed_mlp(model), torch.randn(7, 3).double()
    batches = [(torch.randn(40, 3).double(), torch.randn(40, 3).double()) for _ in range(STEPS)]
    with torch.no_grad():
        before = model(fresh)
    assert difference(model, transformed, fresh) < 1e-11
    for network in (model, transformed):
        train(network, batches, 0.05, structure)
    print(difference(model, transformed, fresh), torch.linalg.norm(model(fresh) - before) / torch.linalg.norm(before))
    assert difference(model, transformed, fresh) < 1e-6
