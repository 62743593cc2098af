"""Optimizers with either structure of the inverse."""

import copy
import io

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.optim.natural_gradient import NaturalGradient
from tests.support.assertions import assert_close
from tests.support.chains import SIZES, blocks_of, chain, damped, dense_fisher_of, moments

BOTH = ["block-diagonal", "block-tridiagonal"]


def optimizer_of(model, structure="block-tridiagonal", **options):
    defaults = {
        "lr": 0.5,
        "momentum": 0.0,
        "damping": kl.damping.FactoredTikhonov(0.1),
        "kl_clip": None,
        "curvature_every": 1,
        "invert_every": 1,
        "ema_decay": 0.9,
        "sampling": "exact",
    }
    return NaturalGradient(model, "regression", structure=structure, **{**defaults, **options})


def step(optimizer, model, x, y):
    optimizer.zero_grad()
    outputs = model(x)
    optimizer.update_curvature(outputs)
    (0.5 * (outputs - y).square().sum() / len(x)).backward()
    optimizer.step()


def matrices(model, of=lambda p: p):
    """``[W b]`` of every layer, with values of the parameters."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    parts = [[of(m.weight)] + ([] if m.bias is None else [of(m.bias).unsqueeze(1)]) for m in linears]
    return [torch.cat(part, 1).detach().clone() for part in parts]


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_step_is_that_of_the_dense_fisher(sizes, bias, decay):
    """``−lr F̂⁻¹ (∇h + η θ)``, with ``F̂`` damped by ``γ + η``."""
    model, x, y = chain(sizes, bias), torch.randn(20, sizes[0]).double(), torch.randn(20, sizes[-1]).double()
    before = matrices(model)
    blocks, cross = blocks_of(*moments(model, x))
    with optimizer_of(model, weight_decay=decay) as optimizer:
        step(optimizer, model, x, y)
    gradient = torch.cat(
        [(g + decay * w).flatten() for g, w in zip(matrices(model, lambda p: p.grad), before, strict=True)]
    )
    fisher = dense_fisher_of([damped(block, 0.1 + decay) for block in blocks], cross)
    change = torch.cat([(w - v).flatten() for w, v in zip(matrices(model), before, strict=True)])
    assert_close(change, -0.5 * torch.linalg.solve(fisher, gradient), 1e-8)


def test_part_of_a_batch():
    """The moments of all kinds are those of the same examples."""
    model, x, y = chain((4, 3, 2)), torch.randn(20, 4).double(), torch.randn(20, 2).double()
    with optimizer_of(model, curvature_fraction=0.4) as optimizer:
        blocks, cross = blocks_of(*moments(model, x[:8]))
        before = matrices(model)
        step(optimizer, model, x, y)
    gradient = torch.cat([g.flatten() for g in matrices(model, lambda p: p.grad)])
    change = torch.cat([(w - v).flatten() for w, v in zip(matrices(model), before, strict=True)])
    fisher = dense_fisher_of([damped(block, 0.1) for block in blocks], cross)
    assert_close(change, -0.5 * torch.linalg.solve(fisher, gradient), 1e-8)


def test_groups_have_their_own_weight_decay():
    model, x, y = chain((4, 3, 2)), torch.randn(20, 4).double(), torch.randn(20, 2).double()
    before = matrices(model)
    blocks, cross = blocks_of(*moments(model, x))
    decays = [0.0, 0.3]
    groups = [{"params": list(model[2 * i].parameters()), "weight_decay": d} for i, d in enumerate(decays)]
    with optimizer_of(model, params=groups) as optimizer:
        step(optimizer, model, x, y)
    gradients = matrices(model, lambda p: p.grad)
    gradient = torch.cat([(g + d * w).flatten() for g, d, w in zip(gradients, decays, before, strict=True)])
    fisher = dense_fisher_of([damped(block, 0.1 + d) for block, d in zip(blocks, decays, strict=True)], cross)
    change = torch.cat([(w - v).flatten() for w, v in zip(matrices(model), before, strict=True)])
    assert_close(change, -0.5 * torch.linalg.solve(fisher, gradient), 1e-8)


def test_layers_that_are_left_out_stay_as_they_are():
    """The chain is then that of the layers in the optimizer."""
    model, x, y = chain((4, 3, 3, 2)), torch.randn(20, 4).double(), torch.randn(20, 2).double()
    before = copy.deepcopy(model)
    with optimizer_of(model, params=[*model[2].parameters(), *model[4].parameters()]) as optimizer:
        for _ in range(3):
            step(optimizer, model, x, y)
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[2].weight, before[2].weight)


class Backwards(nn.Module):
    """A chain whose layers are not registered in the order of their use."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, x):
        return self.last(self.first(x).tanh())


