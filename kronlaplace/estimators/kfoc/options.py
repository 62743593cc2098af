"""The options of K-FOC."""

from __future__ import annotations

from kronlaplace._arguments import Choice

__all__ = ["Aggregation", "Initialization", "UnitFactor"]


class Aggregation(Choice):
    """How K-FOC merges batches.

    ``SWEEPS``: power iteration over the whole data set by passing over it several times; the result depends neither on
    batch size nor on order. ``RUNNING``: the best pair of each batch is merged into a running sum of ``rank`` Kronecker
    products. ``APPROX``: the factors of batches are averaged each on its own, as if they were independent. ``FULL``: all
    examples are kept, the ground truth.
    """

    SWEEPS = "sweeps"
    RUNNING = "running"
    APPROX = "approx"
    FULL = "full"


class Initialization(Choice):
    """Where the power iteration starts: at the identity, or at a random symmetric matrix (the paper's)."""

    IDENTITY = "identity"
    NORMAL = "normal"


class UnitFactor(Choice):
    """Which factor of every batch has unit Frobenius norm where batches' factors are added.

    The other factor carries the size of the batch. ``GRADIENT``: the paper's. ``ACTIVATION``: the other way round.
    """

    GRADIENT = "gradient"
    ACTIVATION = "activation"
