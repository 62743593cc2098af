"""How the experiments train: every optimizer from the same weights, on the same batches in the same order."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.measure import seconds

DECAY = 0.7
DIVERGED = 3.0


@dataclass(frozen=True)
class Problem:
    """A network, data, and a loss.

    `loss` is the mean over the examples of a batch, of outputs and targets; `likelihood` is the same for `kronlaplace`.
    What counts is the smoothed loss, or, where there is `score`, its value for the network on all data.
    """

    title: str
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: object
    x: Tensor
    y: Tensor
    batch_size: int
    score: Callable[[nn.Module], float] | None = None

    def initial(self, seed):
        """Build the network, with weights drawn from a seed."""
        torch.manual_seed(seed)
        return self.network().to(self.x.device)

    def batches(self, seed):
        """Yield batches without end: each epoch in a new order, the last short batch left out."""
        generator = torch.Generator().manual_seed(seed)
        size = min(self.batch_size, len(self.x))
        while True:
            order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
            for indices in order[: len(order) // size * size].split(size):
                yield self.x[indices], self.y[indices]


@dataclass(frozen=True)
class Optimizer:
    """A way to train with settings to choose from.

    `prepare(model, problem, **settings)` returns a function that makes one update from a batch `(x, y)` and returns the
    loss before it, a 0-dim tensor. Where the function has an attribute `evaluated`, evaluations are made in that context.
    `grid` has the settings that are tried, `missing` says why the optimizer cannot be used here.
    """

    prepare: Callable[..., Callable[[Tensor, Tensor], Tensor]]
    grid: tuple[Mapping[str, object], ...] = ({},)
    missing: str = ""


def updater(model, problem, *optimizers):
    """Return the usual update: forward, backward, and a step of the optimizers."""

    def update(x, y):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = problem.loss(model(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return update


@dataclass
class Log:
    """The course of a training.

    `losses` are those of the batches before the updates, `seconds` the wall clock after them without evaluations, `scores`
    has the value of the problem's score by number of updates.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: dict[int, float] = field(default_factory=dict)
    error: str = ""

    @property
    def smoothed(self):
        """The exponential moving average of the losses with decay 0.7, corrected for its start at zero."""
        mean, means = 0.0, []
        for k, loss in enumerate(self.losses, 1):
            mean = DECAY * mean + (1 - DECAY) * loss
            means.append(mean / (1 - DECAY**k))
        return means

    def curve(self):
        """What counts, by number of updates: the scores where there are some, the smoothed losses otherwise."""
        return self.scores or dict(enumerate(self.smoothed, 1))

    def reached(self, target):
        """How many updates and seconds it took to reach a target, infinity if never."""
        updates = next((k for k, value in self.curve().items() if value <= target), math.inf)
        return (updates, self.seconds[updates - 1]) if updates < math.inf else (math.inf, math.inf)

    def after(self, seconds):
        """What counts at a time, NaN if the training diverged before; without such a time at the end."""
        within = [value for k, value in self.curve().items() if self.seconds[k - 1] <= seconds]
        return math.nan if self.error or not within else within[-1]

    def write_csv(self, path):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["update", "loss", "smoothed", "seconds", "score"])
            for k, row in enumerate(zip(self.losses, self.smoothed, self.seconds, strict=True), 1):
                writer.writerow([k, *(f"{value:.6g}" for value in row), self.scores.get(k, "")])


@dataclass(frozen=True)
class Limits:
    """When a training ends: after a number of updates, seconds, or once a target is reached, whichever comes first."""

    updates: float = math.inf
    seconds: float = math.inf
    target: float = -math.inf


class Training:
    """A training that goes update by update, so that several can take turns.

    One whose optimizer raises an error ends with the error in its log; a loss that is not finite, or above three times the
    first one, is a divergence.
    """

    def __init__(self, problem, optimizer, settings, limits, *, seed=0, score_every=10):
        self.problem, self.limits, self.score_every = problem, limits, score_every
        self.model = problem.initial(seed)
        self.batches = problem.batches(seed)
        self.log = Log()
        self.clock = seconds(lambda: setattr(self, "update", optimizer.prepare(self.model, problem, **settings)))
        self.is_done = False

    def step(self):
        """Make one update."""
        log, losses = self.log, []
        x, y = next(self.batches)
        try:
            self.clock += seconds(lambda: losses.append(self.update(x, y)), x.device)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            self._end(f"{type(error).__name__}: {error}")
            return
        log.losses.append(float(losses[0]))
        log.seconds.append(self.clock)
        k = len(log.losses)
        if self.problem.score is not None and k % self.score_every == 0:
            with getattr(self.update, "evaluated", nullcontext)():
                log.scores[k] = self.problem.score(self.model)
        if not log.losses[-1] <= DIVERGED * log.losses[0]:
            self._end(f"diverged: loss {log.losses[-1]:.4g}")
        counted = log.scores.get(k, math.inf) if self.problem.score else log.smoothed[-1]
        limits = self.limits
        self.is_done |= k >= limits.updates or self.clock >= limits.seconds or counted <= limits.target

    def _end(self, error):
        self.log.error = f"update {len(self.log.losses) + 1}: {error}"
        self.is_done = True


def train(problem, optimizer, settings, limits, **options):
    """Train to the end and return the log; options are those of `Training`."""
    return train_in_turn({"": Training(problem, optimizer, settings, limits, **options)}, quiet=True)[""]


def train_in_turn(trainings, quiet=False):
    """Train several to the end, by name; the one with the least seconds is next, so that all see the same machine."""
    running = dict(trainings)
    with tqdm(total=len(running), leave=False, disable=True if quiet else None) as bar:
        while running:
            name, training = min(running.items(), key=lambda item: item[1].clock)
            training.step()
            bar.set_description(f"{name}, update {len(training.log.losses)}, {training.clock:.0f} s", refresh=False)
            bar.update(0)
            if training.is_done:
                del running[name]
                bar.update()
    return {name: training.log for name, training in trainings.items()}


def tuned(name, problem, optimizer, limits, **options):
    """Settings of the grid that reach the target with the fewest updates, or end lowest, and a line for each tried."""
    if len(optimizer.grid) == 1:
        return optimizer.grid[0], []
    lines, ranks = [], []
    for settings in tqdm(optimizer.grid, desc=f"{name}, grid", leave=False, disable=None):
        log = train(problem, optimizer, settings, limits, **options)
        reached, last = log.reached(limits.target)[0], log.after(math.inf)
        ranks.append((reached, math.inf if math.isnan(last) else last))
        outcome = log.error or (f"target at update {reached}" if reached < math.inf else f"{last:.4g} at the end")
        lines.append(f"{name}: {described(settings)}: {outcome}")
        tqdm.write(lines[-1])
    return optimizer.grid[min(range(len(ranks)), key=ranks.__getitem__)], lines


def described(settings):
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )
