"""Benchmarks of scikit-learn's digits in memory, networks and strategies of Avalanche."""

import pytest

from experiments.peers import avalanche

try:
    avalanche()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils.data_loader import TaskBalancedDataLoader
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import Naive
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from kronlaplace.integrations.avalanche import ContinualLaplacePlugin

__all__ = [
    "BATCH",
    "ContinualLaplacePlugin",
    "EvaluationPlugin",
    "Heads",
    "IncrementalClassifier",
    "N",
    "ReplayPlugin",
    "TaskBalancedDataLoader",
    "accuracy_metrics",
    "benchmark",
    "digits",
    "maybe_load_checkpoint",
    "mlp",
    "save_checkpoint",
    "strategy",
]

N = 60
BATCH = 20


def digits(classes, n=N):
    x, y = (torch.tensor(values) for values in load_digits(return_X_y=True))
    chosen = torch.isin(y, torch.tensor(classes)).nonzero().flatten()[:n]
    return x[chosen].float() / 16, y[chosen]


def benchmark(classes, multi_task=False):
    """Experiences with some classes each."""
    parts = [digits(some) for some in classes]
    data = TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    data.targets = data.tensors[1].tolist()
    order = [label for some in classes for label in some]
    return nc_benchmark(data, data, len(classes), task_labels=multi_task, fixed_class_order=order, shuffle=False)


def mlp(outputs=10):
    return nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, outputs))


class Heads(MultiTaskModule):
    """A body, and a head for each task that Avalanche adds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 8)
        self.classifier = MultiHeadClassifier(8)

    def forward(self, x, task_labels):
        return self.classifier(torch.tanh(self.body(x)), task_labels)


def strategy(model, *plugins, epochs=2, evaluator=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        train_epochs=epochs,
        eval_mb_size=BATCH,
        plugins=list(plugins),
        evaluator=evaluator,
        **options,
    )
