"""BackPACK extensions give the blocks that `estimate_fisher` gives on the same batch."""

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, BatchGrad
from torch import nn

import kronlaplace as kl
from kronlaplace import extensions
from kronlaplace.likelihoods.sampling import DirectionSampling

# BackPACK's hooks on a first layer, whose input has no gradient, make torch warn.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

ESTIMATORS = {
    "kfac": (extensions.KFAC, kl.KFAC()),
    "sua": (extensions.SUA, kl.SUA()),
    "tkfac": (extensions.TKFAC, kl.TKFAC()),
    "kfoc": (extensions.KFOC, kl.KFOC()),
    "ekfac": (extensions.EKFAC, kl.EKFAC()),
    "diagonal": (extensions.Diagonal, kl.Diagonal()),
    "exact": (extensions.ExactBlock, kl.ExactBlock()),
}


def perceptron(outputs=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs, bias=False)).double(), (6, 4)


def convolution(outputs=3):
    layers = nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, outputs)).double().eval(), (6, 2, 4, 4)


def tokens(outputs=3):
    layers = nn.Embedding(7, 4), nn.Linear(4, 3), nn.Sigmoid(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6, outputs)).double(), (6, 2)


NETWORKS = {"perceptron": perceptron, "convolution": convolution, "tokens": tokens}


def problem(network, loss="classification", **options):
    torch.manual_seed(0)
    model, shape = NETWORKS[network]()
    x = torch.randint(0, 7, shape) if network == "tokens" else torch.randn(shape, dtype=torch.float64)
    labels, real = torch.arange(6).remainder(3), torch.randn(6, 3, dtype=torch.float64)
    losses = {
        "classification": (nn.CrossEntropyLoss, labels, kl.Categorical()),
        "binary": (nn.BCEWithLogitsLoss, (real > 0).double(), kl.Bernoulli()),
        "regression": (nn.MSELoss, real, kl.Euclidean()),
    }
    kind, y, likelihood = losses[loss]
    return extend(model), extend(kind(**options)), x, y, likelihood


def blocks(model, savefield):
    return {name: getattr(module, savefield) for name, module in model.named_modules() if hasattr(module, savefield)}


