"""Priors over the weights as objects, which the posterior and the memory of earlier tasks share."""

from kronlaplace.priors.kronecker import KroneckerPrior
from kronlaplace.priors.prior import DiagonalPrior, IsotropicPrior, LayerwisePrior, Prior, PriorStructure

__all__ = ["DiagonalPrior", "IsotropicPrior", "KroneckerPrior", "LayerwisePrior", "Prior", "PriorStructure"]


def __dir__() -> list[str]:
    return sorted(__all__)
