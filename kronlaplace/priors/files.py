"""Priors in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kronlaplace.layers import Layer
from kronlaplace.priors.given import GivenPrior
from kronlaplace.priors.kronecker import KroneckerPrior
from kronlaplace.priors.prior import DIAGONAL_KINDS, Prior

__all__ = ["prior_from_tensors"]


def prior_from_tensors(tensors: Mapping[str, Tensor], values: dict[str, Any], layers: Sequence[Layer]) -> Prior:
    """Inverse of `Prior.to_tensors` and `Prior.to_json`.

    Raises:
        ValueError: If the prior is of a kind that this version does not know.
    """
    kind = values.get("kind", "")
    means = _with_prefix(tensors, "prior_mean/")
    if kind == KroneckerPrior.kind:
        return KroneckerPrior.from_tensors(_with_prefix(tensors, "prior/"), values, means).over(layers)
    if kind not in ("", *DIAGONAL_KINDS):
        raise ValueError(f"the file has a prior of the kind {kind!r}, which this version does not know; update it.")
    return GivenPrior(tensors["prior_precision"], means or 0.0).over(layers)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
