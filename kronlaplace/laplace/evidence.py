"""The Laplace evidence (log marginal likelihood) as a function of its hyperparameters.

With the Fisher ``F`` (a mean over ``N`` examples), prior ``N(m, D⁻¹)`` and posterior mode ``θ``,

    log p(D) ≈ log p(D | θ) / τ − ½ (θ − m)ᵀ D (θ − m) − ½ log det(N r F / τ + D) + ½ log det D

(MacKay 1992; Immer et al. 2021, Eq. 4), where ``τ`` is the temperature and ``r`` rescales a Fisher that was estimated
with another observation noise. With one precision per block all is a sum over eigenvalues ``λ`` that are computed once,
``log det(c F + δ I) − P log δ = Σ log(1 + c λ / δ)``.

In the logarithms of precisions and noise it is concave: ``log det`` of a sum of positive semidefinite matrices with weights
``eᵘ`` is convex in ``u``. So there is one maximum, or none inside the bounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import repeat

import torch
from torch import Tensor

from kronlaplace.damping.plus_diagonal import PlusDiagonal
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.likelihoods import Likelihood
from kronlaplace.priors.precision import multiples_by_layer
from kronlaplace.priors.prior import Prior

__all__ = ["Evidence", "check_has_evidence", "noise_exponent", "noise_rescaling"]

_CHUNK = 2**18
"""Eigenvalues that are converted to float64 at a time."""


class Evidence:
    """The evidence of a fitted network, as a function of multiples ``μ`` of a prior's unit precision ``B``, ``D = μ B``.

    With the identity as the unit the multiples are precisions. The eigenvalues ``λ`` are those of ``B^{-1/2} F B^{-1/2}``.

    Args:
        fisher: Its Fisher.
        weights: ``θ``, each block's matrix ``(q, p)``.
        prior: Has the unit and the mean ``m``; its own multiples do not matter.

    Raises:
        NotImplementedError: If the likelihood has no normalizer.
        ValueError: If the Fisher saw no targets.
    """

    def __init__(self, fisher: KroneckerFisher, weights: Mapping[str, Tensor], prior: Prior) -> None:
        check_has_evidence(fisher.metadata.likelihood)
        if fisher.statistics is None:
            raise ValueError(
                "the evidence needs targets: fit with batches of (inputs, targets). The posterior of a memory of several "
                "tasks has no evidence, because the likelihood of the earlier data at its weights is not known; tune it by "
                'tune(method="validation", data=...).'
            )
        fisher.decompose()
        self.likelihood = fisher.metadata.likelihood
        self.statistics = fisher.statistics
        self.blocks = list(fisher.values())
        self._prior = prior
        self._weights = {name: weights[name] for name in fisher}
        self._plus_diagonal = [PlusDiagonal(block) for block in self.blocks]
        self._fisher = fisher
        by_block = (prior.unit_eigenvalues(name, block) for name, block in fisher.items())
        self._eigenvalues = [_Spectrum.of(values, counts) for values, counts in by_block]
        self._all_eigenvalues = _Spectrum.joined(self._eigenvalues)
        self._sums = torch.stack([prior.unit_penalty(w, name) for name, w in self._weights.items()])

    def with_eigenvalues(self, eigenvalues: Tensor) -> Evidence:
        """Return the evidence of another Fisher at the same weights, for one precision in all.

        Args:
            eigenvalues: Those of the other Fisher of all layers together, float64; zeros may be missing.
        """
        other = copy.copy(self)
        other._all_eigenvalues = _Spectrum.of(eigenvalues.to(self.statistics.device), None)
        return other

    def effective_parameters(self, precision: Tensor, scale: Tensor) -> float:
        """``γ = Σ t / (1 + t)`` with ``t = c λ / δ`` (MacKay 1992), for one precision in all.

        Args:
            precision: ``δ``, 0-dim.
            scale: ``c``, as `scale` gives it.
        """
        (total,) = self._all_eigenvalues.sums(lambda values: (_share(values * (scale / precision)),))
        return float(total)

    def belongs_to(self, prior: Prior) -> bool:
        """Tell whether a prior differs from that of this evidence only in its multiples."""
        return prior.same_unit(self._prior)

    @property
    def unit_is_identity(self) -> bool:
        """Whether the multiples are precisions."""
        return self._prior.unit_is_identity

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """``(q, p)`` of every block."""
        return [block.shape for block in self.blocks]

    @property
    def n_weights(self) -> int:
        """``P``."""
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def _squares(self) -> list[Tensor]:
        """``(θ − m)²`` of every weight, by block; only for one precision per weight."""
        return [self._prior.deviation(name, w).square() for name, w in self._weights.items()]

    @property
    def squared_norm(self) -> float:
        """``(θ − m)ᵀ B (θ − m)`` of all blocks."""
        return float(self._sums.sum())

    def __call__(
        self, precision: Tensor, noise_std: Tensor | float | None = None, temperature: Tensor | float = 1.0
    ) -> Tensor:
        """Return the evidence in nats, 0-dim, float64, differentiable in its arguments.

        Args:
            precision: ``μ``, 0-dim, one per block, ``(L,)``, or one per weight, ``(P,)`` (if the unit is the identity),
                float64.
            noise_std: ``σ`` (only where the likelihood has a noise); None is the likelihood's own.
            temperature: ``τ``.
        """
        return self._log_likelihood(noise_std) / temperature - 0.5 * self.occam(
            precision, self.scale(noise_std, temperature)
        )

    def scale(self, noise_std: Tensor | float | None, temperature: Tensor | float) -> Tensor:
        """``c = N r / τ``, 0-dim, float64: what the Fisher is multiplied with."""
        scale = self._fisher.n_examples * noise_rescaling(self._fisher, noise_std) / temperature
        return torch.as_tensor(scale, dtype=torch.float64, device=self.statistics.device)

    def occam(self, precision: Tensor, scale: Tensor) -> Tensor:
        """``(θ − m)ᵀ D (θ − m) + log det(c F + D) − log det D`` for ``D = μ B`` and ``c`` as `scale` gives it."""
        if precision.ndim == 0:
            return precision * self._sums.sum() + self._all_eigenvalues.log_det_ratio(scale / precision)
        return torch.stack(
            [self.block_term(i, p, scale) for i, p in enumerate(multiples_by_layer(precision, self.shapes))]
        ).sum()

    @torch.no_grad()
    def derivatives(self, logs: Tensor, temperature: float) -> tuple[float, Tensor, Tensor]:
        """Return the evidence and its first two derivatives in closed form, for one precision in all or one per block.

        With ``t = c λ / δ`` and the effective number of parameters ``γ = Σ t / (1 + t)`` (MacKay 1992):
        ``∂/∂u = −½ (δ ‖θ − m‖² − γ)``, ``∂²/∂u² = −½ (δ ‖θ − m‖² + B)`` with ``B = Σ t / (1 + t)²``. The noise enters by
        ``c ∝ σᵏ``.

        Args:
            logs: ``u = log δ``, one or ``L`` numbers, and then ``log σ`` if the likelihood has a noise; on the CPU.
            temperature: ``τ``.

        Returns:
            The evidence, its gradient ``(n,)`` and its Hessian ``(n, n)``, on the CPU.
        """
        noisy = self.likelihood.noise_std is not None
        u = logs[:-1] if noisy else logs
        noise = math.exp(float(logs[-1])) if noisy else None
        shared = len(u) == 1
        groups = [self._all_eigenvalues] if shared else self._eigenvalues
        scale = float(self.scale(noise, temperature))
        sums = []
        for eigenvalues, log in zip(groups, u.tolist(), strict=True):
            log_det, gamma, squares = eigenvalues.sums(partial(_terms, ratio=scale / math.exp(log)))
            sums.append(torch.stack([log_det, gamma, gamma - squares]))
        log_det, gamma, bend = torch.stack(sums, dim=1).cpu()
        penalty = u.exp() * (self._sums.sum()[None] if shared else self._sums).cpu()
        value = float(self._log_likelihood(noise)) / temperature - 0.5 * float((penalty + log_det).sum())
        gradient = torch.zeros_like(logs)
        hessian = torch.zeros(len(logs), len(logs), dtype=logs.dtype)
        gradient[: len(u)] = -0.5 * (penalty - gamma)
        hessian.diagonal()[: len(u)] = -0.5 * (penalty + bend)
        if noise is not None:
            k = noise_exponent(self._fisher)
            first, second = self.likelihood.noise_derivatives(self.statistics, noise)
            gradient[-1] = first / temperature - 0.5 * k * gamma.sum()
            hessian[-1, -1] = second / temperature - 0.5 * k**2 * bend.sum()
            hessian[-1, :-1] = hessian[:-1, -1] = 0.5 * k * bend
        return value, gradient, hessian

    def _log_likelihood(self, noise_std: Tensor | float | None) -> Tensor:
        return self.likelihood.log_likelihood_at(self.statistics, noise_std)

    @torch.no_grad()
    def occam_of(self, index: int | None, precision: float, scale: Tensor) -> float:
        """`occam` of one block, or of all (None), at a precision that its weights share."""
        at = torch.tensor(precision, dtype=torch.float64, device=self.statistics.device)
        return float(self.occam(at, scale) if index is None else self.block_term(index, at, scale))

    def block_term(self, index: int, precision: Tensor, scale: Tensor) -> Tensor:
        """Return one block's share of `occam`, for its precision, 0-dim or ``(q, p)``, and ``c``."""
        if precision.ndim == 0:
            log_det_ratio = self._eigenvalues[index].log_det_ratio(scale / precision)
            return precision * self._sums[index] + log_det_ratio
        log_det_ratio = self._plus_diagonal[index].logdet(scale, precision) - precision.log().sum()
        return (precision * self._squares[index]).sum() + log_det_ratio


