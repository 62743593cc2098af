"""The rule that adapts a damping, and dampings to which something is added."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kronlaplace as kl
from kronlaplace.damping import (
    Damping,
    FactoredTikhonov,
    LevenbergMarquardt,
    Tikhonov,
    TraceRestricted,
    TraceRestrictedAuto,
)
from tests.support.dampings import BY_NUMBER, KINDS, make

W = (19 / 20) ** 5


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [
        (0.76, W),
        (5.0, W),
        (math.inf, W),
        (0.75, 1),
        (0.5, 1),
        (0.25, 1),
        (0.24, 1 / W),
        (-3.0, 1 / W),
        (-math.inf, 1 / W),
        (math.nan, 1 / W),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_damping_follows_the_ratio(ratio, factor, as_tensor):
    """K-FAC section 6.5 with its constants; a step without a number has failed."""
    gamma = torch.tensor(3.0) if as_tensor else 3.0
    found = LevenbergMarquardt().updated(gamma, torch.tensor(ratio))
    torch.testing.assert_close(found, torch.tensor(3.0 * factor))


def test_settings_are_used():
    rule = LevenbergMarquardt(every=2, decay=0.5, minimum=0.1, maximum=8.0, lower=0.0, upper=0.1)
    for gamma, ratio, expected in [(1, 0.2, 0.25), (1, 0.05, 1), (1, -0.1, 4), (4, -1, 8), (0.2, 1, 0.1)]:
        assert rule.updated(gamma, torch.tensor(float(ratio))) == pytest.approx(expected)
    assert rule.updated(torch.tensor(1.0).double(), torch.tensor(0.2)).dtype == torch.float64


def test_nothing_reads_a_value():
    """Tensors without values stand for those of a device that is still busy."""
    found = LevenbergMarquardt().updated(torch.ones((), device="meta"), torch.ones((), device="meta"))
    assert found.is_meta and FactoredTikhonov(found).damping is found


def test_the_strategy_takes_the_number():
    assert LevenbergMarquardt().damping(0.5) == FactoredTikhonov(0.5)
    assert LevenbergMarquardt(TraceRestricted).damping(0.5) == TraceRestricted(0.5)
    assert kl.damping.LevenbergMarquardt is LevenbergMarquardt


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"damping": FactoredTikhonov(0.1)}, TypeError, "damping must be a class or function .* without parentheses"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 1.5}, TypeError, "every must be an integer"),
        ({"decay": 1.0}, ValueError, "decay must be below 1, got 1.0"),
        ({"decay": 0.0}, ValueError, "decay must be a positive finite number"),
        ({"initial": 1e9}, ValueError, "initial must be from minimum to maximum"),
        ({"initial": 1.0, "minimum": 2.0}, ValueError, "initial must be from minimum to maximum"),
        ({"lower": 0.8}, ValueError, "lower must be from 0 to upper, got 0.8 and 0.75"),
    ],
)
def test_settings_out_of_range_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        LevenbergMarquardt(**settings)


# -- something added to a damping ----------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", BY_NUMBER)
@given(number=st.floats(0, 10), amount=st.floats(0, 10), as_tensor=st.booleans())
def test_adding_to_a_damping_is_a_damping_by_the_sum(strategy, number, amount, as_tensor):
    given_number = torch.tensor(number, dtype=torch.float64) if as_tensor else number
    for added in (amount, torch.tensor(amount, dtype=torch.float64)):
        found = strategy(given_number).with_added(added)
        assert type(found) is strategy and found.damping == number + amount


@pytest.mark.parametrize("kind", KINDS)
def test_adding_to_the_damping_of_every_weight(kind):
    block = make(kind, 0)
    diagonal = torch.linspace(0.1, 1, 6).double().view(block.shape)
    for damping, amount in ((diagonal, 0.5), (0.5, diagonal), (diagonal / 2, 0.5 + diagonal / 2)):
        found = Tikhonov(damping).with_added(amount).invert(block)
        torch.testing.assert_close(found.eigenvalues, Tikhonov(diagonal + 0.5).invert(block).eigenvalues)


def test_a_sum_that_is_not_a_damping_is_refused():
    for strategy in BY_NUMBER:
        with pytest.raises(ValueError, match="finite number that is not negative"):
            strategy(1.0).with_added(-2.0)


class Own(Damping):
    def eigenvalues(self, block):
        return block.eigenvalues() + 1


@pytest.mark.parametrize("damping", [Own(), TraceRestrictedAuto(0.1)])
def test_dampings_without_a_number_take_nothing_more(damping):
    assert damping.with_added(0) is damping and damping.with_added(0.0) is damping
    for amount in (1e-3, torch.tensor(1e-3)):
        with pytest.raises(
            NotImplementedError, match=r"has no number to which 0\.001 could be added.*weight decay to 0"
        ):
            damping.with_added(amount)


# -- λ of linear layers beside ν -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_convolution", [False, True])
@pytest.mark.parametrize("least", [None, 0.01])
def test_linear_layers_can_have_a_damping_of_their_own(kind, is_convolution, least):
    """TKFAC Table 2: Eq. 5.15 with λ for them, 5.16 with ν for convolutions."""
    block = make(kind, 0, k=2)
    block.shares_weights_over_space = is_convolution
    block.least_trace = None if least is None or is_convolution else torch.tensor(least)
    expected = TraceRestrictedAuto(5.0) if is_convolution else TraceRestricted(0.3)
    found = TraceRestrictedAuto(5.0, linear=0.3)
    assert torch.equal(found.eigenvalues(block), expected.eigenvalues(block))
    M = torch.randn(block.shape).double()
    torch.testing.assert_close(
        found.solvers({"layer": block})["layer"].solve(M), expected.invert(block).solve(M), rtol=1e-8, atol=1e-12
    )


def test_the_damping_of_linear_layers_is_shown_compared_and_checked():
    assert repr(TraceRestrictedAuto(0.5, linear=0.1)) == "TraceRestrictedAuto(minimum=0.5, linear=0.1)"
    assert TraceRestrictedAuto(0.5, 0.1) != TraceRestrictedAuto(0.5) == TraceRestrictedAuto(0.5, None)
    for bad in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="linear must be a positive finite number"):
            TraceRestrictedAuto(0.5, linear=bad)
