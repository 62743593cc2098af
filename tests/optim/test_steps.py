"""Steps of the natural-gradient optimizer, each against dense algebra in float64 with gradients by autograd."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.assertions import assert_close
from tests.support.dampings import damped
from tests.support.natural_gradients import (
    block_of,
    copies,
    exact_fisher,
    flat,
    gradients_of,
    matrix,
    move,
    natural_direction,
    step,
)
from tests.support.networks import Pooled, cnn, mlp

LR = 0.7


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent = kind(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


NETWORKS = {
    "linear": lambda: (mlp().model, torch.randn(7, 4).double()),
    "without bias": lambda: (mlp(bias=False).model, torch.randn(7, 4).double()),
    "convolution": lambda: (cnn().model, torch.randn(5, 2, 5, 7).double()),
    "shared": lambda: (Pooled(3).double(), torch.randn(6, 4, 3).double()),
    "RNN": lambda: (Recurrent(nn.RNN).double(), torch.randn(6, 4, 2).double()),
    "LSTM": lambda: (Recurrent(nn.LSTM).double(), torch.randn(6, 3, 2).double()),
    "norm": lambda: (Normed().double(), torch.randn(6, 4).double()),
}
# The rule of one group's (scale, G, A) after the first step; EKFAC then still has the eigenvalues of its basis.
ESTIMATORS = {
    "kfac": oracles.kfac_expand,
    "tkfac": oracles.tkfac_exact,
    "kfoc": oracles.tkfac_exact,
    "ekfac": oracles.kfac_expand,
    "diagonal": None,
}
DAMPINGS = [kl.damping.Tikhonov, kl.damping.FactoredTikhonov, kl.damping.TraceRestricted]


def made(network, likelihood="classification"):
    """A network in training mode, with inputs and targets."""
    model, x = NETWORKS[network]()
    targets = {
        "classification": lambda: torch.randint(3, (len(x),)),
        "binary": lambda: torch.randint(2, (len(x), 3)).double(),
        "regression": lambda: torch.randn(len(x), 3).double(),
    }[likelihood]()
    return model.train(), x, targets


def optimizer_of(model, likelihood="classification", **options):
    defaults = {
        "lr": LR,
        "momentum": 0.0,
        "kl_clip": None,
        "curvature_every": 1,
        "invert_every": 1,
        "sampling": "exact",
        "damping": kl.damping.Tikhonov(0.05),
    }
    return kl.NaturalGradient(model, likelihood, **{**defaults, **options})


def change_of(model, before, block):
    after = dict(model.named_parameters())
    return matrix(block, after) - matrix(block, before)


def assert_natural(model, before, gradient, matrices, rtol=1e-9, where=""):
    """The change of every block is ``−lr F⁻¹ g``, with one matrix and one gradient for every block."""
    for name, block in oracles.blocks(model).items():
        expected = -LR * torch.linalg.solve(matrices[name], matrix(block, gradient).flatten())
        assert_close(change_of(model, before, block).flatten(), expected, rtol, f"{where} {name}")


# -- One step of every kind ------------------------------------------------------------------------------------


@pytest.mark.quick(12)
@pytest.mark.parametrize("decay", [0.0, 0.03])
@pytest.mark.parametrize("strategy", DAMPINGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("network", NETWORKS)
def test_one_step_is_that_of_the_dense_matrix(network, estimator, strategy, decay):
    """``−lr (F̂ damped by γ + η)⁻¹ (∇h + η θ)`` (KFC Eq. 28 and 29, TKFAC Eq. 5.15)."""
    model, x, y = made(network)
    data, before = oracles.gradients(model, x, "classification"), copies(model)
    with optimizer_of(model, estimator=estimator, damping=strategy(0.05), weight_decay=decay) as optimizer:
        step(optimizer, model, x, y)
    gradient = {name: g + decay * before[name] for name, g in gradients_of(model).items()}
    matrices = {}
    for name, d in data.items():
        block = block_of(d, ESTIMATORS[estimator])
        rule = kl.damping.Tikhonov if estimator == "ekfac" else strategy  # no factors: γ is added to the block
        matrices[name] = damped(rule, block, 0.05 + decay)
    assert_natural(model, before, gradient, matrices)


@pytest.mark.parametrize("likelihood", ["binary", "regression"])
def test_one_step_with_other_likelihoods(likelihood):
    model, x, y = made("linear", likelihood)
    data, before = oracles.gradients(model, x, likelihood), copies(model)
    with optimizer_of(model, likelihood) as optimizer:
        step(optimizer, model, x, y, likelihood)
    matrices = {name: damped(kl.damping.Tikhonov, block_of(d, oracles.kfac_expand), 0.05) for name, d in data.items()}
    assert_natural(model, before, gradients_of(model), matrices)


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("damping", [kl.damping.Tikhonov(0), kl.damping.FactoredTikhonov(0)], ids=repr)
def test_one_step_without_damping(estimator, damping):
    """With more examples than weights, and outputs that do not sum to one, all blocks are invertible."""
    model, x, y = made("linear", "regression")
    x = torch.randn(30, 4).double()
    y = torch.randn(30, 3).double()
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    data, before = oracles.gradients(model, x, "regression"), copies(model)
    with optimizer_of(model, "regression", estimator=estimator, damping=damping) as optimizer:
        step(optimizer, model, x, y, "regression")
    matrices = {name: block_of(d, ESTIMATORS[estimator]).to_dense() for name, d in data.items()}
    assert_natural(model, before, gradients_of(model), matrices, 1e-8)


@pytest.mark.parametrize("minimum", [1e-6, 0.5, 50.0])
@pytest.mark.parametrize("linear", [None, 0.02])
def test_one_step_with_automatic_damping(linear, minimum):
    """TKFAC Eq. 5.16 for convolutions; other layers are expanded by ``β`` (Eq. 5.17), or damped by Eq. 5.15."""
    model, x, y = made("convolution")
    data, before = oracles.gradients(model, x, "classification"), copies(model)
    blocks = {name: block_of(d, oracles.tkfac_exact) for name, d in data.items()}
    traces = {name: float(block.to_dense().trace()) for name, block in blocks.items()}
    beta = max(max(minimum, trace) / trace for trace in traces.values())
    damping = kl.damping.TraceRestrictedAuto(minimum, linear=linear)
    with optimizer_of(model, estimator="tkfac", damping=damping) as optimizer:
        step(optimizer, model, x, y)
    matrices = {}
    for name, block in blocks.items():
        if data[name].block.convolution:
            matrices[name] = damped(kl.damping.TraceRestrictedAuto, block, minimum)
        elif linear is None:
            matrices[name] = damped(kl.damping.TraceRestrictedAuto, block, minimum, expansion=beta)
        else:
            matrices[name] = damped(kl.damping.TraceRestricted, block, linear)
    assert_natural(model, before, gradients_of(model), matrices)


def test_a_linear_gaussian_model_is_solved_by_one_step():
    """The Fisher is exact and the loss quadratic, so that undamped Newton is one step, whatever the start."""
    model, x, y = nn.Linear(4, 3).double(), torch.randn(20, 4).double(), torch.randn(20, 3).double()
    likelihood = kl.Gaussian(noise_std=0.3)
    optimizer = optimizer_of(model, likelihood, lr=1.0, damping=kl.damping.FactoredTikhonov(0))
    outputs = model(x)
    optimizer.update_curvature(outputs)
    (0.5 * ((outputs - y) / 0.3).square().sum() / len(x)).backward()
    optimizer.step()
    with_one = torch.cat([x, torch.ones(20, 1).double()], 1)
    solution = torch.linalg.lstsq(with_one, y).solution.T
    assert_close(torch.cat([model.weight, model.bias[:, None]], 1).detach(), solution, 1e-10)


def test_by_itself_a_linear_gaussian_model_is_solved_in_a_few_steps():
    """Where its factors are of the whole batch: the damping shrinks, and the momentum corrects for what is left of it."""
    model, x, y = nn.Linear(4, 3).double(), torch.randn(64, 4).double(), torch.randn(64, 3).double()
    optimizer = kl.NaturalGradient(model, "regression", model_fraction=1.0, curvature_fraction=1.0)
    for _ in range(8):
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.update_curvature(outputs, y)
        (0.5 * (outputs - y).square().sum() / len(x)).backward()
        optimizer.step()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(64, 1).double()], 1), y).solution.T
    assert_close(torch.cat([model.weight, model.bias[:, None]], 1).detach(), solution, 1e-3)


# -- Momentum, weight decay, groups ------------------------------------------------------------------------------


def test_momentum_over_three_steps():
    """``δ ← μ δ + v`` with the curvature of each step alone, and weight decay inside the damping."""
    model, x, y = made("linear")
    reference = copy.deepcopy(model)
    with optimizer_of(model, momentum=0.6, weight_decay=0.01, ema_decay=0.0) as optimizer:
        for _ in range(3):
            step(optimizer, model, x, y)
    last = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for _ in range(3):
        direction, _ = natural_direction(reference, x, y, 0.05, decay=0.01)
        last = {name: 0.6 * v + LR * direction[name] for name, v in last.items()}
        move(reference, last)
    assert_close(flat(dict(model.named_parameters())), flat(dict(reference.named_parameters())), 1e-10)


def test_each_group_has_its_own_settings():
    model, x, y = made("linear")
    reference = copy.deepcopy(model)
    groups = [
        {"params": model[0].parameters(), "lr": 0.2, "momentum": 0.5},
        {"params": model[2].parameters(), "weight_decay": 0.02},
    ]
    with optimizer_of(model, params=groups, ema_decay=0.0) as optimizer:
        for _ in range(2):
            step(optimizer, model, x, y)
    last = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for _ in range(2):
        first, _ = natural_direction(reference, x, y, 0.05)
        second, _ = natural_direction(reference, x, y, 0.05, decay=0.02)
        last = {
            name: 0.5 * v + 0.2 * first[name] if name.startswith("0.") else LR * second[name]
            for name, v in last.items()
        }
        move(reference, last)
    assert_close(flat(dict(model.named_parameters())), flat(dict(reference.named_parameters())), 1e-10)


def test_parameters_without_a_block_follow_gradient_descent():
    """`PlainSGD` is torch's SGD with the same momentum and weight decay."""
    model, x, y = made("norm")
    plain = copy.deepcopy(model.norm)
    options = {"momentum": 0.8, "weight_decay": 0.01, "others": kl.PlainSGD(lr=0.1)}
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    with optimizer_of(model, **options) as optimizer:
        for _ in range(3):
            step(optimizer, model, x, y)
            for p, own in zip(plain.parameters(), model.norm.parameters(), strict=True):
                p.grad = own.grad.clone()
            sgd.step()
    for p, own in zip(plain.parameters(), model.norm.parameters(), strict=True):
        assert_close(own.detach(), p.detach(), 1e-12)


