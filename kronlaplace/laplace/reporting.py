"""Making a report: predictions of the MAP and of the posterior on the same data, and their scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kronlaplace import _scores
from kronlaplace.data.deferred_checks import DeferredChecks
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.loader import Rewind, iterate, warn_of_share
from kronlaplace.laplace.comparison import Comparison, Statistic, mean_of, two_samples
from kronlaplace.laplace.predictive import Predictive
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.laplace.report import Report
from kronlaplace.laplace.scored import Gaussians, Probabilities, scored, target_array
from kronlaplace.likelihoods import Prediction
from kronlaplace.network.alignment import Alignment

__all__ = ["make_report"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Flat = Probabilities | Gaussians

_METHODS = ("MAP", "posterior")


def make_report(
    predictor: Predictor, data: Iterable[Any], foreign: Iterable[Any] | None, predictive: Predictive, progress: bool
) -> Report:
    """Compare MAP and posterior.

    Args:
        predictor: Predicts with the posterior.
        data: Batches with targets.
        foreign: The foreign inputs in batches, or None.
        predictive: How the posterior predicts.
        progress: Whether to show a progress bar.

    Raises:
        TypeError, ValueError: As `KronLaplace.report`.
    """
    targets, example, pair = _on_data(predictor, data, predictive, progress)
    n_examples = int(example.max()) + 1 if len(example) else 0
    if n_examples < 2:
        raise ValueError(f"a report needs at least two examples with targets, for standard errors; got {n_examples}.")
    at_map, of_posterior = (flat.scores(targets, example) for flat in pair)
    n_foreign = 0
    if foreign is not None:
        outside, foreign_pair = _on_foreign(predictor, foreign, predictive)
        n_foreign = int(outside.max()) + 1
        if n_foreign < 2:
            raise ValueError(f"foreign needs at least two examples, for standard errors; got {n_foreign}.")
        at_map |= _detection(pair[0], example, foreign_pair[0], outside)
        of_posterior |= _detection(pair[1], example, foreign_pair[1], outside)
    return Report(
        rows=tuple(Comparison.of(name, at_map[name], of_posterior[name]) for name in at_map),
        n_examples=n_examples,
        n_foreign=n_foreign,
        regression=isinstance(pair[0], Gaussians),
        unit="example" if n_examples == len(example) else "target",
        curves={name: flat.curve(targets) for name, flat in zip(_METHODS, pair, strict=True)},
    )


def _on_data(
    predictor: Predictor, data: Iterable[Any], predictive: Predictive, progress: bool
) -> tuple[npt.NDArray[np.generic], IntArray, tuple[Flat, Flat]]:
    """Return all targets flat, the examples that they belong to, and both methods' predictions of them."""
    likelihood, device = predictor.likelihood, device_of(predictor.model)
    checks, alignment = DeferredChecks(), Alignment(predictor.model, likelihood)
    targets, examples, pairs = [], [], []
    seen = 0
    warn_of_share(data)
    with preserved_random_state(device), Rewind(data):
        for batch in iterate(data, device, alignment=alignment, progress=progress, description="Comparing"):
            if batch.targets is None:
                raise TypeError("a report needs data with targets, batches (inputs, targets).")
            outputs = predictor.outputs(batch.inputs.value)
            allowed, message = likelihood.check_targets(outputs, batch.targets)
            checks.require(allowed, batch, message)
            pair = _pair(predictor, batch.inputs.value, outputs, predictive)
            flat = target_array(likelihood, batch.targets)
            example = seen + _example_of(len(outputs), len(flat))
            ignored = likelihood.ignored_target
            keep = np.full(len(flat), True) if ignored is None else flat != ignored
            targets.append(flat[keep])
            examples.append(example[keep])
            pairs.append([p.select(keep) for p in pair])
            seen += len(outputs)
        checks.settle()
    numbers = np.unique(np.concatenate(examples), return_inverse=True)[1]
    return np.concatenate(targets), numbers.astype(np.int64), _joined(pairs)


def _on_foreign(
    predictor: Predictor, foreign: Iterable[Any], predictive: Predictive
) -> tuple[IntArray, tuple[Flat, Flat]]:
    """Return the examples that foreign predictions belong to, and both methods' predictions."""
    examples, pairs = [], []
    seen = 0
    for x in foreign:
        outputs = predictor.outputs(x)
        pair = _pair(predictor, x, outputs, predictive)
        examples.append(seen + _example_of(len(outputs), len(pair[0].spread)))
        pairs.append(pair)
        seen += len(outputs)
    return np.concatenate(examples), _joined(pairs)


def _pair(predictor: Predictor, x: Any, outputs: Tensor, predictive: Predictive) -> list[Flat]:
    """Return the predictions of MAP and posterior for one batch."""
    likelihood = predictor.likelihood
    mean, noise = likelihood.sample_mean(outputs), likelihood.noise_variance(outputs)
    at_map = mean if noise is None else Prediction(mean, torch.zeros_like(mean), noise)
    return [scored(likelihood, at_map), scored(likelihood, predictor.predict(x, predictive))]


def _detection(inside: Flat, example: IntArray, outside: Flat, foreign: IntArray) -> dict[str, Statistic]:
    """Return how uncertain predictions are inside and outside, and how well that tells the inputs apart."""
    name = inside.spread_name
    of_examples = [_means(inside.spread, example), _means(outside.spread, foreign)]
    return {
        f"mean {name}": mean_of(inside.spread, example),
        f"mean {name}, foreign": mean_of(outside.spread, foreign),
        "AUROC": two_samples(*_scores.auroc_terms(*of_examples)),
    }


def _means(values: FloatArray, example: IntArray) -> FloatArray:
    return np.asarray(np.bincount(example, weights=values) / np.bincount(example))


def _example_of(n: int, n_targets: int) -> IntArray:
    """Return the example of each of the targets, the same number for each."""
    return np.repeat(np.arange(n), n_targets // n)


def _joined(pairs: list[Any]) -> tuple[Flat, Flat]:
    first, second = ([pair[k] for pair in pairs] for k in (0, 1))
    return first[0].join(first[1:]), second[0].join(second[1:])