def test_the_order_of_registration_does_not_matter():
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    model = Backwards().double()
    other = copy.deepcopy(nn.Sequential(model.first, nn.Tanh(), model.last))
    for network in (model, other):
        with optimizer_of(network) as optimizer:
            for _ in range(3):
                step(optimizer, network, x, y)
    assert_close(model.first.weight.detach(), other[0].weight.detach(), 1e-12)


@pytest.mark.parametrize("structure", BOTH)
def test_a_run_that_is_killed_and_resumed(structure):
    """The same weights, bit for bit; inverses are older than the checkpoint."""
    data = [(torch.randn(8, 4).double(), torch.randn(8, 2).double()) for _ in range(9)]
    model = chain((4, 3, 2))
    options = {"structure": structure, "momentum": 0.9, "invert_every": 3, "sampling": "mc", "curvature_every": 2}
    file = io.BytesIO()
    with optimizer_of(model, **options) as optimizer:
        for i, (x, y) in enumerate(data):
            if i == 5:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            step(optimizer, model, x, y)
    file.seek(0)
    saved, resumed = torch.load(file, weights_only=True), chain((4, 3, 2))
    resumed.load_state_dict(saved["model"])
    with optimizer_of(resumed, **options) as optimizer:
        optimizer.load_state_dict(saved["optimizer"])
        for x, y in data[5:]:
            step(optimizer, resumed, x, y)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("structure", BOTH)
def test_inverses_in_the_background(structure):
    """An inverse is of the moments at its step, however late it comes: the first is as without a background."""
    model, other = chain((4, 3, 2)), chain((4, 3, 2))
    other.load_state_dict(model.state_dict())
    x, y = torch.randn(8, 4).double(), torch.randn(8, 2).double()
    for network, asynchronous in ((model, False), (other, True)):
        with optimizer_of(network, structure, invert_every=100, invert_async=asynchronous) as optimizer:
            for _ in range(3):
                step(optimizer, network, x, y)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    with optimizer_of(model, structure, invert_async=True, lr=0.1) as optimizer:
        for _ in range(30):
            step(optimizer, model, x, y)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("saved", BOTH)
def test_checkpoints_of_the_other_structure_are_refused(saved):
    model, x, y = chain((4, 3, 2)), torch.randn(8, 4).double(), torch.randn(8, 2).double()
    with optimizer_of(model, saved) as optimizer:
        step(optimizer, model, x, y)
        state = optimizer.state_dict()
    (other,) = set(BOTH) - {saved}
    with optimizer_of(model, other) as optimizer, pytest.raises(ValueError, match=f'structure="{saved}"'):
        optimizer.load_state_dict(state)


def test_another_architecture_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(9, 2)).double()
    before, x = copy.deepcopy(model), torch.randn(4, 2, 5).double()
    with optimizer_of(model) as optimizer:
        with pytest.raises(ValueError, match=r"layer '0' is not an nn\.Linear but of type Conv1d"):
            optimizer.update_curvature(model(x))
        assert optimizer._curvature.accumulation.weight == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_other_estimators_are_refused():
    with pytest.raises(ValueError, match='Use estimator="kfac", or structure="block-diagonal" with any estimator'):
        optimizer_of(chain((3, 2)), estimator="tkfac")


def test_unknown_structures_are_refused():
    with pytest.raises(
        ValueError, match="unknown structure 'tridiagonal'; the shorthands are 'block-diagonal', 'block-tri"
    ):
        optimizer_of(chain((3, 2)), "tridiagonal")
