"""The Laplace posterior: what is fitted, what it predicts, and how its hyperparameters are tuned."""

from kronlaplace.laplace.posterior import KronLaplace

__all__ = ["KronLaplace"]
