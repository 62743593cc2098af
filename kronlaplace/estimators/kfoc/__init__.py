"""K-FOC: the Kronecker product nearest to the Fisher in Frobenius norm, with four ways of merging batches."""

from kronlaplace.estimators.kfoc.estimator import KFOC
from kronlaplace.estimators.kfoc.options import Aggregation, Initialization, UnitFactor

__all__ = ["KFOC", "Aggregation", "Initialization", "UnitFactor"]
