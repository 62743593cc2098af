"""Wrong tasks, Fishers, networks and options: clear errors, and a memory that stays as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kronlaplace as kl
from tests.support.continual import MultiHead, data, learned, move, network


class ByFunction(nn.Module):
    """Uses the weight of a layer by a function."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return F.linear(torch.tanh(self.body(x)), self.head.weight, self.head.bias)


class Alternating(nn.Module):
    """Uses one of two heads, by the sign of the first input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])

    def forward(self, x):
        return self.heads[int(x[0, 0] > 0)](torch.tanh(self.body(x)))


@pytest.fixture
def memory():
    made = kl.ContinualLaplace(network(), "classification")
    learned(made, tasks=2)
    move(made.model)
    return made


def unchanged(memory, call, error, match):
    """Check that a call fails and changes nothing."""
    before, tasks, state = memory.penalty().detach(), memory.tasks, memory._state
    with pytest.raises(error, match=match):
        call()
    assert memory.tasks == tasks
    assert memory._state is state
    assert torch.equal(memory.penalty().detach(), before)


def test_a_task_without_data(memory):
    unchanged(memory, lambda: memory.consolidate([]), ValueError, "the data is empty")


def test_a_task_that_breaks_off(memory):
    def broken():
        yield from data()
        raise KeyboardInterrupt("stopped")

    unchanged(memory, lambda: memory.consolidate(broken()), KeyboardInterrupt, "stopped")


def test_data_with_nan(memory):
    (x, y), *_ = data()
    x[0, 0] = torch.nan
    unchanged(memory, lambda: memory.consolidate([(x, y)]), ValueError, "NaN or infinite")


def test_neither_data_nor_a_fisher(memory):
    unchanged(memory, memory.consolidate, TypeError, "either data or fisher=")
    fisher = kl.estimate_fisher(memory.model, data(), "classification")
    unchanged(memory, lambda: memory.consolidate(data(), fisher=fisher), TypeError, "exactly one of them")
    unchanged(memory, lambda: memory.consolidate(fisher), TypeError, "given by name")
    unchanged(memory, lambda: memory.consolidate(fisher="kfac"), TypeError, "what estimate_fisher returns, got a str")


def test_a_fisher_of_other_weights(memory):
    fisher = kl.estimate_fisher(memory.model, data(), "classification")
    move(memory.model)
    unchanged(memory, lambda: memory.consolidate(fisher=fisher), ValueError, "at different weights: '0.weight' differs")


def test_a_fisher_of_other_layers_or_another_likelihood(memory):
    def add(model=None, likelihood="classification", **options):
        inputs = [x for x, _ in data()]
        made = kl.estimate_fisher(model or memory.model, inputs, likelihood, **options)
        return lambda: memory.consolidate(fisher=made)

    unchanged(memory, add(layers="0"), ValueError, "no blocks for some of the memory's layers:\n  2: left out")
    unchanged(memory, add(likelihood=kl.Gaussian()), ValueError, "estimated with Gaussian")
    unchanged(memory, add(ema_decay=0.9), ValueError, "is a moving average")
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    unchanged(memory, add(other), ValueError, "belongs to a different network")


def test_a_ready_made_fisher_is_the_estimated_one():
    model = network()
    one, other = (kl.ContinualLaplace(model, "classification") for _ in range(2))
    task = data()
    one.consolidate(task)
    other.consolidate(fisher=kl.estimate_fisher(model, task, "classification"))
    move(model)
    assert torch.equal(one.penalty(), other.penalty())


def test_a_ready_made_fisher_of_a_task_that_uses_some_heads():
    model = MultiHead(2).double().eval()
    memory = kl.ContinualLaplace(model, "classification")
    memory.consolidate(
        fisher=kl.estimate_fisher(model, data("heads"), "classification", unsupported="fixed"), task="first"
    )
    assert memory.layers == ["body", "heads.0"]


def test_variational_curvature():
    model = network()
    fitted = kl.KronLaplace(model, "classification").fit_variational(data(), rounds=1)
    memory = kl.ContinualLaplace(model, "classification").consolidate(fisher=fitted.posterior.fisher)
    assert memory.tasks[0].n_examples == 12


def test_the_same_task_twice(memory):
    memory.consolidate(data(), task="digits")
    unchanged(memory, lambda: memory.consolidate(data(), task="digits"), ValueError, "has a task 'digits' already")
    unchanged(memory, lambda: memory.consolidate(data(), task=3), TypeError, "task must be a string")


def test_a_network_in_training_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)).double()
    memory = kl.ContinualLaplace(model, "classification")  # it may be built, and penalize, in training
    assert float(memory.penalty().detach()) > 0
    with pytest.raises(ValueError, match=r"Call model.eval\(\) first"):
        memory.consolidate(data())
    assert not memory.tasks


def test_a_layer_of_another_shape(memory):
    memory.model[2] = nn.Linear(5, 4).double()
    with pytest.raises(ValueError, match=r"'2' holds \['2.weight', '2.bias'\] as a \(3, 6\) matrix, .* as \(4, 6\)"):
        memory.penalty()


def test_a_layer_that_is_gone():
    model = MultiHead(2).double().eval()
    memory = kl.ContinualLaplace(model, "classification")
    memory.consolidate(data("heads"))
    model.heads = model.heads[1:]
    memory.penalty()  # the one that is left has the same name
    del model.heads[0]
    with pytest.raises(ValueError, match=r"the memory has a layer 'heads.0' .* the model has no 'heads.0.weight'"):
        memory.penalty()


def test_a_layer_of_which_a_part_is_frozen(memory):
    memory.model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="some of its parameters are frozen and others are not"):
        memory.penalty()


def test_layers_that_the_outputs_depend_on_by_a_function():
    """Unlike another task's head, such a layer has curvature; it must not get lost."""
    memory = kl.ContinualLaplace(ByFunction().double().eval(), "classification", unsupported="error")
    with pytest.raises(NotImplementedError, match=r"depend on layers that cannot have a block.*\n  head: "):
        memory.consolidate(data())
    assert not memory.tasks
    fixed = kl.ContinualLaplace(memory.model, "classification", unsupported="fixed").consolidate(data())
    assert fixed.layers == ["body"]
    found = kl.ContinualLaplace(memory.model, "classification").consolidate(data())
    assert found.layers == ["body", "head"]
    with torch.no_grad():
        memory.model.head.weight.mul_(2)
    assert float(found.penalty().detach()) > 0.1


