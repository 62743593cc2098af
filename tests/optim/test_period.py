"""How often something is renewed."""

import pytest

from kronlaplace import Period
from kronlaplace.optim.period import period_of


def renewals(period, steps):
    """The steps that renew, by asking step after step."""
    found = []
    for i in range(steps):
        if period.is_due(i, found[-1] if found else None):
            found.append(i)
    return found


def test_a_number_is_exact():
    assert renewals(period_of(4, "invert_every"), 13) == [0, 4, 8, 12]


def test_with_a_growth_renewals_are_close_at_first():
    """The next one is due when the number of steps has grown by a half of it, and in every eighth step."""
    assert renewals(Period(8, growth=0.5), 26) == [0, 1, 2, 4, 8, 16, 24]


@pytest.mark.parametrize("fewest, expected", [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (3, [0, 3])])
def test_the_fewest_steps_between_two_renewals(fewest, expected):
    assert renewals(Period(100, growth=0.01, fewest=fewest), 6) == expected


def test_a_step_that_is_due_by_its_number_renews_in_any_case():
    assert renewals(Period(5, growth=0.01, fewest=3), 12) == [0, 3, 5, 8, 10]


@pytest.mark.parametrize("value, error", [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)])
@pytest.mark.parametrize("name", ["steps", "fewest"])
def test_numbers_of_steps_are_positive_integers(name, value, error):
    with pytest.raises(error, match=name):
        Period(**{"steps": 10, name: value})


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_the_growth_is_positive(value):
    with pytest.raises(ValueError, match="growth"):
        Period(10, growth=value)
