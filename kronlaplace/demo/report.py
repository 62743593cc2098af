"""The table of a demo: methods as rows, scores as columns; for the terminal, as CSV and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Column", "Table", "mean_and_error"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Column:
    """A score: its name in the CSV, its heading for readers, its decimals."""

    key: str
    heading: str
    decimals: int = 4


@dataclass(frozen=True)
class Table:
    """Scores of several methods on the same splits.

    Attributes:
        columns: One per score.
        scores: Per method, in the order of the rows, the scores of every split, `(splits, columns)`.
    """

    columns: Sequence[Column]
    scores: Mapping[str, FloatArray]

    @property
    def n_splits(self) -> int:
        """Number of splits; with more than one, cells are mean ± standard error, unless all values are equal; NaN is "-"."""
        return len(next(iter(self.scores.values())))

    def cells(self) -> list[list[str]]:
        """Heading and rows as text."""
        rows = [["", *(column.heading for column in self.columns)]]
        for method, scores in self.scores.items():
            texts = [_text(scores[:, i], column.decimals) for i, column in enumerate(self.columns)]
            rows.append([method, *texts])
        return rows

    def to_text(self) -> str:
        """Aligned columns for a terminal."""
        rows = self.cells()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for row in rows:
            numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            lines.append(f"  {row[0]:<{widths[0]}}{numbers}")
        return "\n".join(lines)

    def to_markdown(self, title: str, notes: Sequence[str] = ()) -> str:
        """Format a titled Markdown table with the notes as a list below."""
        heading, *rows = self.cells()
        lines = [f"# {title}", "", _row(heading), _row(["---", *["---:"] * len(self.columns)]), *map(_row, rows)]
        return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])

    def write_csv(self, path: Path) -> None:
        """Write one row per method; with several splits each score has a second column, `<key>_standard_error`."""
        several = self.n_splits > 1
        header = ["method"]
        for column in self.columns:
            header += [column.key, f"{column.key}_standard_error"] if several else [column.key]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for method, scores in self.scores.items():
                row = [method]
                for i in range(len(self.columns)):
                    mean, error = mean_and_error(scores[:, i])
                    row += [f"{mean:.6g}", f"{error:.6g}"] if several else [f"{mean:.6g}"]
                writer.writerow(row)

    def write_splits_csv(self, path: Path, extra: Mapping[str, Sequence[float]]) -> None:
        """Write one row per split and method, and columns of `extra` that belong to the split."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["split", "method", *(column.key for column in self.columns), *extra])
            for split in range(self.n_splits):
                tail = [f"{values[split]:.6g}" for values in extra.values()]
                for method, scores in self.scores.items():
                    writer.writerow([split, method, *(f"{value:.6g}" for value in scores[split]), *tail])


def mean_and_error(values: npt.ArrayLike) -> tuple[float, float]:
    """Mean and standard error of the mean (with `n - 1`; NaN for one value)."""
    array = np.asarray(values, dtype=np.float64)
    error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else np.nan
    return float(array.mean()), float(error)


def _text(values: FloatArray, decimals: int) -> str:
    mean, error = mean_and_error(values)
    if np.isnan(mean):
        return "-"
    return f"{mean:.{decimals}f}" if (values == values[0]).all() else f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
