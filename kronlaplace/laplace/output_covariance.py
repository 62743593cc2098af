"""Which covariances of the outputs are wanted."""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["OutputCovariance"]


class OutputCovariance(Enum):
    """Which covariances of the outputs are wanted."""

    VARIANCES = auto()
    """Variances only."""
    CENTERED_VARIANCES = auto()
    """Variances only, of the classes less the mean of all classes at their position."""
    MARGIN_VARIANCES = auto()
    """Variances only, of the classes less the most probable class at their position."""
    BY_POSITION = auto()
    """The classes at one position of one example."""
    BY_EXAMPLE = auto()
    """Covariances between all outputs of one example."""
    JOINT = auto()
    """Covariances between all outputs of all examples."""

    @property
    def variances(self) -> bool:
        """Whether only variances are requested."""
        return self is OutputCovariance.VARIANCES or self.relative

    @property
    def by_class(self) -> bool:
        """Whether the classes at one position belong together."""
        return self is OutputCovariance.BY_POSITION or self.relative

    @property
    def relative(self) -> bool:
        """Whether the variances are of differences between classes."""
        return self in (OutputCovariance.CENTERED_VARIANCES, OutputCovariance.MARGIN_VARIANCES)
