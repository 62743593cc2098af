"""Classification: a network at its MAP, and the Laplace posterior around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kronlaplace import metrics
from kronlaplace.demo import networks, pictures
from kronlaplace.demo.data import ClassificationData
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
from kronlaplace.demo.images import turned
from kronlaplace.demo.report import Column, Table
from kronlaplace.demo.training import Recipe, train
from kronlaplace.laplace import KronLaplace

__all__ = ["describe", "run", "train_on"]

FloatArray = npt.NDArray[np.float64]
Predictor = Callable[[Tensor], FloatArray]
"""From inputs `(N, ...)` on the CPU to probabilities of all classes, `(N, C)`."""

COLUMNS = (
    Column("accuracy", "accuracy"),
    Column("nll", "NLL"),
    Column("brier", "Brier"),
    Column("ece", "ECE"),
    Column("ood_auroc", "OOD AUROC"),
)

_DECAY = 1e-4
_NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], Recipe, str]] = {
    "digits": (networks.small_lenet, Recipe(2000, 64, 3e-3, weight_decay=_DECAY), "small LeNet"),
    "moons": (
        partial(networks.one_hidden_layer, 2),
        Recipe(2000, 32, 1e-2, weight_decay=_DECAY),
        "one hidden layer of 50 ReLU units",
    ),
    "breast-cancer": (
        partial(networks.one_hidden_layer, 30),
        Recipe(2000, 32, 1e-3, weight_decay=_DECAY),
        "one hidden layer of 50 ReLU units",
    ),
    "wine": (
        partial(networks.one_hidden_layer, 13, n_outputs=3),
        Recipe(2000, 32, 1e-3, weight_decay=_DECAY),
        "one hidden layer of 50 ReLU units",
    ),
    "mnist": (networks.lenet5, Recipe(4700, 128, 2e-3, prior_precision=10.0), "LeNet-5"),
}
"""Per data set the network, its training (the usual one: until it fits the training data), and its name for readers."""

_PREDICT_CHUNK = 1000
_PLANE = np.linspace(-10.0, 10.0, 201)
_TURNED_DIGIT = 3
_FINE_ANGLES, _COARSE_ANGLES = np.arange(0.0, 181.0, 5.0), np.arange(0.0, 181.0, 15.0)
_MOST_TURNED = 500


def describe(data: ClassificationData) -> str:
    """Describe data set and network in one line."""
    network, _, name = _NETWORKS[data.name]
    model = build(network, 0, torch.device("cpu"))
    kind = "images" if data.has_images else "rows"
    return (
        f"{data.title}, {data.n_classes} classes, {len(data.train_x):,} training and {len(data.test_x):,} test {kind}; "
        f"{name}, {count(model)} parameters"
    )


def train_on(data: ClassificationData, device: torch.device, seed: int) -> nn.Sequential:
    """Train the network of the data set to its MAP, and return it in evaluation mode."""
    network, recipe, _ = _NETWORKS[data.name]
    weight_seed, batch_seed = seeds_of(seed)
    model = build(network, weight_seed, device)
    loss = nn.BCEWithLogitsLoss() if data.n_classes == 2 else nn.CrossEntropyLoss()
    train(
        model, loss, data.train_x.to(device), _targets(data).to(device), recipe, seed=batch_seed, description="Training"
    )
    return model


def run(data: ClassificationData, settings: Settings, folder: Path) -> Outcome:
    """Train, fit, tune, score, and write the posteriors and the pictures to `folder`."""
    model = train_on(data, settings.device, settings.seed)
    x, y = data.train_x.to(settings.device), _targets(data).to(settings.device)
    likelihood = "binary" if data.n_classes == 2 else "classification"
    posteriors = fit_posteriors(model, likelihood, x, y, settings)

    predictors = {MAP: _predictor(partial(_at_map, model), settings.device)}
    predictors |= {name: _predictor(partial(_averaged, p), settings.device) for name, p in posteriors.items()}
    labels = data.test_y.numpy()
    scores, curves, errors = {}, {}, {}
    for method, predict in predictors.items():
        inside, outside = predict(data.test_x), predict(data.foreign_x)
        scores[method] = _scores(inside, outside, labels)[None]
        curves[method] = metrics.reliability_curve(inside, labels)
        errors[method] = metrics.expected_calibration_error(inside, labels)

    files = [folder / "posterior.safetensors", folder / "posterior_last_layer.safetensors"]
    for file, method in zip(files, (ALL_LAYERS, LAST_LAYER), strict=True):
        posteriors[method].save(file)
    if settings.pictures:
        files.append(folder / "reliability.png")
        pictures.draw_reliability(files[-1], f"{data.name}: reliability", curves, errors)
        if data.has_images:
            files.append(folder / "turned.png")
            _draw_turned(files[-1], data, predictors)
        if data.train_x.shape[1:] == (2,):
            files.append(folder / "plane.png")
            _draw_plane(files[-1], data, predictors)
    return Outcome(describe(data), Table(COLUMNS, scores), _notes(data, posteriors), files)


def _targets(data: ClassificationData) -> Tensor:
    """Training labels as loss and likelihood take them: `(N, 1)` zeros and ones for two classes, else `(N,)`."""
    return data.train_y.float().unsqueeze(1) if data.n_classes == 2 else data.train_y


def _notes(data: ClassificationData, posteriors: Mapping[str, KronLaplace]) -> list[str]:
    tuned = [
        f"{method}: prior precision {prior_precision_of(posterior):.4g}, scale of the logits {posterior.logit_scale:.4g}, "
        f"log marginal likelihood {float(posterior.log_marginal_likelihood()):.2f}"
        for method, posterior in posteriors.items()
    ]
    return [
        *tuned,
        "Laplace: fit, tune and predict with their defaults, no validation data",
        f"OOD AUROC: test inputs against {data.foreign}, by predictive entropy",
        "NLL in nats; Brier summed over classes; ECE of the top label in 15 bins of equal width",
    ]


def _at_map(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(inputs).double()
    return logits.softmax(dim=1) if logits.shape[1] > 1 else logits.sigmoid()


def _averaged(posterior: KronLaplace, inputs: Tensor) -> Tensor:
    probabilities = posterior.predict(inputs)
    assert isinstance(probabilities, Tensor)
    return probabilities


def _predictor(predict: Callable[[Tensor], Tensor], device: torch.device) -> Predictor:
    """Predict in chunks on the device; a single probability becomes those of both classes."""

    def in_chunks(x: Tensor) -> FloatArray:
        chunks = tqdm(x.split(_PREDICT_CHUNK), desc="Predicting", disable=None, leave=False)
        p = torch.cat([predict(chunk.to(device)).double().cpu() for chunk in chunks])
        return np.asarray((p if p.shape[1] > 1 else torch.cat([1 - p, p], dim=1)).numpy())

    return in_chunks


def _scores(inside: FloatArray, outside: FloatArray, labels: npt.NDArray[np.int64]) -> FloatArray:
    """Return one row of the table, in the order of `COLUMNS`."""
    return np.array(
        [
            metrics.accuracy(inside, labels),
            metrics.negative_log_likelihood(inside, labels),
            metrics.brier_score(inside, labels),
            metrics.expected_calibration_error(inside, labels),
            metrics.ood_auroc(metrics.predictive_entropy(inside), metrics.predictive_entropy(outside)),
        ]
    )


def _draw_turned(path: Path, data: ClassificationData, predictors: Mapping[str, Predictor]) -> None:
    """Draw the confidence in the first test image of a three as it is turned, and the mean over test images."""
    which = int((data.test_y == _TURNED_DIGIT).nonzero()[0])
    every = data.test_x[:_MOST_TURNED]
    background = float(data.test_x.min())
    one = torch.cat([turned(data.test_x[which : which + 1], angle, background) for angle in _FINE_ANGLES])
    strip = np.isin(_FINE_ANGLES, _COARSE_ANGLES)
    lines = {}
    for method in (MAP, ALL_LAYERS):
        predict = predictors[method]
        probabilities = predict(one)
        means = [predict(turned(every, angle, background)).max(axis=1).mean() for angle in _COARSE_ANGLES]
        lines[method] = pictures.Turning(
            probabilities.max(axis=1), probabilities.argmax(axis=1)[strip], np.array(means)
        )
    pictures.draw_turned(
        path,
        f"{data.name}: the first test image of a {_TURNED_DIGIT}, turned counterclockwise",
        (_FINE_ANGLES, _COARSE_ANGLES),
        one[strip, 0].numpy(),
        lines,
        f"mean over {len(every)} test images",
    )


def _draw_plane(path: Path, data: ClassificationData, predictors: Mapping[str, Predictor]) -> None:
    """Draw the probability of the second class over a square that is far larger than the data."""
    first, second = np.meshgrid(_PLANE, _PLANE)
    points = torch.from_numpy(np.stack([first.ravel(), second.ravel()], axis=1)).float()
    pictures.draw_plane(
        path,
        f"{data.name}: confidence, far from the data too",
        _PLANE,
        {method: predictors[method](points)[:, 1].reshape(first.shape) for method in (MAP, ALL_LAYERS)},
        (data.train_x.numpy(), data.train_y.numpy()),
    )
