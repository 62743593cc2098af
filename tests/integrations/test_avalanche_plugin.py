"""The plugin for Avalanche by itself: with a strategy that has only what the plugin uses, so Avalanche is not needed."""

import copy
import pickle
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kronlaplace as kl

HOME = "kronlaplace.integrations.avalanche"
N = 12


class MultiTaskModule(nn.Module):
    """In place of Avalanche's."""


@pytest.fixture
def plugin_class(monkeypatch):
    """The plugin, with an Avalanche that has two classes."""
    names = ("avalanche", "avalanche.models", "avalanche.training", "avalanche.training.plugins")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["avalanche.models"], "MultiTaskModule", MultiTaskModule, raising=False)
    monkeypatch.setattr(
        sys.modules["avalanche.training.plugins"], "SupervisedPlugin", type("Base", (), {}), raising=False
    )
    before = sys.modules.pop(HOME, None)
    try:
        yield import_module(HOME).ContinualLaplacePlugin
    finally:
        sys.modules.pop(HOME, None)
        if before is not None:
            sys.modules[HOME] = before


class Data(TensorDataset):
    """A data set of ``(x, y, task label)`` whose examples are noisy in training."""

    def __init__(self, *tensors, noisy=True):
        super().__init__(*tensors)
        self.noisy = noisy

    def eval(self):
        return Data(*self.tensors, noisy=False)

    def __getitem__(self, index):
        x, y, task = super().__getitem__(index)
        return x + torch.randn_like(x) if self.noisy else x, y, task


class Heads(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x, task_labels):
        return self.heads[int(task_labels[0])](x)


def data(n=N, task=0):
    return Data(torch.randn(n, 4).double(), torch.randint(3, (n,)), torch.full((n,), task))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def trainer(model, dataset, criterion=None, labels=(0,)):
    return SimpleNamespace(
        model=model,
        experience=SimpleNamespace(dataset=dataset, task_labels=labels),
        train_mb_size=5,
        loss=torch.zeros(1, dtype=torch.float64),
        _criterion=criterion or nn.CrossEntropyLoss(),
    )


def memory_of(model, **options):
    return kl.ContinualLaplace(model, "classification", prior_precision=0.3, merge="kfoc", **options)


def move(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))


def test_the_loss_gets_a_part_of_the_penalty(plugin_class):
    model = mlp()
    plugin = plugin_class(memory_of(model, strength=2.0))
    for n in (12, 7):
        strategy = trainer(model, data(n))
        plugin.before_training_exp(strategy)
        move(model)
        strategy.loss = strategy.loss + 1.5
        plugin.before_backward(strategy)
        assert float(strategy.loss.detach()) == float(1.5 + plugin.memory.penalty().detach() / n)
        grads = torch.autograd.grad(strategy.loss, list(model.parameters()))
        expected = torch.autograd.grad(plugin.memory.penalty() / n, list(model.parameters()))
        for grad, other in zip(grads, expected, strict=True):
            assert torch.equal(grad, other) and grad.any()
        plugin.after_training_exp(strategy)
        assert float(plugin.memory.penalty().detach()) == 0
    assert [task.n_examples for task in plugin.memory.tasks] == [12, 7]


def test_consolidates_in_evaluation_mode_without_augmentation_and_leaves_no_trace(plugin_class):
    model = mlp()
    model[1].eval()
    dataset = data()
    other = memory_of(copy.deepcopy(model).eval())
    plugin = plugin_class(memory_of(model))
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    plugin.after_training_exp(trainer(model, dataset))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())

    x, y, _ = dataset.tensors
    other.consolidate([(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])])
    for network in (model, other.model):
        torch.manual_seed(1)
        move(network)
    assert float(plugin.memory.penalty().detach()) == float(other.penalty().detach()) > 0


