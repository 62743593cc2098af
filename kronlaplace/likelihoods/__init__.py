"""Likelihoods: the meaning of the network's outputs, and the metric on them that the Fisher pulls back.

A likelihood is a small frozen object. It answers five questions, each about a batch of network outputs ``f`` as the
network returns them, of shape ``(N,)``, ``(N, C)`` or ``(N, ...)``:

* Do the targets fit the outputs (`check_targets`)?
* How well do the outputs explain the targets (`statistics`, additive over batches, and `log_likelihood`)?
* Which gradients are propagated back (`directions`)? These are vectors ``d_v`` of the outputs' shape with
  ``Σ_v d_v d_vᵀ = M(f)``, the Fisher information of one example's (flattened) output.
* What is predicted when the outputs themselves are Gaussian (`predictive`)?
* How well do such predictions explain the targets (`predictive_nll`, additive over batches)?

| likelihood | outputs ``f`` | metric ``M(f)`` of one example | exact directions |
| --- | --- | --- | --- |
| `Categorical` | logits ``(N, C)``, ``(N, C, ...)`` or ``(N, ..., C)`` | ``diag(π) − ππᵀ`` by position | ``C − 1`` each |
| `Bernoulli` | logits ``(N, ...)`` | ``diag(π (1 − π))`` | one per output |
| `Gaussian` | means ``(N, ...)`` | ``I / σ²`` | one per output |
| `Euclidean` | ``(N, ...)`` | ``I`` | one per output |
| `HeteroscedasticGaussian` | means, log-variances ``s``: ``(N, 2C)`` | ``diag(e⁻ˢ, ½)`` | one per output |

Directions always belong to **one example's** negative log-likelihood, summed over its positions, never to a reduced batch
loss, so a ``reduction=`` in the user's own loss cannot change a Fisher. Only `log_likelihood` and `predictive` wait for
an accelerator.
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
    """Turn a shorthand into its likelihood and pass a likelihood through; raises as `kronlaplace._arguments.resolve`."""
    return resolve(likelihood, Likelihood, _SHORTHANDS, "likelihood")  # type: ignore[type-abstract]


def __dir__() -> list[str]:
    return sorted(__all__)
