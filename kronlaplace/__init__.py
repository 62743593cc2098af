"""One Kronecker-factored Fisher of a trained network, used three ways.

    >>> import kronlaplace as kl
    >>> posterior = kl.KronLaplace(model, "classification").fit(train_loader).tune()  # doctest: +SKIP
    >>> probabilities = posterior.predict(x)                                          # doctest: +SKIP

The public names are those in ``__all__``; docs/conventions.md explains the conventions.
"""

from importlib.metadata import PackageNotFoundError, version

from kronlaplace import damping, metrics
from kronlaplace.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    KroneckerBlock,
    Sketch,
    TruncatedBlock,
    Truncation,
)
from kronlaplace.continual.memory import ContinualLaplace
from kronlaplace.continual.options import Merge, PenaltyMode
from kronlaplace.continual.synaptic_intelligence import SynapticIntelligence
from kronlaplace.data.converted import ConvertedLoader
from kronlaplace.data.outputs import with_output
from kronlaplace.estimators import EKFAC, KFAC, KFOC, SUA, TKFAC, Diagonal, Estimator, ExactBlock, register_estimator
from kronlaplace.estimators.kfoc.nearest import nearest_kronecker
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.approximation_error import RelativeError, relative_error
from kronlaplace.fisher.coverage import Coverage, CoverageRow
from kronlaplace.fisher.estimation import estimate_fisher
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.fisher.one_batch import accumulate_batch
from kronlaplace.laplace import (
    Comparison,
    Draws,
    EvidenceTraining,
    Hyperparameters,
    JointPrediction,
    KronLaplace,
    LowerBound,
    Predictive,
    Report,
    Uncertainty,
    VariationalFit,
    train_by_evidence,
)
from kronlaplace.layers import SUPPORTED_LAYERS, Layer, find_layers, register_layer
from kronlaplace.likelihoods import (
    Bernoulli,
    Categorical,
    Euclidean,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Prediction,
    Sampling,
    register_likelihood,
)
from kronlaplace.likelihoods.links import Link
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.forward import find_layout
from kronlaplace.network.observer import NetworkObserver
from kronlaplace.optim.adaptive_kfac import AdaptiveKFAC
from kronlaplace.optim.growing_batches import GrowingBatches
from kronlaplace.optim.iterate_average import IterateAverage
from kronlaplace.optim.natural_gradient import NaturalGradient
from kronlaplace.optim.parameters import PlainSGD
from kronlaplace.optim.period import Period
from kronlaplace.priors import DiagonalPrior, IsotropicPrior, KroneckerPrior, LayerwisePrior, Prior
from kronlaplace.priors.penalty import LayerPrecision, PriorPenalty, QuadraticPenalty

__all__ = [
    "estimate_fisher",
    "relative_error",
    "RelativeError",
    "KroneckerFisher",
    "Block",
    "KroneckerBlock",
    "TruncatedBlock",
    "EigenBlock",
    "DiagonalBlock",
    "DenseBlock",
    "Coverage",
    "CoverageRow",
    "Accumulation",
    "NetworkObserver",
    "DirectionSampling",
    "accumulate_batch",
    "find_layers",
    "find_layout",
    "with_output",
    "ConvertedLoader",
    "Estimator",
    "KFAC",
    "SUA",
    "TKFAC",
    "KFOC",
    "EKFAC",
    "Diagonal",
    "ExactBlock",
    "register_estimator",
    "SUPPORTED_LAYERS",
    "Layer",
    "register_layer",
    "Categorical",
    "Bernoulli",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Euclidean",
    "Likelihood",
    "register_likelihood",
    "Sampling",
    "Sketch",
    "KronLaplace",
    "Truncation",
    "Prior",
    "IsotropicPrior",
    "LayerwisePrior",
    "DiagonalPrior",
    "KroneckerPrior",
    "QuadraticPenalty",
    "PriorPenalty",
    "LayerPrecision",
    "Hyperparameters",
    "train_by_evidence",
    "EvidenceTraining",
    "VariationalFit",
    "LowerBound",
    "Predictive",
    "Prediction",
    "JointPrediction",
    "Draws",
    "Uncertainty",
    "Report",
    "Comparison",
    "Link",
    "ContinualLaplace",
    "Merge",
    "PenaltyMode",
    "SynapticIntelligence",
    "nearest_kronecker",
    "GrowingBatches",
    "IterateAverage",
    "NaturalGradient",
    "AdaptiveKFAC",
    "Period",
    "PlainSGD",
    "damping",
    "metrics",
]

try:
    __version__ = version("kronlaplace")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
