"""Image classification: a LeNet at its MAP, and the Laplace posterior around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from kronlaplace import metrics
from kronlaplace.demo import networks, pictures
from kronlaplace.demo.datasets import ImageData
from kronlaplace.demo.fitting import Outcome, Settings, build, count, fit_posterior, seeds_of
from kronlaplace.demo.report import Column, Table
from kronlaplace.demo.training import Recipe, train
from kronlaplace.laplace import KronLaplace
from kronlaplace.likelihoods.links import Link

__all__ = ["describe", "run", "train_on"]

FloatArray = npt.NDArray[np.float64]

MAP, LAST_LAYER, ALL_LAYERS = "MAP", "Laplace, last layer", "Laplace, all layers"

COLUMNS = (
    Column("accuracy", "accuracy"),
    Column("nll", "NLL"),
    Column("brier", "Brier"),
    Column("ece", "ECE"),
    Column("ood_auroc", "OOD AUROC"),
)

_NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], Recipe, str]] = {
    "digits": (networks.small_lenet, Recipe(2000, 64, 3e-3, prior_precision=10.0), "small LeNet"),
    "mnist": (networks.lenet5, Recipe(4700, 128, 2e-3, prior_precision=10.0), "LeNet-5"),
}
_PREDICT_CHUNK = 1000
_DRAWS = 1000


def describe(data: ImageData) -> str:
    """Describe data set and network in one line."""
    network, _, name = _NETWORKS[data.name]
    model = build(network, 0, torch.device("cpu"))
    return (
        f"{data.title}, {len(data.train_x):,} training and {len(data.test_x):,} test images; "
        f"{name}, {count(model)} parameters"
    )


def train_on(data: ImageData, device: torch.device, seed: int) -> nn.Sequential:
    """Train the network of the data set to its MAP, and return it in evaluation mode."""
    network, recipe, _ = _NETWORKS[data.name]
    weight_seed, batch_seed = seeds_of(seed)
    model = build(network, weight_seed, device)
    x, y = data.train_x.to(device), data.train_y.to(device)
    train(model, nn.CrossEntropyLoss(), x, y, recipe, seed=batch_seed, description="Training")
    return model


def run(data: ImageData, settings: Settings, folder: Path) -> Outcome:
    """Train, fit, tune, score, and write the posteriors and the reliability diagram to `folder`."""
    model = train_on(data, settings.device, settings.seed)
    x, y = data.train_x.to(settings.device), data.train_y.to(settings.device)
    everything = fit_posterior(model, "classification", x, y, settings)
    last = KronLaplace(model, "classification", settings.estimator, layers=[str(len(model) - 1)])
    posteriors = {LAST_LAYER: last.fit(fisher=everything.fisher).tune(), ALL_LAYERS: everything}

    def predict_map(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return model(inputs).double().softmax(dim=1)

    predictors = {MAP: predict_map} | {name: _averaged(p, settings.seed) for name, p in posteriors.items()}
    labels = data.test_y.numpy()
    scores, curves, errors = {}, {}, {}
    for method, predict in predictors.items():
        inside = _in_chunks(predict, data.test_x, settings.device, f"{method}: test images")
        outside = _in_chunks(predict, data.rotated_test_x, settings.device, f"{method}: rotated images")
        scores[method] = _scores(inside, outside, labels)[None]
        curves[method] = metrics.reliability_curve(inside, labels)
        errors[method] = metrics.expected_calibration_error(inside, labels)

    files = [folder / "posterior.safetensors", folder / "posterior_last_layer.safetensors"]
    for file, method in zip(files, (ALL_LAYERS, LAST_LAYER), strict=True):
        posteriors[method].save(file)
    if settings.pictures:
        files.append(folder / "reliability.png")
        pictures.draw_reliability(files[-1], f"{data.name}: reliability", curves, errors)
    return Outcome(describe(data), Table(COLUMNS, scores), _notes(posteriors), files)


def _notes(posteriors: Mapping[str, KronLaplace]) -> list[str]:
    tuned = [
        f"{method}: prior precision {float(posterior.prior_precision):.4g} tuned by the evidence, "
        f"log marginal likelihood {float(posterior.log_marginal_likelihood()):.2f}"
        for method, posterior in posteriors.items()
    ]
    return [
        *tuned,
        f"Laplace probabilities: softmax averaged over {_DRAWS} draws of the linearized outputs",
        "OOD AUROC: test images rotated by 90 degrees against test images, distinguished by predictive entropy",
        "NLL in nats; Brier summed over classes; ECE of the top label in 15 bins of equal width",
    ]


def _averaged(posterior: KronLaplace, seed: int) -> Callable[[Tensor], Tensor]:
    """Average the linearized predictive over draws: the probit formula sees no correlation between the outputs."""

    def predict(inputs: Tensor) -> Tensor:
        probabilities = posterior.predict(inputs, link=Link.MC, n_samples=_DRAWS, seed=seed)
        assert isinstance(probabilities, Tensor)
        return probabilities

    return predict


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


def _in_chunks(predict: Callable[[Tensor], Tensor], x: Tensor, device: torch.device, description: str) -> FloatArray:
    """Probabilities of all rows as float64, `(N, C)`."""
    chunks = tqdm(x.split(_PREDICT_CHUNK), desc=description, disable=None, leave=False)
    probabilities = torch.cat([predict(chunk.to(device)).double().cpu() for chunk in chunks])
    return np.asarray(probabilities.numpy())
