"""The scale of a classifier's logits, from the training data.

The posterior predictive averages over the weights, which makes every prediction less certain, the network's own training
labels included: a network that fits them with probability 0.999 predicts them with 0.6 after the average. In the sense of
Kullback and Leibler the Gaussian nearest to the posterior has another mean, which makes up for that. Here its mean is moved
along the one direction that is known without another pass and that changes no decision, the last layer's own weights: the
logits become ``a f(x)``, with the posterior's covariance around them.

Two scales are found from the marginals ``f_n ~ N(f(x_n), C_n)`` at a sample of training examples.

* ``a_fit``: the predictive is nearest to the network's own probabilities, in cross-entropy. It undoes the average where
  there are training data, so that uncertainty is added only where variances are larger.
* ``a_out``: the labels are most likely when each example is left out. Leaving out one example moves its own logits to
  ``f_n + C (π_n − y_n)`` (the stationary point of the other examples' posterior, whose covariance is ``C``). A Kronecker
  product knows an example only through means over all, so its ``C_n`` is that of the other examples, up to the factor
  ``1 / (1 − h)`` with the mean leverage ``h = 1/N Σ_n tr(Λ_n C_n)``, the effective parameters per example, as in
  generalized cross-validation (Golub, Heath and Wahba 1979).

The first cannot know that a network has memorized its labels; the second is too pessimistic where few parameters are
effective. The leverage decides between them: ``log a = (1 − h) log a_fit + h log a_out``. Neither is less than 1, where the
average over the weights has its full effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from kronlaplace.data.deferred_checks import Batch
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.inputs import Inputs
from kronlaplace.data.kept_examples import KeptExamples
from kronlaplace.data.loader import Rewind, iterate
from kronlaplace.fisher.curvature_pass import Watch
from kronlaplace.laplace.features import FactoredCovariance
from kronlaplace.laplace.output_covariance import OutputCovariance
from kronlaplace.laplace.predictive import classes_last
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.likelihoods import Bernoulli, Categorical, Likelihood
from kronlaplace.likelihoods.links import Link, margin_variances
from kronlaplace.network.alignment import Alignment
from kronlaplace.network.example_axes import Layout

__all__ = ["calibrated_logit_scale", "has_logit_scale", "keeping", "training_examples"]

_LARGEST_SCALE = 1e3

_LARGEST_LEVERAGE = 0.95
"""Effective parameters per example from which the covariance without an example is not larger still."""

_BUDGET = 2**25
"""Entries of covariances to have at a time."""

_LARGEST = 2**28
"""Entries of the covariances of one example: 2 GiB in float64."""

_WORK = 2**17
"""Outputs of all examples together whose covariances are computed: a backward pass for each, of one example."""

_MANY = 1024
"""Classes from which the covariances are not formed, where the features before the last layer allow it."""

_PRODUCTS = 2**38
"""Multiplications for the variances of all outputs of all examples, where covariances are not formed."""

_OUTPUTS = 2**19
"""Outputs of all examples, where covariances are not formed: about ten numbers are kept for each."""

_AT_A_TIME = 2**18
"""Outputs of the examples that are processed at a time, where covariances are not formed."""


def has_logit_scale(likelihood: Likelihood) -> bool:
    """Return whether the outputs are logits, whose scale can be calibrated."""
    return isinstance(likelihood, (Categorical, Bernoulli))


def keeping(examples: KeptExamples) -> Watch:
    """Return a function that adds each batch of a pass to a sample of examples."""

    def watch(batch: Batch, layout: Layout) -> None:
        if batch.targets is not None:
            examples.add(batch.inputs, batch.targets, layout.input_axis, layout.shared_inputs)

    return watch


def training_examples(model: nn.Module, data: Iterable[Any], likelihood: Likelihood, layout: Layout) -> KeptExamples:
    """Return a sample of the examples of a data set, in one pass over the data and none over the network.

    Raises:
        TypeError: If the batches have no targets.
    """
    examples = KeptExamples()
    device = device_of(model)
    with preserved_random_state(device), Rewind(data):
        for batch in iterate(
            data, device, alignment=Alignment(model, likelihood), progress=False, description="Calibration"
        ):
            if batch.targets is None:
                raise TypeError(
                    "the scale of the logits needs batches of (inputs, targets); some come without targets."
                )
            keeping(examples)(batch, layout)
    return examples


@dataclass(frozen=True)
class _Marginals:
    """Gaussian logits, one row for each position of each example.

    Attributes:
        mean: ``f``, shape ``(n, C)``; ``C`` is 1 for yes/no outputs.
        covariance: ``C``, each ``(C, C)``.
        labels: Probabilities of the classes, ``(n, C)``, mostly zeros and ones.
        weights: The factors of the examples' negative log-likelihoods, ``(n,)``.
    """

    mean: Tensor
    covariance: _Covariance
    labels: Tensor
    weights: Tensor

    @property
    def probabilities(self) -> Tensor:
        """The network's own, ``π``, ``(n, C)``."""
        return self.mean.sigmoid() if self.mean.shape[1] == 1 else self.mean.softmax(1)

    @property
    def leverages(self) -> Tensor:
        """``tr(Λ C)`` with the Fisher information of the logits ``Λ = w (diag(π) − ππᵀ)``, shape ``(n,)``."""
        pi = self.probabilities
        return self.weights * ((pi * self.covariance.diagonal).sum(1) - (pi * self.covariance.times(pi)).sum(1))

    def without_their_labels(self, factor: float) -> _Marginals:
        """Return the marginals of the other examples' posterior, whose covariance is ``factor`` times as large."""
        covariance = self.covariance.scaled(factor)
        shift = covariance.times(self.probabilities - self.labels)
        return _Marginals(self.mean + self.weights.unsqueeze(1) * shift, covariance, self.labels, self.weights)