def test_batches_of_several_tasks():
    memory = kl.ContinualLaplace(Alternating().double().eval(), "classification")
    batches = [(sign * torch.ones(3, 4).double(), torch.tensor([0, 1, 0])) for sign in (1, -1)]
    with pytest.raises(NotImplementedError, match="only some batches use"):
        memory.consolidate(batches)
    assert not memory.tasks


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"merge": "mean"}, ValueError, "unknown merge 'mean'; allowed are 'sum', 'kfoc', 'factors'"),
        ({"mode": "own"}, ValueError, "unknown mode 'own'; allowed are 'latest', 'per-task'"),
        ({"merge": "factors", "rank": 2}, ValueError, 'rank=2 is for merge="kfoc"'),
        ({"merge": "kfoc", "rank": 0}, ValueError, "rank must be at least 1"),
        ({"merge": "kfoc", "mode": "per-task"}, ValueError, 'mode="per-task" needs merge="sum"'),
        ({"strength": 0.0}, ValueError, "strength must be a positive finite number"),
        ({"prior_precision": -1.0}, ValueError, "prior_precision must be positive"),
        ({"layers": "5"}, ValueError, "the model has no module '5'"),
        ({"estimator": "newton"}, ValueError, "unknown estimator 'newton'"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        kl.ContinualLaplace(network(), "classification", **options)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        kl.ContinualLaplace([], "classification")


def test_eigenbases_have_no_nearest_product():
    memory = kl.ContinualLaplace(network(), "classification", "ekfac", merge="kfoc")
    with pytest.raises(NotImplementedError, match=r'"sum" or merge="factors"'):
        memory.consolidate(data())
    assert not memory.tasks