def _share(ratio: Tensor) -> Tensor:
    return ratio / (ratio + 1)


def _terms(values: Tensor, ratio: float) -> tuple[Tensor, ...]:
    ratios = values * ratio
    share = _share(ratios)
    return ratios.log1p(), share, share.square()


class _Spectrum:
    """Eigenvalues ``λ`` of one or several blocks, over which terms that are zero for ``λ = 0`` are summed.

    The sums are in float64, of some eigenvalues at a time: all of them in float64 may be larger than the network.

    Args:
        parts: Eigenvalues, and how often each counts, float64, or None for once; of shape ``(n,)``.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self._parts = list(parts)

    @classmethod
    def of(cls, values: Tensor, counts: Tensor | None) -> _Spectrum:
        """Make it from all eigenvalues and their multiplicities, and leave out zeros if they are many."""
        values, counts = values.flatten(), None if counts is None else counts.flatten()
        some = values > 0
        if 2 * int(some.sum()) < len(values):
            values, counts = values[some], None if counts is None else counts[some]
        return cls([(values, counts)])

    @classmethod
    def joined(cls, parts: Sequence[_Spectrum]) -> _Spectrum:
        """Join the eigenvalues of several blocks, which are not copied."""
        return cls([one for part in parts for one in part._parts])

    def sums(self, terms: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        """Return the sums of terms of each eigenvalue, 0-dim; the terms are functions of the eigenvalues, elementwise."""
        totals: list[Tensor] = []
        for values, counts in self._parts:
            times = repeat(None) if counts is None else counts.split(_CHUNK)
            for part, count in zip(values.split(_CHUNK), times, strict=False):
                found = terms(part.double())
                sums = [term.sum() if count is None else (term * count).sum() for term in found]
                totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        return totals

    def log_det_ratio(self, ratio: Tensor) -> Tensor:
        """Return ``Σ log(1 + r λ)``."""
        return self.sums(lambda values: (torch.log1p(values * ratio),))[0]


def check_has_evidence(likelihood: Likelihood) -> None:
    """Refuse a likelihood that has no normalizer.

    Raises:
        NotImplementedError: With the way out.
    """
    if not likelihood.has_normalizer:
        raise NotImplementedError(
            f"{type(likelihood).__name__} has no noise model, so there is no evidence. Use Gaussian(noise_std), "
            "whose noise is tuned."
        )


def noise_exponent(fisher: KroneckerFisher) -> int:
    """Return the power of the noise to which a Fisher is proportional."""
    return fisher.metadata.likelihood.noise_exponent(fisher.metadata.sampling)


def noise_rescaling(fisher: KroneckerFisher, noise_std: Tensor | float | None) -> Tensor | float:
    """Return the factor ``r`` by which a Fisher changes when the noise becomes ``noise_std``."""
    estimated_at = fisher.metadata.likelihood.noise_std
    if noise_std is None or estimated_at is None:
        return 1.0
    return (noise_std / estimated_at) ** noise_exponent(fisher)