class _Covariance:
    """Covariances of the logits of ``n`` positions, formed or in factors, times a number.

    Args:
        formed: Shape ``(n, C, C)``; or the `FactoredCovariance`.
        factor: The number.
    """

    def __init__(self, formed: Tensor | FactoredCovariance, factor: float = 1.0) -> None:
        self._formed = formed
        self._factor = factor

    @property
    def diagonal(self) -> Tensor:
        """The variances, ``(n, C)``, float64."""
        formed = self._formed
        variances = formed.diagonal(dim1=1, dim2=2) if isinstance(formed, Tensor) else formed.diagonal
        return self._factor * variances.double()

    def times(self, vectors: Tensor) -> Tensor:
        """Multiply each with a vector, ``(n, C)``."""
        formed = self._formed
        if isinstance(formed, Tensor):
            return self._factor * torch.einsum("ncd,nd->nc", formed, vectors)
        return self._factor * formed.times(vectors)

    def scaled(self, factor: float) -> _Covariance:
        """Return them times another number."""
        return _Covariance(self._formed, self._factor * factor)

    def margin_variances(self, mean: Tensor) -> Tensor:
        """Return the variances of the margins to the most probable class, ``(n, C)``."""
        if isinstance(self._formed, Tensor):
            return self._factor * margin_variances(mean, self._formed)
        top = mean.argmax(1, keepdim=True)
        with_top = self.times(torch.zeros_like(mean).scatter_(1, top, 1.0))
        variance = self.diagonal
        return (variance + variance.gather(1, top) - 2 * with_top).clamp_min(0).scatter(1, top, 0.0)


def calibrated_logit_scale(predictor: Predictor, examples: KeptExamples, layout: Layout) -> float:
    """Return the scale of the logits; see the module's docstring.

    With many outputs per example fewer examples are used, so that the work stays bounded.

    Args:
        predictor: Predicts with the posterior, at a scale of 1.
        examples: Training examples, on the network's device.
        layout: Where the examples are in the inputs.

    Returns:
        ``a``, at least 1; 1 if there is no target that counts.

    Raises:
        OverflowError: If a single example has too many outputs.
    """
    costs = [_cost(predictor, inputs, layout) for inputs, _ in examples.batches()]
    most = min((cost.examples for cost in costs), default=1)
    if not most:
        outputs = max(cost.outputs for cost in costs)
        raise OverflowError(
            f"one example has {outputs:,} outputs, whose covariances take too much memory, or a backward pass each"
        )
    batches = [
        (inputs, targets, _cost(predictor, inputs, layout)) for inputs, targets in examples.at_most(most).batches()
    ]
    kept = (
        sum(len(targets) * cost.size for _, targets, cost in batches) <= _BUDGET
    )  # else the covariances are computed twice
    parts = list(_marginals(predictor, batches, layout)) if kept else None

    def again() -> Iterable[_Marginals]:
        return _marginals(predictor, batches, layout) if parts is None else parts

    leverages = torch.cat([part.leverages for part in again()]) if batches else torch.zeros(0)
    if not len(leverages):
        return 1.0
    leverage = float(leverages.mean())
    fit, out = _CrossEntropy(predictor.likelihood), _CrossEntropy(predictor.likelihood)
    for part in again():
        fit.add(part, part.probabilities)
        out.add(part.without_their_labels(1 / (1 - min(leverage, _LARGEST_LEVERAGE))), part.labels)
    share = min(leverage, 1.0)
    return math.exp((1 - share) * fit.log_of_best_scale() + share * out.log_of_best_scale())


