"""Likelihoods: what the network's output means, and the metric on it that the Fisher pulls back.

A likelihood is a small frozen object. It answers five questions, each about a batch of network outputs ``f`` as the
network gives them, of shape ``(N,)``, ``(N, C)`` or ``(N, ...)``:

* do the targets fit the outputs (`check_targets`);
* how well do the outputs explain them (`statistics`, additive over batches, and `log_likelihood`);
* which gradients are propagated back (`directions`): vectors ``d_v`` of the outputs' shape with
  ``Σ_v d_v d_vᵀ = M(f)``, the Fisher information of one example's (flattened) output;
* what is predicted when the outputs themselves are Gaussian (`predictive`);
* how well do such predictions explain the targets (`predictive_nll`, additive over batches).

| likelihood | outputs ``f`` | metric ``M(f)`` of one example | exact directions |
| --- | --- | --- | --- |
| `Categorical` | logits ``(N, C)``, ``(N, C, ...)`` or ``(N, ..., C)`` | ``diag(π) − ππᵀ`` by position | ``C − 1`` each |
| `Bernoulli` | logits ``(N, ...)`` | ``diag(π (1 − π))`` | one per output |
| `Gaussian` | means ``(N, ...)`` | ``I / σ²`` | one per output |
| `Euclidean` | ``(N, ...)`` | ``I`` | one per output |
| `HeteroscedasticGaussian` | means, log-variances ``s``: ``(N, 2C)`` | ``diag(e⁻ˢ, ½)`` | one per output |

Directions are always of **one example's** negative log-likelihood, summed over its positions, never of a reduced batch
loss, so no ``reduction=`` in the user's own loss can change a Fisher. No method but `log_likelihood` and `predictive`
waits for an accelerator.
"""

from __future__ import annotations

from kronlaplace._arguments import resolve
from kronlaplace.likelihoods.base import Likelihood, Sampling, register_likelihood
from kronlaplace.likelihoods.bernoulli import Bernoulli
from kronlaplace.likelihoods.categorical import Categorical
from kronlaplace.likelihoods.euclidean import Euclidean
from kronlaplace.likelihoods.gaussian import Gaussian
from kronlaplace.likelihoods.heteroscedastic import HeteroscedasticGaussian
from kronlaplace.likelihoods.prediction import Prediction

__all__ = [
    "Bernoulli",
    "Categorical",
    "Euclidean",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "Prediction",
    "Sampling",
    "register_likelihood",
    "resolve_likelihood",
]

for _likelihood in (Categorical, Bernoulli, Gaussian, Euclidean, HeteroscedasticGaussian):
    register_likelihood(_likelihood)

_SHORTHANDS = {
    "classification": Categorical,
    "binary": Bernoulli,
    "regression": Gaussian,
    "euclidean": Euclidean,
    "heteroscedastic": HeteroscedasticGaussian,
}


def resolve_likelihood(likelihood: Likelihood | str) -> Likelihood:
    """Turn a shorthand into its likelihood; a likelihood passes through. Raises as `kronlaplace._arguments.resolve`."""
    return resolve(likelihood, Likelihood, _SHORTHANDS, "likelihood")  # type: ignore[type-abstract]


def __dir__() -> list[str]:
    return sorted(__all__)
