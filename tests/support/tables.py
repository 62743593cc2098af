"""The tables that programs write."""

import csv


def lines(path):
    """Return the rows of a CSV file, each a dict by column."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
