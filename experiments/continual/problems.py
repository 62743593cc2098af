"""Problems: sequences of tasks, and the networks that learn them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.cifar_files import train_and_test
from kronlaplace.demo.datasets import load

WIDTH = 100
SHARED, OWN = "shared", "own"
HEADS = (SHARED, OWN)
N_CLASSES, CLASSES_OF_A_SPLIT = 10, 2


@dataclass(frozen=True)
class Settings:
    """Data set, and what the command line takes without its options."""

    data: str
    title: str
    is_split: bool
    batch_size: int
    epochs: int

    @property
    def most_tasks(self):
        return N_CLASSES // CLASSES_OF_A_SPLIT if self.is_split else None

    @property
    def tasks(self):
        return self.most_tasks or 10

    @property
    def heads(self):
        return OWN if self.is_split else SHARED


PROBLEMS = {
    "permuted-digits": Settings("digits", "permuted 8x8 digits", False, 50, 20),
    "permuted-mnist": Settings("mnist", "permuted MNIST", False, 250, 10),
    "split-digits": Settings("digits", "split 8x8 digits", True, 50, 20),
    "split-mnist": Settings("mnist", "split MNIST", True, 250, 10),
    "split-cifar10": Settings("cifar10", "split CIFAR-10", True, 100, 20),
}


@dataclass(frozen=True)
class Examples:
    """Examples of one task: inputs `(N, ...)` and labels `(N,)`."""

    task: int
    x: Tensor
    y: Tensor

    def __len__(self):
        return len(self.y)

    def shuffled(self, batch_size, generator):
        """One epoch of batches, each with its task."""
        for rows in torch.randperm(len(self), generator=generator).to(self.x.device).split(batch_size):
            yield self.task, self.x[rows], self.y[rows]

    def in_order(self, batch_size):
        """The batches `(x, y)`, every time in the same order."""
        return list(zip(self.x.split(batch_size), self.y.split(batch_size), strict=True))


@dataclass(frozen=True)
class Mixed:
    """Examples of several tasks, whose batches are put together as they are needed: there may be too many to keep."""

    tasks: Tensor
    x: Tensor
    y: Tensor
    rows: Tensor
    orders: Tensor | None

    def __len__(self):
        return len(self.rows)

    def shuffled(self, batch_size, generator):
        """One epoch of batches, each with the task of every example."""
        for part in torch.randperm(len(self.rows), generator=generator).to(self.x.device).split(batch_size):
            tasks, rows = self.tasks[part], self.rows[part]
            x = self.x[rows]
            yield tasks, x if self.orders is None else x.gather(1, self.orders[tasks]), self.y[rows]


@dataclass(frozen=True)
class Tasks:
    """The examples of all tasks: of task `t` the rows `rows[t]` of the images, with their pixels in the order `orders[t]`.

    Attributes:
        x: Inputs, `(N, ...)`; `(N, pixels)` where there are orders.
        y: Labels, `(N,)`.
        rows: Of each task, `(N_t,)`.
        orders: `(tasks, pixels)`, or None.
    """

    x: Tensor
    y: Tensor
    rows: tuple[Tensor, ...]
    orders: Tensor | None = None

    def examples(self, task):
        rows = self.rows[task]
        x = self.x[rows]
        return Examples(task, x if self.orders is None else x[:, self.orders[task]], self.y[rows])

    def mixed(self, tasks):
        numbers = torch.cat([torch.full_like(self.rows[t], t) for t in tasks])
        return Mixed(numbers, self.x, self.y, torch.cat([self.rows[t] for t in tasks]), self.orders)

    def n_bytes(self, tasks):
        """What it takes to keep the examples of some tasks."""
        return sum(len(self.rows[t]) for t in tasks) * (self.x[0].nbytes + self.y[0].nbytes)


class Network(nn.Module):
    """A body, and one head for all tasks or one for each.

    `task` says whose head gives the outputs: a number, or of a mixed batch one for each example, `(N,)`.
    """

    def __init__(self, body, n_features, n_heads, n_classes):
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(nn.Linear(n_features, n_classes) for _ in range(n_heads))
        self.task = 0

    def forward(self, x):
        features = self.body(x)
        if len(self.heads) == 1:
            return self.heads[0](features)
        if isinstance(self.task, int):
            return self.heads[self.task](features)
        outputs = torch.stack([head(features) for head in self.heads], 1)
        return outputs[torch.arange(len(x), device=x.device), self.task]

    def freeze_other_heads(self, task):
        """Freeze the heads of all tasks but this one."""
        if len(self.heads) > 1:
            for t, head in enumerate(self.heads):
                head.requires_grad_(t == task)


def perceptron(n_pixels):
    """Return the body for digits, and its number of outputs."""
    return nn.Sequential(nn.Linear(n_pixels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()), WIDTH


def convolutions():
    """Return the body for CIFAR-10, and its number of outputs: convolutions 3x3 with 16, 32, and 64 channels."""
    layers, n_in = [], 3
    for n_out in (16, 32, 64):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        n_in = n_out
    return nn.Sequential(*layers, nn.Flatten()), 64 * 4 * 4


@dataclass(frozen=True)
class Problem:
    """Training and test examples of the same tasks, and a function that makes the network for them."""

    train: Tasks
    test: Tasks
    network: Callable[[], Network]

    def initial(self, seed):
        """Build the network, with weights drawn from a seed."""
        torch.manual_seed(seed)
        return self.network().to(self.train.x.device)


def images(name, data_dir, device):
    """Training inputs and labels, and test inputs and labels; digits flattened."""
    if name == "cifar10":
        return [tensor.to(device) for tensor in train_and_test(data_dir)]
    data = load(name, data_dir)
    parts = data.train_x.flatten(1), data.train_y, data.test_x.flatten(1), data.test_y
    return [tensor.to(device) for tensor in parts]


def problem_of(settings, data, heads, n_tasks, n_examples, seed):
    """Make a problem of the images.

    Args:
        settings: Its entry in `PROBLEMS`.
        data: What `images` returned.
        heads: `OWN` or `SHARED`.
        n_tasks: Number of tasks.
        n_examples: Training examples of each task, the first ones; None for all.
        seed: Draws the orders of pixels.
    """
    train_x, train_y, test_x, test_y = data
    if settings.is_split:
        parts = [
            (x, y % CLASSES_OF_A_SPLIT, [torch.where(y // CLASSES_OF_A_SPLIT == t)[0] for t in range(n_tasks)], None)
            for x, y in ((train_x, train_y), (test_x, test_y))
        ]
        n_classes = CLASSES_OF_A_SPLIT
    else:
        generator = torch.Generator().manual_seed(seed)
        orders = torch.stack([torch.randperm(train_x.shape[1], generator=generator) for _ in range(n_tasks)])
        parts = [
            (x, y, [torch.arange(len(y), device=y.device)] * n_tasks, orders.to(x.device))
            for x, y in ((train_x, train_y), (test_x, test_y))
        ]
        n_classes = N_CLASSES
    train, test = (
        Tasks(x, y, tuple(r[:n] for r in rows), order)
        for n, (x, y, rows, order) in zip((n_examples, None), parts, strict=True)
    )

    def network():
        body, n_features = convolutions() if train_x.ndim > 2 else perceptron(train_x.shape[1])
        return Network(body, n_features, n_tasks if heads == OWN else 1, n_classes)

    return Problem(train, test, network)
