"""K-FOC: the Kronecker product that is nearest to the Fisher in Frobenius norm, merged over batches in four ways."""

from kronlaplace.estimators.kfoc.estimator import KFOC
from kronlaplace.estimators.kfoc.options import Aggregation, Initialization, UnitFactor

__all__ = ["KFOC", "Aggregation", "Initialization", "UnitFactor"]
