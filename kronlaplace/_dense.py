"""The largest matrices that are ever made dense."""

from __future__ import annotations

__all__ = ["LARGEST_DENSE", "check_size"]

LARGEST_DENSE = 2**15
"""Number of rows up to which one side of a block is made a dense matrix: 4 GiB in float32."""


def check_size(rows: int, what: str) -> None:
    """Check that a square matrix with so many rows is not absurdly large.

    Args:
        rows: The number of rows.
        what: What needs it, for the error.

    Raises:
        NotImplementedError: If it is, with the ways out.
    """
    if rows > LARGEST_DENSE:
        raise NotImplementedError(
            f"{what} of {rows:,} rows, a dense matrix of {rows**2 * 4 / 2**30:.0f} GiB in float32. With sides of more than "
            f"{LARGEST_DENSE:,} rows, use KFAC() or TKFAC() and a posterior with one prior precision or one per layer, "
            'which never form it; leave the layer out (exclude=), or use the estimator "diagonal".'
        )
