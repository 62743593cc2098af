"""The state of a posterior at one moment.

A state is never changed, only replaced as a whole by the next one, and whatever follows from it is kept with it. So every
method of a posterior reads one state and answers from that, whatever other threads do meanwhile, and an interrupt leaves the
state before or the one after, nothing in between.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from kronlaplace._arguments import warn
from kronlaplace.damping import DampedInverse
from kronlaplace.data.kept_examples import KeptExamples
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.laplace.evidence import Evidence, noise_rescaling
from kronlaplace.laplace.hyperparameters import Hyperparameters
from kronlaplace.laplace.linearized import ShapeCache
from kronlaplace.laplace.output_kernel import OutputKernel
from kronlaplace.layers import Layer
from kronlaplace.likelihoods import Likelihood
from kronlaplace.network.fingerprint import WeightsGuard
from kronlaplace.priors.given import GivenPrior
from kronlaplace.priors.prior import Prior

__all__ = ["Fit", "FittedWeights", "State"]


class FittedWeights(Mapping[str, Tensor]):
    """The weights of a fit, each block's matrix ``(q, p)`` in the layout of ``W̄``, made at every access.

    They are those of the network, which a `WeightsGuard` watches; a copy would take as much memory as the network.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = {layer.name: layer for layer in layers}
        parameter = next(iter(layers[0].parameters.values()))
        self.dtype = parameter.dtype
        """The dtype of the network's first weights at the fit."""
        self.device = parameter.device
        """Their device."""

    def __getitem__(self, name: str) -> Tensor:
        return self._layers[name].matrix()

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass(frozen=True, eq=False)
class Fit:
    """The results of a fit to data.

    Attributes:
        fisher: The Fisher.
        mean: The weights that it was estimated at.
        guard: Notices when the network's weights change.
        kernel: The kernel of the training outputs, for a small regression table.
        examples: A sample of the training examples, for a classifier that was fitted to data.
        known: What passes over the network have found out, by what was asked of them.
        unclear: Layers that the user has been warned of by `State.warn_of_rounding`.
    """

    fisher: KroneckerFisher
    mean: FittedWeights
    guard: WeightsGuard
    kernel: OutputKernel | None = None
    examples: KeptExamples = field(default_factory=KeptExamples)
    known: dict[Hashable, ShapeCache] = field(default_factory=dict)
    unclear: set[str] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where the fit is."""
        return self.mean.device

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
        layers: The layers that have a posterior; none before a fit has found the last layer.
        likelihood: The likelihood, with the noise that predictions use.
        given: The prior, tied to the layers if they are known.
        temperature: ``τ``.
        fit: What came of the data, None before.
        logit_scale: ``a``, multiplies the mean of a classifier's logits.
    """

    layers: Sequence[Layer]
    likelihood: Likelihood
    given: Prior | GivenPrior
    temperature: float
    fit: Fit | None = None
    logit_scale: float = 1.0

    @property
    def fitted(self) -> Fit:
        """The fit.

        Raises:
            RuntimeError: If there is none.
        """
        if self.fit is None:
            raise RuntimeError("the posterior is not fitted yet: call fit(loader) first.")
        return self.fit

    @property
    def prior(self) -> Prior:
        """The prior over the layers.

        Raises:
            RuntimeError: If the layers are not known yet.
        """
        if not isinstance(self.given, Prior):
            raise RuntimeError(
                'layers="last" is found by the fit; before that it is not known. Call fit(loader) first.'
            )
        return self.given

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Prior, noise, temperature and scale of the logits.

        Raises:
            RuntimeError: If the layers are not known yet.
        """
        return Hyperparameters(self.prior, self.likelihood.noise_std, self.temperature, self.logit_scale)

    def with_hyperparameters(self, new: Hyperparameters) -> State:
        """Return the state with other hyperparameters and the same fit.

        Raises:
            ValueError: If a noise is given and the likelihood has none.
        """
        noise = new.noise_std
        likelihood = self.likelihood if noise is None else self.likelihood.with_noise_std(noise)
        return replace(
            self,
            given=new.prior,
            likelihood=likelihood,
            temperature=new.temperature,
            logit_scale=new.logit_scale,
        )

    def over(self, layers: Sequence[Layer]) -> State:
        """Return the state over other layers: some of its own, its own after the network moved, or the last one."""
        return replace(self, layers=layers, given=self.given.over(layers))

    def only(self, names: Sequence[str]) -> State:
        """Return the state without the layers that are not among ``names``.

        Raises:
            ValueError: If none is left.
        """
        kept = [layer for layer in self.layers if layer.name in names]
        if not kept:
            raise ValueError(
                f"none of the posterior's layers {[layer.name for layer in self.layers]} is left: what this fit could use "
                f"are {list(names)}. Layers that an earlier fit has left out stay left out; make a new KronLaplace."
            )
        return self if len(kept) == len(self.layers) else self.over(kept)

    @property
    def scale(self) -> Tensor | float:
        """The factor that multiplies the Fisher."""
        fisher = self.fitted.fisher
        return fisher.n_examples / self.temperature * noise_rescaling(fisher, self.likelihood.noise_std)

    @cached_property
    def inverses(self) -> dict[str, DampedInverse]:
        """The posterior covariance by layer, ``(N · F / τ + D)⁻¹``.

        Warns:
            UserWarning: If the prior makes the precision of a large layer inexact.
        """
        fisher, prior, scale = self.fitted.fisher, self.prior, self.scale
        fisher.decompose()
        inexact = [
            f"{name!r} ({math.prod(block.shape):,} weights)"
            for name, block in fisher.items()
            if prior.inexact(name, block)
        ]
        if inexact:
            warn(prior.inexactness.format(layers=", ".join(inexact)))
        self.warn_of_rounding(prior, scale)
        return {name: prior.damped(name, block, scale) for name, block in fisher.items()}

    def warn_of_rounding(self, prior: Prior, scale: Tensor | float) -> None:
        """Warn, once for each layer, where float32 does not resolve curvature that is more than the prior's precision.

        Args:
            prior: The prior.
            scale: What the Fisher is multiplied with.
        """
        fit = self.fitted
        if fit.unresolved is None:
            return
        least = torch.stack([prior.least(name).detach().cpu() for name in fit.fisher])
        exceeds = (fit.unresolved * torch.as_tensor(scale).detach().cpu() > least).tolist()
        names = [name for name, flag in zip(fit.fisher, exceeds, strict=True) if flag and name not in fit.unclear]
        if names:
            fit.unclear.update(names)
            shown = ", ".join(repr(name) if name else "the model itself" for name in names)
            warn(
                f"small eigenvalues of {shown}, though larger than the prior precision, are lost in "
                "the rounding of float32 relative to the largest, and their mean is used for each: evidence and variances "
                "are approximate. Standardize the inputs, use a larger prior precision, or fit in double precision: "
                "model.double(), with inputs in float64."
            )

    @cached_property
    def evidence(self) -> Evidence:
        """The Laplace evidence as a function of multiples of the prior's unit."""
        return self.evidence_of(self.prior)

    def evidence_of(self, prior: Prior) -> Evidence:
        """Return the evidence as a function of multiples of another prior's unit."""
        fit = self.fitted
        with torch.inference_mode(False), torch.no_grad():
            return Evidence(fit.fisher, fit.mean, prior)