# -- The clip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_clip_is_exact_and_before_momentum(decay):
    """``ν = vᵀFv + η ‖v‖²`` with the exact Fisher of the batch is at most C (KFC Algorithm 1)."""
    model, x, y = made("linear")
    reference, bound = copy.deepcopy(model), 1e-3
    options = {"momentum": 0.9, "weight_decay": decay, "kl_clip": bound, "model_fraction": 1.0, "ema_decay": 0.0}
    last, clipped = None, []
    with optimizer_of(model, **options) as optimizer:
        for _ in range(3):
            step(optimizer, model, x, y)
            direction, _ = natural_direction(reference, x, y, 0.05, decay)
            v = LR * flat(direction)
            nu = v @ exact_fisher(reference, x) @ v + decay * v @ v
            clipped.append(bool(nu > bound))
            v = v * min(1.0, math.sqrt(bound / nu))
            last = v if last is None else 0.9 * last + v
            parts = iter(last.split([p.numel() for p in reference.parameters()]))
            move(reference, {name: next(parts).view(p.shape) for name, p in reference.named_parameters()})
            assert_close(flat(dict(model.named_parameters())), flat(dict(reference.named_parameters())), 1e-10)
    assert clipped[0]


def test_a_small_step_is_not_clipped():
    model, x, y = made("linear")
    reference = copy.deepcopy(model)
    with optimizer_of(model, kl_clip=100.0, model_fraction=1.0) as optimizer:
        step(optimizer, model, x, y)
    with optimizer_of(reference) as optimizer:
        step(optimizer, reference, x, y)
    assert torch.equal(flat(dict(model.named_parameters())), flat(dict(reference.named_parameters())))


