"""Tasks one after another: joint solutions, heads, networks that grow, frozen layers, memory."""

from itertools import permutations

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.continual import MultiHead, N, close, data, flat, learned, move, network, penalty_and_gradient

NOISE = 0.6
DELTA = 0.3


def regressions(outputs):
    """Three tasks with inputs in different subspaces, so that none of them determines the weights."""
    generator = torch.Generator().manual_seed(1)
    tasks = []
    for i in range(3):
        x = torch.randn(9, 4, generator=generator).double() * torch.tensor([1.0, i == 1, i != 0, 0.2]).double()
        tasks.append((x, torch.randn(9, outputs, generator=generator).double()))
    return tasks


def train(memory, x, y):
    """Find the minimum of the loss with the penalty."""
    model = memory.model
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = 0.5 * ((model(x) - y) / NOISE).square().sum() + memory.penalty()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("estimator", "merge"),
    [("exact", "sum"), ("kfac", "sum"), ("kfac", "kfoc"), ("kfac", "factors"), ("tkfac", "kfoc"), ("kfoc", "factors")],
)
def test_linear_tasks_one_by_one_are_learned_jointly_in_any_order(estimator, merge):
    """One linear layer: the Fisher is the same product ``I ⊗ Σ a aᵀ`` for every estimator, and merging loses nothing."""
    tasks = regressions(2)
    x = torch.cat([torch.cat([x, torch.ones(len(x), 1).double()], 1) for x, _ in tasks])
    y = torch.cat([y for _, y in tasks])
    joint = torch.linalg.solve(x.mT @ x / NOISE**2 + DELTA * torch.eye(5).double(), x.mT @ y / NOISE**2).mT
    for order in permutations(range(3)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 2)).double().eval()
        memory = kl.ContinualLaplace(model, kl.Gaussian(NOISE), estimator, prior_precision=DELTA, merge=merge)
        for i in order:
            inputs, targets = tasks[i]
            train(memory, inputs, targets)
            memory.consolidate([(inputs, targets)])
        found = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
        torch.testing.assert_close(found, joint, rtol=1e-6, atol=1e-6)


# -- heads -----------------------------------------------------------------------------------------------------


def test_heads_that_a_task_does_not_use_keep_their_curvature():
    model = network("heads")
    memory = kl.ContinualLaplace(model, "classification", prior_precision=DELTA)
    expected = {}
    for model.task in range(2):
        move(model)
        task = data("heads")
        memory.consolidate(task)
        used = ["body", f"heads.{model.task}"]
        assert memory.tasks[-1].layers == tuple(used)
        fisher = kl.estimate_fisher(model, task, "classification", layers=used)
        for name in used:
            expected[name] = expected.get(name, 0) + N * fisher[name].to_dense()
    assert memory.layers == ["body", "heads.0", "heads.1"]
    end = flat(model).detach()
    move(model)
    weights = flat(model).detach()
    gradient = penalty_and_gradient(memory)[1]
    sizes = {"body": 25, "heads.0": 12, "heads.1": 12}
    for name, v, found in zip(
        sizes, (weights - end).split([*sizes.values(), 12]), gradient.split([*sizes.values(), 12]), strict=False
    ):
        close(found, expected[name] @ v + DELTA * v)
    close(gradient[-12:], DELTA * weights[-12:])  # a head for tasks to come has the prior


def test_a_network_that_grows():
    model = MultiHead(1).double().eval()
    memory = kl.ContinualLaplace(model, "classification", prior_precision=DELTA)
    memory.consolidate(data("heads"))
    before = penalty_and_gradient(memory)[1]
    model.heads.append(nn.Linear(5, 2).double())
    new = torch.cat([model.heads[1].weight, model.heads[1].bias[:, None]], 1).detach().flatten()
    gradient = penalty_and_gradient(memory)[1]
    close(gradient, torch.cat([before, DELTA * new]))
    model.task = 1
    memory.consolidate(data("heads"))
    assert memory.layers == ["body", "heads.0", "heads.1"]
    assert float(memory.penalty().detach()) == 0


def test_a_prior_of_one_layer_each_does_not_grow():
    model = MultiHead(1).double().eval()
    memory = kl.ContinualLaplace(model, "classification", prior_precision=[1.0, 2.0])
    model.heads.append(nn.Linear(5, 2).double())
    with pytest.raises(ValueError, match=r"no precision for \['heads.1'\]"):
        memory.penalty()


@pytest.mark.parametrize("layers", [None, ["body", "heads.0", "heads.1"], "*"])
def test_frozen_layers_have_no_penalty_until_they_thaw(layers):
    model = MultiHead(2).double().eval()
    memory = kl.ContinualLaplace(model, "classification", layers=layers, prior_precision=DELTA)
    memory.consolidate(data("heads"))
    model.heads[0].requires_grad_(False)
    model.task = 1
    memory.consolidate(data("heads"))
    assert memory.tasks[-1].layers == ("body", "heads.1")
    assert memory.penalty().requires_grad
    move(model)  # not the frozen head
    others = float(memory.penalty().detach())
    model.heads[0].requires_grad_(True)
    assert float(memory.penalty().detach()) == others
    with torch.no_grad():
        model.heads[0].weight.add_(1.0)
    assert float(memory.penalty().detach()) > others


def test_only_some_layers():
    model = network()
    memory = kl.ContinualLaplace(model, "classification", layers=["0"])
    learned(memory, tasks=1)
    move(model)
    gradient = penalty_and_gradient(memory)[1]
    assert gradient[:25].abs().min() > 0
    assert not gradient[25:].any()


# -- what is kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"merge": "kfoc"}, {"merge": "kfoc", "rank": 2}, {"merge": "factors"}])
def test_memory_is_constant(options):
    memory = kl.ContinualLaplace(network(), "classification", **options)
    sizes = []
    for _ in range(6):
        learned(memory, tasks=1)
        sizes.append(memory.n_bytes)
    rank = options.get("rank", 1)
    assert sizes[:rank] == sorted(set(sizes[:rank]))
    assert len(set(sizes[rank - 1 :])) == 1


def test_the_sum_grows_by_one_task_each():
    memory = kl.ContinualLaplace(network(), "classification")
    learned(memory, tasks=2)
    two = memory.n_bytes
    learned(memory, tasks=1)
    three = memory.n_bytes
    learned(memory, tasks=1)
    assert memory.n_bytes - three == three - two > 0


def test_the_strength_can_be_set_between_tasks():
    memory = kl.ContinualLaplace(network(), "classification", strength=2.0)
    learned(memory, tasks=1)
    move(memory.model)
    before = float(memory.penalty().detach())
    memory.strength = 5.0
    assert float(memory.penalty().detach()) == pytest.approx(2.5 * before)
