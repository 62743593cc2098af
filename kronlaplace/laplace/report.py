"""The report on a posterior: a table, a picture, and a verdict in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from kronlaplace.laplace.calibration_picture import CalibrationCurve, draw
from kronlaplace.laplace.comparison import Comparison

__all__ = ["Report"]


@dataclass(frozen=True, repr=False)
class Report:
    """What the posterior does for predictions, beside the network at its trained weights (the MAP), on the same data.

    Printed, it is a table whose last line is the verdict. A difference counts if it is larger than two of its standard
    errors.

    Attributes:
        rows: The scores, in the order of the table.
        n_examples: Number of examples with targets.
        n_foreign: Number of foreign examples, 0 if none were given.
        regression: Whether the scores are those of regression.
        unit: To what the negative log-likelihood belongs, ``"example"`` or, if examples have several targets, ``"target"``.
        curves: Calibration by method, ``"MAP"`` and ``"posterior"``, as `plot` draws it.
    """

    rows: tuple[Comparison, ...]
    n_examples: int
    n_foreign: int
    regression: bool
    unit: str
    curves: Mapping[str, CalibrationCurve]

    def __getitem__(self, name: str) -> Comparison:
        """Return the row of a score, such as ``report["NLL"]``.

        Raises:
            KeyError: If there is no such row; the message lists those that there are.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"there is no row {name!r}; there are {[row.name for row in self.rows]}.")

    @property
    def helps(self) -> bool | None:
        """Whether the posterior's negative log-likelihood is better than the MAP's; None if data are too few to tell."""
        direction = self["NLL"].direction
        return None if direction == 0 else direction < 0

    @property
    def verdict(self) -> str:
        """Whether to use the posterior, in one sentence."""
        nll = self["NLL"]
        change = f"{_with_error(abs(nll.difference), nll.difference_error)} nats per {self.unit}"
        rest = f"{self._calibration()}{self._detection()}"
        if self.helps:
            return f"The posterior improves the NLL by {change}{rest}."
        if self.helps is None:
            change = f"{_with_error(nll.difference, nll.difference_error, sign=True)} nats per {self.unit}"
            return f"The posterior neither improves nor worsens the NLL measurably ({change}){rest}."
        advice = 'use the MAP, or tune on validation data with tune("validation", data=...)'
        return f"The posterior does not help here: it worsens the NLL by {change}{rest}; {advice}."

    def _calibration(self) -> str:
        """Return the clause on calibration, empty if there is nothing to say."""
        if self.regression:
            row = self["coverage 90 %"]
            return f", and its 90 % intervals cover {100 * row.posterior:.0f} % of the targets (MAP: {100 * row.map:.0f} %)"
        row = self["ECE"]
        if row.direction == 0:
            return ""
        values = f"from {row.map:.3f} to {row.posterior:.3f}"
        better = row.direction < 0
        if better is self.helps:
            return f" and the ECE {values}"
        return f", but it {'improves' if better else 'worsens'} the ECE {values}"

    def _detection(self) -> str:
        """Return the clause on foreign inputs."""
        if not self.n_foreign:
            return ""
        row = self["AUROC"]
        how = {1: "better", 0: "no better and no worse", -1: "worse"}[row.direction]
        return f"; it recognizes foreign inputs {how} (AUROC {row.posterior:.3f}, MAP {row.map:.3f})"

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return the numbers by score: ``{"NLL": {"map": ..., "map_error": ..., "posterior": ..., ...}, ...}``."""
        return {row.name: {k: v for k, v in asdict(row).items() if k != "name"} for row in self.rows}

    def plot(self, where: str | PathLike[str] | Any) -> Any:
        """Draw how well both methods are calibrated: accuracy by confidence, or the coverage of intervals by their level.

        Bars are standard errors; the area of a marker grows with its share of the examples. The legend is outside the axes.

        Args:
            where: A file to write, with a suffix that matplotlib knows, such as ``"report.png"``; or the matplotlib axes to
                draw in.

        Returns:
            The matplotlib axes.

        Raises:
            ImportError: If matplotlib is not installed.
            TypeError: If ``where`` is neither a path nor axes.
        """
        return draw(where, self.curves, self.regression, self.n_examples)

    def __str__(self) -> str:
        foreign = f", {self.n_foreign:,} foreign ones" if self.n_foreign else ""
        cells = [(f"{self.n_examples:,} examples{foreign}", "MAP", "posterior", "difference"), *map(_cells, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = []
        for name, *numbers in cells:
            columns = "".join(f"  {text:>{width}}" for text, width in zip(numbers, widths[1:], strict=True))
            lines.append(f"{name:<{widths[0]}}{columns}")
        return "\n".join([*lines, self.verdict])

    __repr__ = __str__


def _cells(row: Comparison) -> tuple[str, str, str, str]:
    """Return the texts of a row, all with the same decimals."""
    decimals = max(map(_decimals, (row.map_error, row.posterior_error, row.difference_error)))
    return (
        row.name,
        f"{row.map:.{decimals}f} ± {row.map_error:.{decimals}f}",
        f"{row.posterior:.{decimals}f} ± {row.posterior_error:.{decimals}f}",
        f"{row.difference:+.{decimals}f} ± {row.difference_error:.{decimals}f}",
    )


def _with_error(value: float, error: float, sign: bool = False) -> str:
    decimals = _decimals(error)
    return f"{value:{'+' if sign else ''}.{decimals}f} ± {error:.{decimals}f}"


def _decimals(error: float) -> int:
    """Return the decimals that show an error with two digits, at most 4; 3 where it is zero up to rounding."""
    if not 1e-6 < error < math.inf:
        return 3
    return min(4, max(0, 1 - math.floor(math.log10(error))))
