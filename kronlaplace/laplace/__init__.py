"""The Laplace posterior: what is fitted, what it predicts, and how its hyperparameters are tuned."""

from kronlaplace.laplace.comparison import Comparison
from kronlaplace.laplace.draws import Draws
from kronlaplace.laplace.hyperparameters import Hyperparameters
from kronlaplace.laplace.posterior import KronLaplace
from kronlaplace.laplace.posterior_tuning import TuningMethod
from kronlaplace.laplace.predictive import JointPrediction, Predictive, PredictiveMethod
from kronlaplace.laplace.report import Report
from kronlaplace.laplace.training import EvidenceRecord, EvidenceTraining, train_by_evidence
from kronlaplace.laplace.tuning import NoiseTuning
from kronlaplace.laplace.uncertainty import Uncertainty
from kronlaplace.laplace.variational import LowerBound, VariationalFit

__all__ = [
    "Comparison",
    "Draws",
    "EvidenceRecord",
    "EvidenceTraining",
    "Hyperparameters",
    "JointPrediction",
    "KronLaplace",
    "LowerBound",
    "NoiseTuning",
    "Predictive",
    "PredictiveMethod",
    "Report",
    "TuningMethod",
    "Uncertainty",
    "VariationalFit",
    "train_by_evidence",
]


def __dir__() -> list[str]:
    return sorted(__all__)