class _CrossEntropy:
    """The cross-entropy of the predictive with given labels, as a function of the logits' scale."""

    def __init__(self, likelihood: Likelihood) -> None:
        self._likelihood = likelihood
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, marginals: _Marginals, labels: Tensor) -> None:
        """Take labels ``(n, C)`` and the marginals that are to predict them, of which only variances are kept."""
        mean, covariance = marginals.mean, marginals.covariance
        margins = self._likelihood.links[0] is Link.MARGIN
        variances = covariance.margin_variances(mean) if margins else covariance.diagonal
        self._parts.append((mean, variances, labels, marginals.weights))

    def log_of_best_scale(self) -> float:
        """Return the logarithm of the scale of at least 1 where it is least."""
        bounds = (0.0, math.log(_LARGEST_SCALE))
        return float(minimize_scalar(self._at, bounds=bounds, method="bounded", options={"xatol": 1e-5}).x)

    def _at(self, log_scale: float) -> float:
        link = self._likelihood.links[0]
        total = 0.0
        for mean, variances, labels, weights in self._parts:
            p = self._likelihood.predictive(math.exp(log_scale) * mean, variances, link, 0, None)
            assert isinstance(p, Tensor)
            tiny = torch.finfo(p.dtype).tiny
            terms = labels * p.clamp_min(tiny).log()
            if p.shape[1] == 1:
                terms = terms + (1 - labels) * (1 - p).clamp_min(tiny).log()
            total -= float((weights.unsqueeze(1) * terms).sum())
        return total


@dataclass(frozen=True)
class _Cost:
    """What the covariances of an example cost.

    Attributes:
        outputs: The number of its outputs.
        size: The number of numbers that are kept.
        examples: How many examples are not too many; 0 if one is.
        factored: Whether covariances are not formed.
    """

    outputs: int
    size: int
    examples: int
    factored: bool = False


def _cost(predictor: Predictor, inputs: Inputs, layout: Layout) -> _Cost:
    """Return what the covariances of examples such as the first one cost."""
    one = inputs.examples(layout.input_axis, 0, 1, layout.shared_inputs).value
    outputs = predictor.outputs(one)
    axis = predictor.likelihood.class_axis_of(outputs)
    classes = 1 if axis is None else outputs.shape[axis]
    numel = outputs.numel()
    if classes > _MANY and (features := predictor.n_features(one)) is not None:
        positions = numel // classes
        products = numel * features**2
        examples = min(_WORK // (positions * features), max(1, min(_PRODUCTS // products, _OUTPUTS // numel)))
        return _Cost(numel, numel * (_BUDGET // _AT_A_TIME), examples, factored=True)
    return _Cost(numel, numel * classes, _WORK // numel if numel * classes <= _LARGEST else 0)


def _marginals(
    predictor: Predictor, batches: Iterable[tuple[Inputs, Tensor, _Cost]], layout: Layout
) -> Iterator[_Marginals]:
    """Yield the marginals at all positions whose targets count, some examples at a time.

    Args:
        predictor: Predicts with the posterior.
        batches: Inputs, targets, and what an example costs.
        layout: Where the examples are in the inputs.
    """
    for inputs, targets, cost in batches:
        step = max(1, _BUDGET // cost.size)
        for start in range(0, len(targets), step):
            part = inputs.examples(layout.input_axis, start, start + step, layout.shared_inputs)
            yield _of_examples(predictor, part.value, targets[start : start + step], cost.factored)


def _of_examples(predictor: Predictor, x: Any, y: Tensor, factored: bool) -> _Marginals:
    likelihood = predictor.likelihood
    if isinstance(likelihood, Bernoulli):
        f, variances = predictor.outputs_and_covariance(x, OutputCovariance.VARIANCES)
        mean, labels = f.reshape(-1, 1).double(), y.reshape(-1, 1).double()
        return _Marginals(mean, _Covariance(variances.reshape(-1, 1, 1).double()), labels, torch.ones_like(mean[:, 0]))
    assert isinstance(likelihood, Categorical)
    counts = y.flatten().long() != likelihood.ignored_target
    covariance: _Covariance
    if factored:
        found = predictor.outputs_and_factored_covariance(x)
        assert found is not None
        mean, covariance = found[0], _Covariance(found[1].rows(counts))
    else:
        f, formed = predictor.outputs_and_covariance(x, OutputCovariance.BY_POSITION)
        mean, formed = classes_last(f, formed, likelihood.class_axis_of(f))
        c = mean.shape[-1]
        covariance = _Covariance(formed.reshape(-1, c, c)[counts].double())
    c = mean.shape[-1]
    labels = likelihood.weighted_labels(y.flatten()[counts], c)
    weights = labels.sum(1)
    return _Marginals(mean.reshape(-1, c)[counts].double(), covariance, labels / weights.unsqueeze(1), weights)
