"""Errors found before a demo starts, each with a one-line message that says what to do."""

from __future__ import annotations

__all__ = ["DemoError", "UnknownDatasetError", "MissingDataError", "CorruptDataError"]


class DemoError(Exception):
    """A demo cannot run as asked. The command line prints the message and exits with code 2."""


class UnknownDatasetError(DemoError):
    """There is no data set of this name."""


class MissingDataError(DemoError):
    """A data directory, or a folder or file in it, is not there."""


class CorruptDataError(DemoError):
    """A data file is there, but is truncated or not in the expected layout."""
