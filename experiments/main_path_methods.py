"""The methods that `experiments.main_path` compares: networks, and a function from inputs to probabilities."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from experiments.classification_tasks import Task, targets_of, trained
from experiments.peers import laplace_torch
from kronlaplace import metrics
from kronlaplace.demo.data import ClassificationData

MAP = "MAP"
N_ENSEMBLE, HELD_OUT = 5, 0.1
TEMPERATURES = (0.1, 10.0)
FIT_BATCH = 500


@dataclass(frozen=True)
class Problem:
    """A task, its data, the folder of its networks, and the seed."""

    name: str
    task: Task
    data: ClassificationData
    folder: Path
    seed: int

    @cached_property
    def targets(self):
        return targets_of(self.data, self.data.train_y)

    @property
    def likelihood(self):
        return "binary" if self.data.n_classes == 2 else "classification"

    @property
    def loader(self):
        return DataLoader(TensorDataset(self.data.train_x, self.targets), batch_size=FIT_BATCH)

    @cached_property
    def rest_and_kept(self):
        order = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(self.targets)))
        n = round(HELD_OUT * len(order))
        return order[:n], order[n:]

    def network(self, seed, rows=slice(None), kind="all"):
        split = self.seed if self.task.split_by_seed else 0
        path = self.folder / f"{self.name}_split{split}_seed{seed}_{kind}.safetensors"
        return trained(self.task, self.data.train_x[rows], self.targets[rows], seed, path)

    def map(self):
        return self.network(self.seed)

    def ensemble(self):
        return [self.network(self.seed + i) for i in range(N_ENSEMBLE)]

    def of_kept(self):
        return self.network(self.seed, self.rest_and_kept[1], "kept")


def of_both_classes(p):
    p = p.detach().double().cpu()
    return (p if p.shape[1] > 1 else torch.cat([1 - p, p], dim=1)).numpy()


def probabilities(logits):
    return logits.softmax(dim=1) if logits.shape[1] > 1 else logits.sigmoid()


@torch.no_grad()
def logits_of(model, x):
    return model(x).double()


def at_map(model, problem):
    return lambda x: probabilities(logits_of(model, x))


def of_kronlaplace(model, problem, layers=None, **tuning):
    posterior = kl.KronLaplace(model, problem.likelihood, layers=layers).fit(problem.loader)
    return posterior.tune(**tuning).predict


def variational(model, problem):
    return kl.KronLaplace(model, problem.likelihood).fit_variational(problem.loader).posterior.predict


def of_laplace_torch(model, problem, **options):
    model = copy.deepcopy(model)
    if problem.data.n_classes == 2:
        model[-1] = two_outputs(model[-1])
    loader = DataLoader(TensorDataset(problem.data.train_x, problem.data.train_y), batch_size=FIT_BATCH)
    posterior = laplace_torch().Laplace(model, "classification", **options)
    posterior.fit(loader)
    posterior.optimize_prior_precision()
    return posterior


def two_outputs(layer):
    """The layer whose two outputs are minus and plus half of the given layer's single output."""
    wider = nn.Linear(layer.in_features, 2)
    with torch.no_grad():
        wider.weight.copy_(torch.cat([-layer.weight, layer.weight]) / 2)
        wider.bias.copy_(torch.cat([-layer.bias, layer.bias]) / 2)
    return wider


def temperature_scaling(model, problem):
    rest, _ = problem.rest_and_kept
    logits, labels = logits_of(model, problem.data.train_x[rest]), problem.data.train_y[rest].numpy()

    def loss(log_temperature):
        p = of_both_classes(probabilities(logits / math.exp(log_temperature)))
        return metrics.negative_log_likelihood(p, labels)

    temperature = math.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x)
    return lambda x: probabilities(logits_of(model, x) / temperature)


def deep_ensemble(models, problem):
    return lambda x: torch.stack([probabilities(logits_of(model, x)) for model in models]).mean(dim=0)


METHODS: dict[str, tuple[Callable, Callable]] = {
    MAP: (Problem.map, at_map),
    "kronlaplace, no option set": (Problem.map, of_kronlaplace),
    "kronlaplace, last layer": (Problem.map, partial(of_kronlaplace, layers="last")),
    "kronlaplace, logits not scaled": (Problem.map, partial(of_kronlaplace, logit_scale="fixed")),
    "kronlaplace, variational": (Problem.map, variational),
    "laplace-torch, no option set": (Problem.map, of_laplace_torch),
    "laplace-torch, all layers": (Problem.map, partial(of_laplace_torch, subset_of_weights="all")),
    "temperature scaling": (Problem.of_kept, temperature_scaling),
    f"ensemble of {N_ENSEMBLE}": (Problem.ensemble, deep_ensemble),
}
"""By name: the networks of a problem, and what makes of them and the problem a function from inputs to probabilities."""
