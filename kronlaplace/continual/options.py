"""The options of a memory of earlier tasks."""

from __future__ import annotations

from kronlaplace._arguments import Choice

__all__ = ["Merge", "PenaltyMode"]


class Merge(Choice):
    """What becomes of the Kronecker products of several tasks.

    ``SUM`` keeps all of them: the sum is exact, and memory and time grow with the number of tasks. ``KFOC`` keeps a fixed
    number of Kronecker products, by default one, each time the nearest to the sum (see `nearest_kronecker`). ``FACTORS``
    keeps one product, whose factors are averages of the tasks' factors, such that its trace and its partial traces are
    those of the sum. Diagonal and dense blocks always add up, exactly and in constant memory.
    """

    SUM = "sum"
    KFOC = "kfoc"
    FACTORS = "factors"


class PenaltyMode(Choice):
    """The weights around which the penalty pulls.

    ``LATEST``: all curvature is around the weights at the end of the latest task, and so is the prior's precision. This is
    the online Laplace approximation: the posterior after a task is one Gaussian, and the prior of the next.
    ``PER_TASK``: each task's curvature is around the weights at its own end, and the prior's precision around its own mean,
    as in the original elastic weight consolidation.
    """

    LATEST = "latest"
    PER_TASK = "per-task"