def assert_same(found, fisher):
    assert list(found) == list(fisher)
    for name, block in fisher.items():
        assert type(found[name]) is type(block)
        torch.testing.assert_close(found[name].to_dense(), block.to_dense())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_blocks_are_those_of_the_fisher(name, network):
    make, estimator = ESTIMATORS[name]
    model, loss, x, y, likelihood = problem(network)
    with backpack(make(sampling="exact")):
        loss(model(x), y).backward()
    assert_same(blocks(model, name), kl.estimate_fisher(model, [(x, y)], likelihood, estimator, sampling="exact"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["classification", "binary", "regression"])
def test_the_loss_tells_the_likelihood_and_not_the_scale(name, reduction):
    model, loss, x, y, likelihood = problem("perceptron", name, reduction=reduction)
    with backpack(extensions.TKFAC(sampling="exact")):
        loss(model(x), y).backward()
    assert_same(blocks(model, "tkfac"), kl.estimate_fisher(model, [(x, y)], likelihood, kl.TKFAC(), sampling="exact"))


def test_the_factors_are_backpacks_own():
    """BackPACK's exact Kronecker factors, whose weight has no column for the bias."""
    model, loss, x, y, _ = problem("perceptron")
    with backpack(extensions.KFAC(sampling="exact"), KFLR()):
        loss(model(x), y).backward()
    theirs = model[2].weight.kflr
    torch.testing.assert_close(model[2].kfac.to_dense(), torch.kron(*theirs))


@pytest.mark.parametrize("mc_samples", [1, 3])
def test_seeded_draws_are_those_of_the_fisher_and_new_in_each_step(mc_samples):
    model, loss, x, y, likelihood = problem("perceptron")
    extension = extensions.KFAC(seed=5, mc_samples=mc_samples)
    steps = []
    for _ in range(2):
        with backpack(extension):
            loss(model(x), y).backward()
        steps.append(blocks(model, "kfac"))
    fisher = kl.estimate_fisher(model, [(x, y)], likelihood, kl.KFAC(), sampling="mc", mc_samples=mc_samples, seed=5)
    assert_same(steps[0], fisher)
    assert not torch.equal(steps[0]["0"].gradient_factor, steps[1]["0"].gradient_factor)


def test_without_a_seed_torch_draws():
    model, loss, x, y, _ = problem("perceptron")
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with backpack(extensions.KFAC()):
            loss(model(x), y).backward()
        found.append(model[0].kfac.gradient_factor)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.grid
def test_draws_are_unbiased():
    model, loss, x, y, likelihood = problem("perceptron")
    with backpack(extensions.Diagonal(mc_samples=3000, seed=0)):
        loss(model(x), y).backward()
    exact = kl.estimate_fisher(model, [(x, y)], likelihood, kl.Diagonal(), sampling="exact")
    torch.testing.assert_close(model[0].diagonal.values, exact["0"].values, rtol=0.2, atol=1e-3)


def test_gradients_and_other_extensions_are_as_without_it():
    model, loss, x, y, _ = problem("perceptron")
    with backpack(extensions.EKFAC(), BatchGrad(), extensions.Diagonal(savefield="mine")):
        loss(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    assert torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    for grad, expected in zip(grads, torch.autograd.grad(loss(model(x), y), list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(model[0].weight.grad_batch.sum(0), model[0].weight.grad)
    assert isinstance(model[0].ekfac, kl.EigenBlock) and isinstance(model[0].mine, kl.DiagonalBlock)
    assert model[0].weight.ekfac is model[0].ekfac and not model[0].ekfac.values.requires_grad


def test_frozen_layers_have_none():
    model, loss, x, y, likelihood = problem("perceptron")
    model[0].requires_grad_(False)
    with backpack(extensions.KFAC(sampling="exact")):
        loss(model(x), y).backward()
    assert_same(blocks(model, "kfac"), kl.estimate_fisher(model, [(x, y)], likelihood, sampling="exact"))


def test_ignored_pixels():
    model = extend(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 3, 1)).double())
    loss = extend(nn.CrossEntropyLoss(ignore_index=1))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    y = torch.randint(0, 3, (4, 3, 3))
    with backpack(extensions.KFAC(sampling="exact")):
        loss(model(x), y).backward()
    likelihood = kl.Categorical(ignore_index=1, class_axis=1)
    assert_same(blocks(model, "kfac"), kl.estimate_fisher(model, [(x, y)], likelihood, sampling="exact"))


def test_an_estimator_of_ones_own():
    model, loss, x, y, likelihood = problem("perceptron")
    with backpack(extensions.BlockExtension(kl.KFOC(rank=1, sweeps=1), sampling="exact", savefield="best")):
        loss(model(x), y).backward()
    expected = kl.estimate_fisher(model, [(x, y)], likelihood, kl.KFOC(rank=1, sweeps=1), sampling="exact")
    assert_same(blocks(model, "best"), expected)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r'sampling must be "mc" or "exact" here'):
        extensions.KFAC(sampling="empirical")
    with pytest.raises(ValueError, match=r"mc_samples=2 only applies"):
        extensions.KFAC(sampling="exact", mc_samples=2)
    with pytest.raises(ValueError, match=r"unknown weight_sharing 'shrink'"):
        extensions.KFAC("shrink")
    for options, message in (
        ({"weight": torch.ones(3).double()}, "CrossEntropyLoss with weight is not the negative log-likelihood"),
        ({"label_smoothing": 0.1}, "CrossEntropyLoss with label_smoothing is not"),
    ):
        model, loss, x, y, _ = problem("perceptron", **options)
        with backpack(extensions.KFAC()), pytest.raises(NotImplementedError, match=message):
            loss(model(x), y).backward()
    transposed = extend(nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Flatten()))
    with (
        backpack(extensions.KFAC()),
        pytest.raises(NotImplementedError, match="ConvTranspose1d cannot have a block; freeze"),
    ):
        extend(nn.MSELoss())(transposed(torch.randn(2, 2, 3)), torch.randn(2, 12)).backward()


def test_what_is_shown():
    assert repr(extensions.TKFAC(seed=1)) == "TKFAC(TKFAC(spatial='exact'), sampling='mc', savefield='tkfac')"
    assert set(dir(extensions)) == set(extensions.__all__)
    assert DirectionSampling().kind == "mc"