def test_options_of_the_fisher(plugin_class):
    model = mlp()
    plugin = plugin_class(memory_of(model), sampling="mc", mc_samples=3)
    dataset = data()
    plugin.after_training_exp(trainer(model, dataset))
    x, y, _ = dataset.tensors
    other = memory_of(model.eval())
    other.consolidate([(x[i : i + 5], y[i : i + 5]) for i in (0, 5, 10)], sampling="mc", mc_samples=3)
    move(model)
    assert float(plugin.memory.penalty().detach()) == float(other.penalty().detach()) > 0


def test_multi_task_networks_get_the_task_labels(plugin_class):
    model = Heads().double()
    plugin = plugin_class(memory_of(model))
    for task in (1, 0):
        plugin.after_training_exp(trainer(model, data(task=task)))
    assert [task.layers for task in plugin.memory.tasks] == [("heads.1",), ("heads.0",)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_copies_and_checkpoints_keep_the_memory_and_share_the_network(plugin_class, copied):
    model = mlp()
    plugin = plugin_class(memory_of(model, strength=3.0), sampling="mc", mc_samples=2)
    plugin.after_training_exp(trainer(model, data()))
    move(model)
    model_2, plugin_2 = copied((model, plugin))
    assert plugin_2.memory.model is model_2 is not model
    assert (plugin_2.sampling, plugin_2.mc_samples) == (plugin.sampling, 2)
    assert plugin_2.memory.tasks == plugin.memory.tasks
    assert float(plugin_2.memory.penalty().detach()) == float(plugin.memory.penalty().detach()) > 0
    plugin_2.after_training_exp(trainer(model_2, data()))
    assert len(plugin.memory.tasks) == 1


def test_a_failure_leaves_modes_and_memory(plugin_class):
    model = mlp()
    plugin = plugin_class(memory_of(model))
    dataset = data()
    dataset.tensors[1][3] = 9  # there are three classes
    with pytest.raises(ValueError, match="class labels must lie in"):
        plugin.after_training_exp(trainer(model, dataset))
    assert plugin.memory.tasks == ()
    assert all(module.training for module in model.modules())


def test_what_does_not_belong_together_is_refused_before_training(plugin_class):
    model = mlp()
    plugin = plugin_class(memory_of(model))
    with pytest.raises(ValueError, match="another model than the strategy's"):
        plugin.before_training_exp(trainer(mlp(), data()))
    with pytest.raises(ValueError, match=r"reduction='sum'.*Use reduction=\"mean\""):
        plugin.before_training_exp(trainer(model, data(), nn.CrossEntropyLoss(reduction="sum")))
    with pytest.raises(ValueError, match="no examples"):
        plugin.before_training_exp(trainer(model, data(0)))
    heads = Heads().double()
    with pytest.raises(ValueError, match=r"several task labels, \[0, 1\]"):
        plugin_class(memory_of(heads)).before_training_exp(trainer(heads, data(), labels=[1, 0]))
    plugin.before_training_exp(trainer(model, data(), labels=[1, 0]))  # takes none of them
    plugin.after_training_exp(trainer(model, data()))
    model[3] = nn.Linear(5, 4).double()
    with pytest.raises(ValueError, match=r"the memory's layer '3' .*IncrementalClassifier.*exclude="):
        plugin.before_training_exp(trainer(model, data()))


@pytest.mark.parametrize(
    ("memory", "options", "error", "message"),
    [
        (None, {}, TypeError, "memory must be a kronlaplace.ContinualLaplace .* got a NoneType"),
        ("made", {"sampling": "some"}, ValueError, "sampling"),
        ("made", {"mc_samples": 0}, ValueError, "mc_samples"),
    ],
)
def test_bad_arguments(plugin_class, memory, options, error, message):
    with pytest.raises(error, match=message):
        plugin_class(memory and memory_of(mlp()), **options)


def test_without_avalanche_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name == HOME or name.partition(".")[0] == "avalanche"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "avalanche", None)  # as if it were not installed
    integrations = import_module("kronlaplace.integrations")
    with pytest.raises(ImportError, match=r"pip install 'kronlaplace\[avalanche\]'"):
        _ = integrations.ContinualLaplacePlugin
