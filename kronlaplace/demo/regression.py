"""Regression: one hidden layer at its MAP, and the Laplace posterior around it, on one split or on many."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kronlaplace import metrics
from kronlaplace.demo import pictures
from kronlaplace.demo.data import RegressionData, RegressionSplit
from kronlaplace.demo.embedded import sine_function
from kronlaplace.demo.fitting import (
    ALL_LAYERS,
    LAST_LAYER,
    MAP,
    Outcome,
    Settings,
    build,
    count,
    fit_posteriors,
    prior_precision_of,
    seeds_of,
)
from kronlaplace.demo.networks import one_hidden_layer
from kronlaplace.demo.report import Column, Table, mean_and_error
from kronlaplace.demo.training import GaussianNLL, Recipe, train
from kronlaplace.laplace import KronLaplace
from kronlaplace.likelihoods import Prediction

__all__ = ["describe", "run"]

FloatArray = npt.NDArray[np.float64]

LEVELS = (0.5, 0.9, 0.95)
COLUMNS = (
    Column("rmse", "RMSE", 3),
    Column("log_likelihood", "log-likelihood", 3),
    *(Column(f"coverage_{100 * level:.0f}", f"{100 * level:.0f} % covered", 3) for level in LEVELS),
)

METHODS = (MAP, LAST_LAYER, ALL_LAYERS)

RECIPE = Recipe(steps=5000, batch_size=32, learning_rate=0.01, prior_precision=10.0)
"""One recipe for all UCI tables, chosen on validation parts of the training splits (log-likelihood and RMSE)."""

EMBEDDED_RECIPES = {
    "sine": Recipe(steps=5000, batch_size=32, learning_rate=0.01, weight_decay=1e-4),
    "diabetes": Recipe(steps=5000, batch_size=32, learning_rate=1e-3, weight_decay=1e-4),
}
"""The usual training: the mean squared error, Adam and a small weight decay, for many epochs."""

_PREFIXES = {LAST_LAYER: "last_layer_", ALL_LAYERS: ""}
_CURVE = np.linspace(0.01, 0.99, 99)


@dataclass(frozen=True)
class Gaussians:
    """Predictions in original units, `(N,)` each; the total variance contains the noise."""

    mean: FloatArray
    function_variance: FloatArray
    noise_variance: float

    @property
    def variance(self) -> FloatArray:
        return self.function_variance + self.noise_variance


@dataclass(frozen=True)
class Fitted:
    """The result of a split: the network, its posteriors, and the maximum-likelihood noise, all in standardized units."""

    split: RegressionSplit
    model: nn.Sequential
    map_noise_variance: float
    posteriors: dict[str, KronLaplace]

    def predict(self, x: Tensor) -> dict[str, Gaussians]:
        """Predictions of all methods at standardized inputs, in original units."""
        offset, unit = self.split.target_mean, self.split.target_std
        with torch.no_grad():
            mean = offset + unit * _column(self.model(x))
        predictions = {MAP: Gaussians(mean, np.zeros_like(mean), unit**2 * self.map_noise_variance)}
        for method, posterior in self.posteriors.items():
            prediction = posterior.predict(x)
            assert isinstance(prediction, Prediction)
            predictions[method] = Gaussians(
                offset + unit * _column(prediction.mean),
                unit**2 * _column(prediction.variance),
                unit**2 * float(prediction.noise_variance),
            )
        return predictions


def describe(data: RegressionData) -> str:
    """Describe data set and network in one line."""
    train_rows, test_rows = data.splits[0]
    model = build(lambda: _network(data), 0, torch.device("cpu"))
    splits = f", {len(data.splits)} splits" if len(data.splits) > 1 else ""
    return (
        f"{data.title}, {len(train_rows):,} training and {len(test_rows):,} test rows{splits}; "
        f"one hidden layer of {model[0].out_features} {type(model[1]).__name__} units, {count(model)} parameters"
    )


def run(data: RegressionData, settings: Settings, folder: Path) -> Outcome:
    """Train, fit, tune and score every split; write the posteriors and the pictures to `folder`."""
    several = len(data.splits) > 1
    scores: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    curves: dict[str, list[FloatArray]] = {method: [] for method in METHODS}
    tuned: defaultdict[str, list[float]] = defaultdict(list)
    files = []
    bar = tqdm(range(len(data.splits)), desc=f"{data.name} splits", disable=None if several else True, leave=False)
    for k in bar:
        split = data.split(k)
        fitted = _fit(data, split, settings, k, quiet=several)
        predictions = fitted.predict(split.test_x.to(settings.device))
        target = split.target_mean + split.target_std * _column(split.test_y)
        for method, p in predictions.items():
            scores[method].append(
                [
                    metrics.rmse(p.mean, target),
                    metrics.gaussian_log_likelihood(p.mean, p.variance, target),
                    *metrics.interval_coverage(p.mean, p.variance, target, LEVELS),
                ]
            )
            curves[method].append(metrics.interval_coverage(p.mean, p.variance, target, _CURVE))
        tuned["map_noise_std"].append(predictions[MAP].noise_variance ** 0.5)
        for method, prefix in _PREFIXES.items():
            posterior = fitted.posteriors[method]
            tuned[f"{prefix}prior_precision"].append(prior_precision_of(posterior))
            tuned[f"{prefix}noise_std"].append(predictions[method].noise_variance ** 0.5)
            tuned[f"{prefix}evidence"].append(float(posterior.log_marginal_likelihood()))
        files.append(folder / (f"posterior_split_{k:02d}.safetensors" if several else "posterior.safetensors"))
        fitted.posteriors[ALL_LAYERS].save(files[-1])

    table = Table(COLUMNS, {method: np.array(rows) for method, rows in scores.items()})
    if several:
        files.append(folder / "splits.csv")
        table.write_splits_csv(files[-1], tuned)
    if settings.pictures:
        files.append(folder / "reliability.png")
        empirical = {method: np.array(rows) for method, rows in curves.items()}
        pictures.draw_coverage(files[-1], f"{data.name}: interval coverage", _CURVE, empirical)
        if data.name == "sine":
            files.append(folder / "predictive_band.png")
            _draw_band(files[-1], data, fitted, settings)
    return Outcome(describe(data), table, _notes(tuned, several), files)


def _network(data: RegressionData) -> nn.Sequential:
    """Build one hidden layer of 50 units: ReLU for tables, tanh for the smooth function of `sine`."""
    return one_hidden_layer(data.inputs.shape[1], activation=nn.Tanh if data.name == "sine" else nn.ReLU)


def _fit(data: RegressionData, split: RegressionSplit, settings: Settings, index: int, *, quiet: bool) -> Fitted:
    weight_seed, batch_seed = seeds_of(settings.seed, index)
    x, y = split.train_x.to(settings.device), split.train_y.to(settings.device)
    model = build(lambda: _network(data), weight_seed, settings.device)
    recipe = EMBEDDED_RECIPES.get(data.name, RECIPE)
    loss = nn.MSELoss() if data.name in EMBEDDED_RECIPES else GaussianNLL()
    train(model, loss, x, y, recipe, seed=batch_seed, description=None if quiet else "Training")
    with torch.no_grad():
        noise_variance = float((model(x) - y).square().mean())
    return Fitted(split, model, noise_variance, fit_posteriors(model, "regression", x, y, settings, progress=not quiet))


def _notes(tuned: Mapping[str, list[float]], several: bool) -> list[str]:
    def text(key: str) -> str:
        mean, error = mean_and_error(tuned[key])
        return f"{mean:.4g} ± {error:.2g}" if several else f"{mean:.4g}"

    notes = [
        f"MAP: noise {text('map_noise_std')}, by maximum likelihood on the training residuals",
        *(
            f"{method}: prior precision {text(f'{prefix}prior_precision')}, noise {text(f'{prefix}noise_std')}, "
            f"log marginal likelihood {text(f'{prefix}evidence')}"
            for method, prefix in _PREFIXES.items()
        ),
        "Laplace: fit, tune and predict with their defaults, no validation data",
        "RMSE, noise (a standard deviation) and test log-likelihood (nats per target) in the target's units",
    ]
    return [*notes, "mean ± standard error over the splits"] if several else notes


def _draw_band(path: Path, data: RegressionData, fitted: Fitted, settings: Settings) -> None:
    span = np.ptp(data.inputs)
    grid = np.linspace(data.inputs.min() - 0.15 * span, data.inputs.max() + 0.15 * span, 400)
    x = torch.from_numpy((grid[:, None] - fitted.split.feature_mean) / fitted.split.feature_std).float()
    predictions = fitted.predict(x.to(settings.device))
    rows = data.splits[0][0]
    pictures.draw_predictive_band(
        path,
        f"{data.name}: predictive band",
        grid,
        sine_function(grid),
        predictions[MAP].mean,
        {ALL_LAYERS: np.sqrt(predictions[ALL_LAYERS].function_variance)},
        {method: np.sqrt(predictions[method].variance) for method in (MAP, ALL_LAYERS)},
        (data.inputs[rows, 0], data.targets[rows]),
    )


def _column(values: Tensor) -> FloatArray:
    """Return the one column of `(N, 1)` as float64 on the CPU, `(N,)`."""
    return np.asarray(values.detach().double().cpu().squeeze(1).numpy())
