"""The Laplace posterior: what is fitted, what it predicts, and how its hyperparameters are tuned."""

from kronlaplace.laplace.posterior import KronLaplace, TuningMethod
from kronlaplace.laplace.predictive import JointPrediction, Predictive, PredictiveMethod
from kronlaplace.laplace.prior import PriorStructure

__all__ = ["JointPrediction", "KronLaplace", "Predictive", "PredictiveMethod", "PriorStructure", "TuningMethod"]
