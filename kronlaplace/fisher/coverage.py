"""Coverage of a Fisher: a table of the network's parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kronlaplace.blocks import Block, TruncatedBlock
from kronlaplace.layers import NOT_WANTED

__all__ = ["Coverage", "CoverageRow"]


@dataclass(frozen=True)
class CoverageRow:
    """One block, or the parameters of one module that have no block.

    Attributes:
        layer: Name of the block, or of the module.
        module: Type of the module.
        block: Kind of the block, or "none".
        estimator: Name of the block's estimator, or "".
        shape: Shape ``(q, p)`` of the block, or None.
        parameters: Number of parameters in this row.
        share: Share of all parameters of the network, from 0 to 1.
        note: Reason why there is no block, or other remarks.
    """

    layer: str
    module: str
    block: str
    estimator: str
    shape: tuple[int, int] | None
    parameters: int
    share: float
    note: str = ""


class Coverage(Sequence[CoverageRow]):
    """Sequence of rows, blocks first, in the order of the network; ``print`` shows a table.

    Args:
        rows: The rows of the table.
    """

    def __init__(self, rows: Sequence[CoverageRow] = ()) -> None:
        self._rows = tuple(rows)

    @classmethod
    def of_blocks(cls, blocks: Mapping[str, Block]) -> Coverage:
        """Return the rows for blocks about which nothing else is known."""
        total = sum(math.prod(block.shape) for block in blocks.values())
        rows = []
        for name, block in blocks.items():
            count = math.prod(block.shape)
            rows.append(
                CoverageRow(name, "", block.kind, "", block.shape, count, count / total, "built from blocks alone")
            )
        return cls(rows).with_blocks(blocks)

    def with_blocks(self, blocks: Mapping[str, Block]) -> Coverage:
        """Return the table with the kinds of these blocks, and remarks on those that are truncated."""
        rows = []
        for row in self:
            block = blocks.get(row.layer)
            if row.shape is not None and block is not None:
                note = block.note if isinstance(block, TruncatedBlock) else ""
                row = replace(row, block=block.kind, note="; ".join(part for part in (row.note, note) if part))
            rows.append(row)
        return Coverage(rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[CoverageRow]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coverage) and self._rows == other._rows

    def __hash__(self) -> int:
        return hash(self._rows)

    @property
    def share(self) -> float:
        """Share of the network's parameters that have a block, from 0 to 1."""
        return sum(row.share for row in self if row.shape is not None)

    def __str__(self) -> str:
        heading = ["layer", "module", "block", "estimator", "shape", "parameters", "share", ""]
        cells = [
            [
                row.layer or "(the model itself)",
                row.module,
                row.block,
                row.estimator,
                "" if row.shape is None else f"{row.shape[0]} x {row.shape[1]}",
                f"{row.parameters:,}",
                f"{row.share:.1%}",
                row.note,
            ]
            for row in self
        ]
        widths = [max(len(line[i]) for line in [heading, *cells]) for i in range(len(heading))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [heading, *cells]
        ]
        return "\n".join([*lines, f"{self.share:.1%} of the parameters have a block"])

    __repr__ = __str__

    def summary(self) -> str:
        """Return one line: how many blocks of each kind, of which estimators, for what share of the parameters."""
        kinds = Counter(
            " ".join(dict.fromkeys(word for word in (row.estimator, row.block) if word))
            for row in self
            if row.shape is not None
        )
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        return f"blocks: {counts}; {self.share:.1%} of the parameters"

    def reasons(self) -> dict[str, str]:
        """Return the reasons why layers or modules have no block, by name."""
        return {row.layer: row.note for row in self if row.shape is None}

    def restricted_to(self, layers: set[str], reasons: Mapping[str, str] | None = None) -> Coverage:
        """Return a copy in which all other layers have no block, for the given reasons by layer."""
        known = reasons or {}
        return Coverage(
            [
                row
                if row.shape is None or row.layer in layers
                else replace(row, block="none", estimator="", shape=None, note=known.get(row.layer, NOT_WANTED[0]))
                for row in self
            ]
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as JSON-compatible values."""
        return [asdict(row) for row in self]

    @classmethod
    def from_json(cls, values: list[dict[str, Any]]) -> Coverage:
        """Restore a table from the result of `to_json`."""
        return cls([CoverageRow(**{**row, "shape": tuple(row["shape"]) if row["shape"] else None}) for row in values])
