"""A sequence of tasks, learned one after the other, with one method and strength."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F

import kronlaplace as kl
from experiments.continual.methods import JOINT, METHODS
from experiments.measure import seconds

EVALUATION_BATCH = 1000


@dataclass
class Run:
    """What came out of a sequence of tasks.

    Attributes:
        accuracies: On the test examples of task `j` after task `t`, `(tasks, tasks)`; NaN before it is learned, and after
            the weights have diverged.
        n_bytes: What is kept after each task.
        training_seconds: Seconds of training of each task.
        consolidation_seconds: Seconds of each consolidation.
    """

    accuracies: np.ndarray
    n_bytes: np.ndarray
    training_seconds: np.ndarray
    consolidation_seconds: np.ndarray

    @classmethod
    def empty(cls, n_tasks):
        return cls(np.full((n_tasks, n_tasks), np.nan), *np.full((3, n_tasks), np.nan))

    @classmethod
    def from_tensors(cls, tensors):
        return cls(*(tensors[field.name].numpy().copy() for field in fields(cls)))

    def to_tensors(self):
        return {field.name: torch.from_numpy(getattr(self, field.name)) for field in fields(self)}

    def series(self):
        """By name, a number after each task."""
        return {
            "accuracy": average_accuracy(self.accuracies),
            "forgetting": forgetting(self.accuracies),
            "bytes": self.n_bytes,
            "training_seconds": self.training_seconds,
            "consolidation_seconds": self.consolidation_seconds,
        }


def average_accuracy(accuracies):
    """After each task `t`, the mean over the tasks so far of the accuracy on them then, `(tasks,)`."""
    return np.array([row[: t + 1].mean() for t, row in enumerate(accuracies)])


def forgetting(accuracies):
    """After each task `t`, the mean over the tasks so far of their best accuracy until then minus that then, `(tasks,)`."""
    seen = [accuracies[: t + 1, : t + 1] for t in range(len(accuracies))]
    return np.array([(np.fmax.reduce(rows) - rows[-1]).mean() for rows in seen])


def accuracy(model, examples):
    model.task = examples.task
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in examples.in_order(EVALUATION_BATCH)]
    return float(torch.stack(right).sum()) / len(examples)


def diverged(model, examples):
    model.task = examples.task
    with torch.no_grad():
        return not torch.stack([model(x).isfinite().all() for x, _ in examples.in_order(EVALUATION_BATCH)]).all()


def optimizer_of(model, args, memory):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=args.lr, fused=True)
    prior = memory if isinstance(memory, kl.QuadraticPenalty) else None
    return kl.NaturalGradient(model, "classification", params=parameters, lr=args.lr, prior=prior, seed=args.seeds[0])


def learn(model, data, args, seed, *, memory=None, method=None):
    """Train on the batches of `data`, and return the seconds that it took.

    Args:
        model: The network.
        data: The examples of one task or more.
        args: The settings.
        seed: Of the order of the batches.
        memory: Has the penalty, if there is one.
        method: That of the memory.
    """
    optimizer = optimizer_of(model, args, memory)
    n_steps = args.epochs * -(-len(data) // args.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, n_steps)
    generator = torch.Generator().manual_seed(seed)

    def train():
        for _ in range(args.epochs):
            model.train()
            for task, x, y in data.shuffled(args.batch_size, generator):
                model.task = task
                optimizer.zero_grad()
                outputs = model(x)
                if args.optimizer == "natural-gradient":
                    optimizer.update_curvature(outputs)
                F.cross_entropy(outputs, y).backward()
                if memory is not None:
                    method.observe(memory)
                    (memory.penalty() / len(data)).backward()
                optimizer.step()
                schedule.step()
            model.eval()
            if memory is not None:
                method.after_epoch(memory, data, args)

    return seconds(train, next(model.parameters()).device)


def run_sequence(problem, name, strength, seed, args, files, advance):
    """Learn all tasks, one after the other, with one method and strength, and go on where the files end.

    `advance(n)` is called whenever `n` more tasks are done.
    """
    method, train, device = METHODS[name], problem.train, problem.train.x.device
    model = problem.initial(seed)
    saved = files.read(model, method)
    if saved is None:
        run, n_done, is_finished = Run.empty(args.tasks), 0, False
        memory = None if method is None else method.create(model, strength, args)
    else:
        run, n_done, is_finished, memory = saved
    advance(args.tasks if is_finished else n_done)
    for t in range(n_done, args.tasks):
        if is_finished:
            break
        examples = train.examples(t)
        if name == JOINT:
            taken = learn(model, train.mixed(range(t + 1)), args, seed + t)
        elif memory is None:
            taken = learn(model, examples, args, seed + t)
        else:
            model.freeze_other_heads(t)
            taken = learn(model, examples, args, seed + t, memory=memory, method=method)
        run.training_seconds[t] = taken
        is_finished = diverged(model, examples)
        if not is_finished:
            run.n_bytes[t] = train.n_bytes(range(t + 1)) if name == JOINT else 0
            if memory is not None:
                model.task = t
                run.consolidation_seconds[t] = seconds(
                    lambda examples=examples: method.consolidate(memory, examples, args), device
                )
                run.n_bytes[t] = memory.n_bytes
            run.accuracies[t, : t + 1] = [accuracy(model, problem.test.examples(j)) for j in range(t + 1)]
            is_finished = t + 1 == args.tasks
            advance(1)
        else:
            advance(args.tasks - t)
        files.write(run, t + 1, is_finished, model, memory)
    return run
