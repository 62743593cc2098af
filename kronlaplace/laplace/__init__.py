"""The Laplace posterior: what is fitted, what it predicts, and how its hyperparameters are tuned."""

from kronlaplace.laplace.posterior import KronLaplace, TuningMethod
from kronlaplace.laplace.predictive import JointPrediction, Predictive, PredictiveMethod
from kronlaplace.laplace.prior import PriorStructure
from kronlaplace.laplace.training import EvidenceRecord, EvidenceTraining, train_by_evidence
from kronlaplace.laplace.tuning import NoiseTuning

__all__ = [
    "EvidenceRecord",
    "EvidenceTraining",
    "JointPrediction",
    "KronLaplace",
    "NoiseTuning",
    "Predictive",
    "PredictiveMethod",
    "PriorStructure",
    "TuningMethod",
    "train_by_evidence",
]


def __dir__() -> list[str]:
    return sorted(__all__)
