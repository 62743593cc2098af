"""The quick tier: of every parametrized test as few cases as show every value of every parameter.

Among cases that show equally many new values, those come first that have pairs of values which no other test of the same
file has had, so that the tests of a file together meet most pairs. The choice depends on nothing but the cases.
"""

from itertools import combinations

__all__ = ["quick_cases"]


def quick_cases(items):
    """Return the items to be run.

    Args:
        items: All collected items, in order.
    """
    by_test = {}
    for item in items:
        by_test.setdefault((item.path, item.originalname, getattr(item, "cls", None)), []).append(item)
    chosen, met = set(), {}
    for (path, *_), cases in by_test.items():
        chosen.update(_covering(cases, met.setdefault(path, set())))
    return [item for item in items if item in chosen]


def _covering(cases, met):
    """Choose cases that have every value, greedily; pairs of values that they have are added to ``met``."""
    seen = {}
    values = {case: _values(case, seen) for case in cases}
    missing = set().union(*values.values())
    if not missing:
        return cases
    chosen = []
    while missing:
        best = max(cases, key=lambda case: (len(values[case] & missing), len(_pairs(values[case]) - met)))
        chosen.append(best)
        missing -= values[best]
        met |= _pairs(values[best])
    return chosen


def _values(case, seen):
    """Return the parameters of a case with their values.

    Args:
        case: The case.
        seen: Objects that earlier cases of the test had, by parameter: they are told apart by their order.
    """
    result = set()
    for name, value in (case.callspec.params if hasattr(case, "callspec") else {}).items():
        if isinstance(value, (str, int, float, bool, type(None))):
            result.add((name, repr(value)))
        else:
            known = seen.setdefault(name, [])
            order = next((i for i, other in enumerate(known) if other is value), len(known))
            if order == len(known):
                known.append(value)
            result.add((name, f"object {order}"))
    return frozenset(result)


def _pairs(values):
    return set(combinations(sorted(values), 2))
