"""Which cases of a test run when, chosen so that they differ as much as possible.

The quick tier has a few cases of every test. The grid, which CI runs, has every pair of values of two parameters, or as many
as the test says; all other cases are in the slow tier. `choose` decides for one test which of its cases those are, and
``conftest.py`` gives them the markers ``grid`` and ``slow``.
"""

import itertools
import zlib

from hypothesis import settings

CASES = 4
"""So many cases of a test with several parameters are in the quick tier, if it does not say ``@pytest.mark.quick(n)``."""


def values(item):
    """The value of each ``parametrize`` of a test, as something that can be compared."""
    found = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found.append(tuple(_comparable(item.callspec.params[name.strip()]) for name in names))
    return tuple(found)


def _comparable(value):
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def choose(cases, seed, most=None):
    """Indices of at most ``most`` of the cases: first all single values, then as many pairs of values as possible.

    Without ``most``, as many cases as it takes to have all pairs.

    Ties are broken by a hash of the seed, so that tests with the same parameters have different pairs of them.
    """
    singles = [{(i, value) for i, value in enumerate(case)} for case in cases]
    pairs = [set(itertools.combinations(enumerate(case), 2)) for case in cases]
    left, seen = list(range(len(cases))), set()
    everything = set().union(*singles, *pairs)
    chosen = []
    while left and (len(chosen) < most if most is not None else seen != everything):
        best = max(
            left, key=lambda j: (len(singles[j] - seen), len(pairs[j] - seen), zlib.crc32(f"{seed}{j}".encode()))
        )
        left.remove(best)
        chosen.append(best)
        seen |= singles[best] | pairs[best]
    return chosen


def examples(n):
    """``max_examples`` for Hypothesis where the default is not right; in the quick tier it is smaller in proportion."""
    return max(1, n * settings().max_examples // 25)