def test_the_clip_uses_part_of_the_batch():
    """The first quarter of the examples, as in the paper, unless told otherwise."""
    model, _, _ = made("linear")
    x, y = torch.randn(160, 4).double(), torch.randint(3, (160,))
    before = flat(copies(model))
    direction, _ = natural_direction(model, x, y, 0.05)
    v = LR * flat(direction)
    nu = v @ exact_fisher(model, x[:40]) @ v
    with optimizer_of(model, kl_clip=1e-3, curvature_fraction=1.0) as optimizer:
        step(optimizer, model, x, y)
    assert_close(flat(copies(model)) - before, v * (1e-3 / nu).sqrt(), 1e-10)


def test_between_measurements_the_clip_keeps_its_proportion():
    """``ν`` is then ``−vᵀ∇h`` times the ratio of both when it was last measured."""
    model, x, y = made("linear")
    options = {"kl_clip": 1e-3, "model_fraction": 1.0, "model_every": 10, "invert_every": 10, "curvature_every": 10}
    reference = copy.deepcopy(model)
    data = oracles.gradients(model, x, "classification")
    fisher = exact_fisher(reference, x)
    blocks = [damped(kl.damping.Tikhonov, block_of(d, oracles.kfac_expand), 0.05) for d in data.values()]
    inverse = torch.linalg.inv(torch.block_diag(*blocks))
    order = [p for d in data.values() for p in d.block.parameters]

    def stacked(values):  # block by block, each as its matrix
        return torch.cat([matrix(d.block, values).flatten() for d in data.values()])

    index = {name: i for i, name in enumerate(order)}
    assert list(dict(model.named_parameters())) == sorted(index, key=index.get)
    ratio = None
    with optimizer_of(model, **options) as optimizer:
        for i in range(3):
            before = copies(model)
            step(optimizer, model, x, y)
            g = stacked(gradients_of(model))
            v = -LR * inverse @ g
            if i == 0:
                by_name = {}
                for d, part in zip(data.values(), v.split([len(b) for b in blocks]), strict=True):
                    sizes = [before[p].numel() // d.block.q for p in d.block.parameters]
                    columns = part.view(d.X.shape[2:]).split(sizes, 1)
                    by_name.update(
                        {p: c.reshape(before[p].shape) for p, c in zip(d.block.parameters, columns, strict=True)}
                    )
                w = flat({name: by_name[name] for name in before})
                ratio = (w @ fisher @ w) / -(g @ v)
            nu = ratio * -(g @ v)
            expected = v * min(1.0, math.sqrt(1e-3 / nu))
            assert_close(stacked(copies(model)) - stacked(before), expected, 1e-9)


# -- Moving averages ---------------------------------------------------------------------------------------------


def factors(model, x, name="0"):
    (group,) = oracles.gradients(model, x, "classification")[name].groups
    return oracles.kfac_expand(group)[1:]


@pytest.mark.parametrize("xi", [0.5, 0.95])
def test_averages_without_a_start(xi):
    """``ε_k = min(1 − 1/k, ξ)`` (K-FAC section 5)."""
    model, _, _ = made("linear")
    expected = None
    with optimizer_of(model, ema_decay=xi, lr=0.05) as optimizer:
        for k in range(1, 7):
            x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
            new = factors(model, x)
            epsilon = min(1 - 1 / k, xi)
            expected = new if k == 1 else [epsilon * a + (1 - epsilon) * b for a, b in zip(expected, new, strict=True)]
            step(optimizer, model, x, y)
            block = optimizer.blocks["0"]
            assert_close(block.gradient_factor * block.scale, expected[0], 1e-10, f"update {k}")
            assert_close(block.activation_factor, expected[1], 1e-10, f"update {k}")


def test_averages_with_a_start():
    """``Ω ← ξ Ω + (1 − ξ) Ω̂`` from the first update on (KFC Eq. 33), and the start alone before it."""
    model, _, _ = made("linear")
    data = [(torch.randn(8, 4).double(), torch.randint(3, (8,))) for _ in range(3)]
    fisher = kl.estimate_fisher(model.eval(), data, "classification", sampling="exact")
    model.train()
    expected = factors(model, torch.cat([x for x, _ in data]))
    with optimizer_of(model, ema_decay=0.8, lr=0.05) as optimizer:
        optimizer.start_from(fisher, batch_size=5)
        for _ in range(4):
            x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
            expected = [0.8 * a + 0.2 * b for a, b in zip(expected, factors(model, x), strict=True)]
            step(optimizer, model, x, y)
            block = optimizer.blocks["0"]
            assert_close(block.gradient_factor * block.scale, expected[0], 1e-10)
            assert_close(block.activation_factor, expected[1], 1e-10)


def test_curvature_and_inverses_are_renewed_when_they_are_due():
    """Every second step new averages, every third a new inverse, of the averages at that step."""
    model, _, _ = made("linear")
    updates, inverses = [], []
    with optimizer_of(model, curvature_every=2, invert_every=3, lr=0.01) as optimizer:
        for _ in range(7):
            before = optimizer.blocks if optimizer._steps else None
            old = optimizer._renewal.inverse
            step(optimizer, model, torch.randn(5, 4).double(), torch.randint(3, (5,)))
            same = before is not None and torch.equal(
                before["0"].activation_factor, optimizer.blocks["0"].activation_factor
            )
            updates.append(not same)
            inverses.append(optimizer._renewal.inverse is not old)
    assert updates == [True, False, True, False, True, False, True]
    assert inverses == [True, False, False, True, False, False, True]


def test_part_of_the_batch_for_the_curvature():
    model, x, y = made("linear")
    expected = factors(model, x[:3])
    with optimizer_of(model, curvature_fraction=0.4) as optimizer:
        step(optimizer, model, x, y)
        assert_close(optimizer.blocks["0"].activation_factor, expected[1], 1e-10)
        assert_close(optimizer.blocks["0"].gradient_factor, expected[0], 1e-10)


def test_labels_are_drawn_anew_in_each_step():
    """Steps have their own draws, and two runs with one seed have the same."""
    model, x, y = made("linear")
    found = []
    for seed in (0, 0, 1):
        with optimizer_of(copy.deepcopy(model), sampling="mc", lr=0.0, ema_decay=0.0, seed=seed) as optimizer:
            blocks = []
            for _ in range(2):
                step(optimizer, optimizer._model, x, y)
                blocks.append(optimizer.blocks["0"].gradient_factor.clone())
            found.append(blocks)
    assert not torch.equal(*found[0])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.product(found[0], found[2]))
