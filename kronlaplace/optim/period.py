"""How often something is renewed in training."""

from __future__ import annotations

from dataclasses import dataclass

from kronlaplace._arguments import positive_integer, positive_number

__all__ = ["Period", "period_of"]


@dataclass(frozen=True)
class Period:
    """Number of steps between two renewals, shorter at the beginning, when the network changes fastest.

    Args:
        steps: Number of steps between two renewals; steps 0, ``steps``, ``2 · steps``, … renew.
        growth: Fraction of the steps made so far after which the next renewal is due even if ``steps`` have not passed, so
            that the first renewals follow one another closely. None means exactly every ``steps`` steps.
        fewest: Smallest number of steps between two renewals that follow by ``growth``.

    Raises:
        TypeError, ValueError: If ``steps`` or ``fewest`` is not a positive integer or ``growth`` not a positive number.
    """

    steps: int
    growth: float | None = None
    fewest: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", positive_integer(self.steps, "steps"))
        object.__setattr__(self, "fewest", positive_integer(self.fewest, "fewest"))
        if self.growth is not None:
            object.__setattr__(self, "growth", positive_number(self.growth, "growth"))

    def is_due(self, step: int, last: int | None) -> bool:
        """Return whether step number ``step``, counted from 0, renews, if step ``last`` was the last to do so."""
        if last is None or step % self.steps == 0:
            return True
        return self.growth is not None and step - last >= max(self.fewest, self.growth * step)


def period_of(value: int | Period, name: str) -> Period:
    """Return a period, given as such or as a number of steps.

    Raises:
        TypeError, ValueError: If it is neither a period nor a positive integer.
    """
    return value if isinstance(value, Period) else Period(positive_integer(value, name))
