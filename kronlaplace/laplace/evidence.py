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

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kronlaplace.inversion import PlusDiagonal
from kronlaplace.kronecker import KroneckerFisher
from kronlaplace.laplace.prior import precision_by_layer
from kronlaplace.likelihoods import Euclidean, Gaussian, Likelihood, Sampling

__all__ = ["Evidence", "check_has_evidence", "noise_exponent", "noise_rescaling"]


class Evidence:
    """The evidence of a fitted network.

    Args:
        fisher: Its Fisher.
        deviations: ``θ − m`` of each block, shape ``(q, p)``.

    Raises:
        NotImplementedError: If the likelihood has no normaliser.
        ValueError: If the Fisher saw no targets.
    """

    def __init__(self, fisher: KroneckerFisher, deviations: Sequence[Tensor]) -> None:
        check_has_evidence(fisher.metadata.likelihood)
        if fisher.statistics is None:
            raise ValueError("the evidence needs targets: fit with batches of (inputs, targets).")
        fisher.decompose()
        self.likelihood = fisher.metadata.likelihood
        self.statistics = fisher.statistics
        self.squares = [deviation.double().square() for deviation in deviations]
        self.blocks = list(fisher.values())
        self._plus_diagonal = [PlusDiagonal(block) for block in self.blocks]
        self._fisher = fisher
        # Zeros add nothing to Σ log(1 + c λ / δ).
        eigenvalues = [values[values > 0] for values in (block.eigenvalues() for block in self.blocks)]
        self._all_eigenvalues = torch.cat(eigenvalues)
        self._eigenvalues = self._all_eigenvalues.split([len(values) for values in eigenvalues])
        self._sums = torch.stack([square.sum() for square in self.squares])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """``(q, p)`` of every block."""
        return [block.shape for block in self.blocks]

    @property
    def n_weights(self) -> int:
        """``P``."""
        return sum(square.numel() for square in self.squares)

    @property
    def squared_norm(self) -> float:
        """``‖θ − m‖²`` of all blocks."""
        return float(self._sums.sum())

    def __call__(
        self, precision: Tensor, noise_std: Tensor | float | None = None, temperature: Tensor | float = 1.0
    ) -> Tensor:
        """The evidence in nats, 0-dim, float64, differentiable in its arguments.

        Args:
            precision: ``δ``, 0-dim, one per block, ``(L,)``, or one per weight, ``(P,)``, float64.
            noise_std: ``σ`` (Gaussian likelihood only); None is the likelihood's own.
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
        """``(θ − m)ᵀ D (θ − m) + log det(c F + D) − log det D``, for ``c`` as `scale` gives it."""
        if precision.ndim == 0:
            return precision * self._sums.sum() + torch.log1p(self._all_eigenvalues * (scale / precision)).sum()
        return torch.stack(
            [self.block_term(i, p, scale) for i, p in enumerate(precision_by_layer(precision, self.shapes))]
        ).sum()

    @torch.no_grad()
    def derivatives(self, logs: Tensor, temperature: float) -> tuple[float, Tensor, Tensor]:
        """The evidence and its first two derivatives in closed form, for one precision in all or one per block.

        With ``t = c λ / δ`` and the effective number of parameters ``γ = Σ t / (1 + t)`` (MacKay 1992):
        ``∂/∂u = −½ (δ ‖θ − m‖² − γ)``, ``∂²/∂u² = −½ (δ ‖θ − m‖² + B)`` with ``B = Σ t / (1 + t)²``. The noise enters by
        ``c ∝ σᵏ``.

        Args:
            logs: ``u = log δ``, one or ``L`` numbers, and then ``log σ`` if the likelihood is Gaussian; on the CPU.
            temperature: ``τ``.

        Returns:
            The evidence, its gradient ``(n,)`` and its Hessian ``(n, n)``, on the CPU.
        """
        noisy = isinstance(self.likelihood, Gaussian)
        u = logs[:-1] if noisy else logs
        noise = math.exp(float(logs[-1])) if noisy else None
        shared = len(u) == 1
        groups = [self._all_eigenvalues] if shared else self._eigenvalues
        scale = float(self.scale(noise, temperature))
        sums = []
        for eigenvalues, log in zip(groups, u.tolist(), strict=True):
            ratio = eigenvalues * (scale / math.exp(log))
            share = ratio / (ratio + 1)
            sums.append(torch.stack([ratio.log1p().sum(), share.sum(), share.sum() - share.square().sum()]))
        log_det, gamma, bend = torch.stack(sums, dim=1).cpu()
        penalty = u.exp() * (self._sums.sum()[None] if shared else self._sums).cpu()
        value = float(self._log_likelihood(noise)) / temperature - 0.5 * float((penalty + log_det).sum())
        gradient = torch.zeros_like(logs)
        hessian = torch.zeros(len(logs), len(logs), dtype=logs.dtype)
        gradient[: len(u)] = -0.5 * (penalty - gamma)
        hessian.diagonal()[: len(u)] = -0.5 * (penalty + bend)
        if noise is not None:
            k = noise_exponent(self._fisher)
            squared_error, count = self.statistics.tolist()
            gradient[-1] = (squared_error / noise**2 - count) / temperature - 0.5 * k * gamma.sum()
            hessian[-1, -1] = -2 * squared_error / noise**2 / temperature - 0.5 * k**2 * bend.sum()
            hessian[-1, :-1] = hessian[:-1, -1] = 0.5 * k * bend
        return value, gradient, hessian

    def _log_likelihood(self, noise_std: Tensor | float | None) -> Tensor:
        if isinstance(self.likelihood, Gaussian):
            return self.likelihood.log_likelihood(self.statistics, noise_std)
        return self.likelihood.log_likelihood(self.statistics)

    @torch.no_grad()
    def occam_of(self, index: int | None, precision: float, scale: Tensor) -> float:
        """`occam` of one block, or of all (None), at a precision that its weights share."""
        at = torch.tensor(precision, dtype=torch.float64, device=self.statistics.device)
        return float(self.occam(at, scale) if index is None else self.block_term(index, at, scale))

    def block_term(self, index: int, precision: Tensor, scale: Tensor) -> Tensor:
        """One block's share of `occam`, for its precision, 0-dim or ``(q, p)``, and ``c``."""
        if precision.ndim == 0:
            log_det_ratio = torch.log1p(self._eigenvalues[index] * (scale / precision)).sum()
            return precision * self._sums[index] + log_det_ratio
        log_det_ratio = self._plus_diagonal[index].logdet(scale, precision) - precision.log().sum()
        return (precision * self.squares[index]).sum() + log_det_ratio


def check_has_evidence(likelihood: Likelihood) -> None:
    """Refuse a likelihood that has no normaliser.

    Raises:
        NotImplementedError: With the way out.
    """
    if isinstance(likelihood, Euclidean):
        raise NotImplementedError(
            "Euclidean has no noise model, so there is no evidence. Use Gaussian(noise_std), whose noise is tuned."
        )


def noise_exponent(fisher: KroneckerFisher) -> int:
    """The Fisher is ``∝ σ⁻²``; the empirical one, made of residuals over ``σ²``, is ``∝ σ⁻⁴``."""
    return -4 if fisher.metadata.sampling is Sampling.EMPIRICAL else -2


def noise_rescaling(fisher: KroneckerFisher, noise_std: Tensor | float | None) -> Tensor | float:
    """The factor ``r`` by which a Fisher changes when the noise goes from that of its estimation to ``noise_std``."""
    likelihood = fisher.metadata.likelihood
    if noise_std is None or not isinstance(likelihood, Gaussian):
        return 1.0
    return (noise_std / likelihood.noise_std) ** noise_exponent(fisher)
