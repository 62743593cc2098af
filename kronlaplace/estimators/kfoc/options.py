"""Options of K-FOC."""

from __future__ import annotations

from kronlaplace._arguments import Choice

__all__ = ["Aggregation", "Initialization", "UnitFactor"]


class Aggregation(Choice):
    """Method by which K-FOC merges batches.

    ``SWEEPS``: power iteration over the whole data set in several passes; the result depends on neither the batch size nor
    the order. ``RUNNING``: the best pair of each batch is merged into a running sum of ``rank`` Kronecker products.
    ``APPROX``: the two factors of the batches are averaged separately, as if they were independent. ``FULL``: all examples
    are kept; this is the ground truth.
    """

    SWEEPS = "sweeps"
    RUNNING = "running"
    APPROX = "approx"
    FULL = "full"


class Initialization(Choice):
    """Starting point of the power iteration: the identity, or a random symmetric matrix as in the paper."""

    IDENTITY = "identity"
    NORMAL = "normal"


class UnitFactor(Choice):
    """Factor of every batch that has unit Frobenius norm before the factors of batches are averaged.

    The other factor carries the size of the batch. ``GRADIENT`` is the paper's choice, ``ACTIVATION`` the reverse.
    """

    GRADIENT = "gradient"
    ACTIVATION = "activation"
