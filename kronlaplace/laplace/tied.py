"""Outputs that are products with the table of an embedding: tied weights.

The gradient of output ``f_c = w_cᵀ h`` by the table has the input ``h`` in row ``c``, and in the rows of the tokens that
were looked up what comes back through ``h``: ``X_c = e_c hᵀ + B(w_c)``. With weights ``v`` of the table's diagonal posterior
covariance, outputs ``a = Σ_c a_c f_c`` with ``u = Σ_c a_c w_c`` have the variance

    Σ_c a_c² Σ_j v_cj h_j² + uᵀ Σ u + 2 Σ_c a_c κ_cᵀ u,    κ_cᵀ u = Σ_j v_cj h_j B(u)_cj,

where ``Σ`` is the covariance of the features ``h``, with the look-ups, and ``κ_c`` is zero for all but the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace.damping import DampedInverse
from kronlaplace.laplace.layer_covariance import LookUps
from kronlaplace.laplace.output_covariance import OutputCovariance

__all__ = ["TiedLookUps", "TiedProducts"]


class TiedLookUps(LookUps):
    """The look-ups of a tied table, and their products with its other use.

    Args:
        inverse: The table's posterior covariance.
        features: ``h``, shape ``(N, T, d)``.
    """

    def __init__(self, inverse: DampedInverse, features: Tensor) -> None:
        super().__init__(inverse, OutputCovariance.BY_POSITION)
        self._features = features
        self._products: list[Tensor] = []
        self._token = features.new_zeros(())

    def result(self) -> Tensor:
        self._token = self._tokens[0]
        h = self._features[:, len(self._products)].unsqueeze(1)
        root = self._weights[self._token].sqrt() * h  # (N, S, d)
        self._products.append(torch.stack([(r * root).sum(2) for r in self._rows], dim=2))
        return super().result()

    def products(self) -> TiedProducts:
        """Return the products of all positions, after the last."""
        positions = len(self._products)
        return TiedProducts(
            self._token.repeat_interleave(positions, dim=0), torch.stack(self._products, dim=1).flatten(0, 1)
        )


@dataclass(frozen=True, eq=False)
class TiedProducts:
    """What the two uses of a tied table have in common, at ``n`` positions.

    Attributes:
        tokens: Which rows were looked up, ``(n, S)``.
        products: Their ``κ``, shape ``(n, S, d)``; zeros where a token is repeated.
    """

    tokens: Tensor
    products: Tensor

    @classmethod
    def joined(cls, parts: Sequence[TiedProducts]) -> TiedProducts | None:
        """Join those of several batches, with as many tokens each; None if there are none."""
        if not parts:
            return None
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.products for part in parts]))

    def rows(self, chosen: Tensor) -> TiedProducts:
        """Return those of some of the positions, ``(n,)`` booleans."""
        return TiedProducts(self.tokens[chosen], self.products[chosen])

    def variances(self, i: int, weight: Tensor, subtracted: Tensor | None, top: Tensor | None) -> Tensor:
        """Return what is added to the variances at one position, ``(C,)``.

        Args:
            i: The position.
            weight: ``W``, shape ``(C, d)``.
            subtracted: Row ``w`` that is subtracted from all rows of ``W``: that of one output, or the mean; or None.
            top: The output that is subtracted; None for the mean of all.
        """
        token, kappa = self.tokens[i], self.products[i]
        rows = weight[token].to(kappa)
        own = (kappa * (rows if subtracted is None else rows - subtracted)).sum(1)
        total = kappa.new_zeros(len(weight)).index_add_(0, token, own)
        if subtracted is not None:
            share = torch.full_like(own, 1 / len(weight)) if top is None else (token == top).to(kappa)
            other = share @ kappa
            total -= weight.to(kappa) @ other - subtracted @ other
        return 2 * total

    def covariances(self, weight: Tensor) -> Tensor:
        """Return what is added to the covariances, ``(n, C, C)``."""
        products = self.products @ weight.T  # (n, S, C)
        total = products.new_zeros(len(products), len(weight), len(weight))
        total.scatter_add_(1, self.tokens.unsqueeze(2).expand_as(products), products)
        return total + total.mT

    def times(self, vectors: Tensor, weight: Tensor) -> Tensor:
        """Multiply `covariances` with a vector at each position, ``(n, C)``."""
        through = torch.einsum("nsd,nd->ns", self.products, vectors @ weight)
        result = torch.zeros_like(vectors).scatter_add_(1, self.tokens, through)
        back = torch.einsum("nsd,ns->nd", self.products, vectors.gather(1, self.tokens))
        return result + back @ weight.T
