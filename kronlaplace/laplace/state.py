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
        unclear: Layers that the user has been warned of by `State.warn_of_rounding`.
    """

    fisher: KroneckerFisher
    mean: Mapping[str, Tensor]
    guard: WeightsGuard
    known: dict[Hashable, Known] = field(default_factory=dict)
    unclear: set[str] = field(default_factory=set)

    @cached_property
    def unresolved(self) -> Tensor | None:
        """Curvature of each layer that float32 does not resolve, ``(L,)`` on the CPU; None in float64."""
        blocks = list(self.fisher.values())
        if all(block.dtype == torch.float64 for block in blocks):
            return None
        with torch.inference_mode(False), torch.no_grad():
            return torch.stack([block.unresolved().cpu() for block in blocks])


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
        self.warn_of_rounding(precisions, scale)
        return {
            name: Tikhonov(precision).invert(block.scaled(scale))
            for (name, block), precision in zip(fisher.items(), precisions, strict=True)
        }

    def warn_of_rounding(self, precisions: Sequence[Tensor], scale: Tensor | float) -> None:
        """Warn, once for each layer, where float32 does not resolve curvature that is more than the prior's precision.

        Args:
            precisions: The prior's, layer by layer.
            scale: What the Fisher is multiplied with.
        """
        fit = self.fitted
        if fit.unresolved is None:
            return
        least = torch.stack([precision.detach().cpu().amin() for precision in precisions])
        exceeds = (fit.unresolved * torch.as_tensor(scale).detach().cpu() > least).tolist()
        names = [name for name, flag in zip(fit.fisher, exceeds, strict=True) if flag and name not in fit.unclear]
        if names:
            fit.unclear.update(names)
            shown = ", ".join(repr(name) if name else "the model itself" for name in names)
            warn(
                f"small eigenvalues of {shown}, though larger than the prior precision, are lost in "
                "the rounding of float32 beside the largest, and their mean is used for each: evidence and variances are "
                "approximate. Standardize the inputs, use a larger prior precision, or fit in double precision: "
                "model.double(), with inputs in float64."
            )

    @cached_property
    def evidence(self) -> Evidence:
        """The Laplace evidence as a function of the hyperparameters."""
        fit = self.fitted
        with torch.inference_mode(False), torch.no_grad():
            deviations = [fit.mean[name].double() - self.prior_mean[name].double() for name in fit.fisher]
            return Evidence(fit.fisher, deviations)
