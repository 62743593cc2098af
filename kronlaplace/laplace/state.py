"""What a posterior is at one moment.

A state is never changed, only replaced as a whole by the next one, and whatever follows from it is kept with it. So every
method of a posterior reads one state and answers from that, whatever other threads do meanwhile, and an interrupt leaves the
state before or the one after, nothing in between.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kronlaplace.damping import Tikhonov
from kronlaplace.fingerprint import WeightsGuard
from kronlaplace.inversion import LARGEST_DENSE, DampedInverse, PlusDiagonal
from kronlaplace.kronecker import KroneckerFisher
from kronlaplace.laplace.evidence import Evidence, noise_rescaling
from kronlaplace.laplace.functional import Known
from kronlaplace.laplace.prior import precision_by_layer
from kronlaplace.layers import Layer
from kronlaplace.likelihoods import Gaussian, Likelihood
from kronlaplace.options import warn

__all__ = ["Fit", "State"]


@dataclass(frozen=True, eq=False)
class Fit:
    """What a posterior has from its data.

    Attributes:
        fisher: The Fisher.
        mean: The weights that it was estimated at, each block's matrix ``(q, p)``.
        guard: Notices when the network's weights change.
        known: What passes over the network have found out, by what was asked of them.
    """

    fisher: KroneckerFisher
    mean: Mapping[str, Tensor]
    guard: WeightsGuard
    known: dict[Hashable, Known] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class State:
    """The layers of a posterior, its hyperparameters, and its fit.

    Attributes:
        layers: The layers that have a posterior.
        likelihood: The likelihood.
        prior_precision: ``δ``, 0-dim, ``(L,)`` or ``(P,)``, float64.
        prior_mean: Mean of the prior, each block's matrix ``(q, p)``.
        temperature: ``τ``.
        fit: What came of the data, None before.
    """

    layers: Sequence[Layer]
    likelihood: Likelihood
    prior_precision: Tensor
    prior_mean: Mapping[str, Tensor]
    temperature: float
    fit: Fit | None = None

    @property
    def fitted(self) -> Fit:
        """The fit.

        Raises:
            RuntimeError: If there is none.
        """
        if self.fit is None:
            raise RuntimeError("the posterior is not fitted yet: call fit(loader) first.")
        return self.fit

    @cached_property
    def inverses(self) -> dict[str, DampedInverse]:
        """The posterior covariance by layer, ``(N · F / τ + D)⁻¹``.

        Warns:
            UserWarning: If weights of a large layer have precisions of their own, which is not exact there.
        """
        fisher = self.fitted.fisher
        fisher.decompose()
        noise = self.likelihood.noise_std if isinstance(self.likelihood, Gaussian) else None
        scale = fisher.n_examples / self.temperature * noise_rescaling(fisher, noise)
        precisions = precision_by_layer(self.prior_precision, [block.shape for block in fisher.values()])
        inexact = [
            f"{name!r} ({precision.numel():,} weights)"
            for (name, block), precision in zip(fisher.items(), precisions, strict=True)
            if precision.ndim and not PlusDiagonal(block).exact
        ]
        if inexact:
            warn(
                f"precisions of single weights are added to the curvature of {', '.join(inexact)} in its Kronecker "
                f"eigenbasis, which is exact up to {LARGEST_DENSE:,} weights only. Exact for all are one precision per "
                "layer, or the estimator kl.Diagonal()."
            )
        return {
            name: Tikhonov(precision).invert(block.scaled(scale))
            for (name, block), precision in zip(fisher.items(), precisions, strict=True)
        }

    @cached_property
    def evidence(self) -> Evidence:
        """The Laplace evidence as a function of the hyperparameters."""
        fit = self.fitted
        with torch.inference_mode(False), torch.no_grad():
            return Evidence(fit.fisher, [fit.mean[name] - self.prior_mean[name] for name in fit.fisher])
