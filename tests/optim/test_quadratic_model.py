"""The minimum of the quadratic model against dense algebra, and where its directions degenerate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronlaplace.optim.quadratic_model import minimize, predicted_change, reduction_ratio


def problem(seed, n=5):
    generator = torch.Generator().manual_seed(seed)
    root, gradient, directions = (torch.randn(shape, generator=generator).double() for shape in ((n, n), (n,), (2, n)))
    return root @ root.T + torch.eye(n).double(), gradient, directions


def terms(matrix, gradient, directions):
    return directions @ matrix @ directions.mT, directions @ gradient


def model(matrix, gradient, step):
    return gradient @ step + 0.5 * step @ matrix @ step


@given(seed=st.integers(0, 10_000))
def test_it_is_the_minimum(seed):
    matrix, gradient, directions = problem(seed)
    curvature, slopes = terms(matrix, gradient, directions)
    coefficients = minimize(curvature, slopes)
    torch.testing.assert_close(coefficients, -torch.linalg.solve(curvature, slopes))
    step = coefficients @ directions
    change = predicted_change(curvature, slopes, coefficients)
    torch.testing.assert_close(change, model(matrix, gradient, step))
    torch.testing.assert_close(change, slopes @ coefficients / 2)
    for _ in range(5):
        other = coefficients + 0.1 * torch.randn(2).double()
        worse = predicted_change(curvature, slopes, other)
        torch.testing.assert_close(worse, model(matrix, gradient, other @ directions))
        assert worse >= change


def test_several_at_once():
    problems = [terms(*problem(seed)) for seed in range(4)]
    curvature, slopes = map(torch.stack, zip(*problems, strict=True))
    together = minimize(curvature, slopes)
    changes = predicted_change(curvature, slopes, together)
    for i, one in enumerate(problems):
        torch.testing.assert_close(together[i], minimize(*one))
        torch.testing.assert_close(changes[i], predicted_change(*one, minimize(*one)))


@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0, 1 + 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_last_step_without_a_direction_of_its_own(factor, dtype):
    """There is only a learning rate then, that of the step without momentum."""
    matrix, gradient, (first, _) = problem(0)
    curvature, slopes = terms(matrix, gradient, torch.stack([first, factor * first]))
    coefficients = minimize(curvature.to(dtype), slopes.to(dtype))
    expected = -(gradient @ first) / (first @ matrix @ first)
    torch.testing.assert_close(coefficients, torch.tensor([expected, 0.0], dtype=dtype))
    torch.testing.assert_close(minimize(curvature[:1, :1], slopes[:1]), expected.unsqueeze(0))


def test_no_gradient_no_step():
    assert torch.equal(minimize(torch.zeros(2, 2), torch.zeros(2)), torch.zeros(2))
    matrix, gradient, (_, before) = problem(0)
    coefficients = minimize(*terms(matrix, gradient, torch.stack([torch.zeros_like(before), before])))
    assert torch.equal(coefficients, torch.zeros(2).double())


def test_what_is_not_a_number_stays_so():
    assert torch.isnan(minimize(torch.eye(2), torch.tensor([math.nan, 1.0]))[0])


def test_reduction_ratio():
    change = torch.tensor([-2.0, 1.0, 0.0, 1.0, math.nan, math.inf, 1.0])
    predicted = torch.tensor([-4.0, -4, 0, 0, -4, -4, 2])
    expected = torch.tensor([0.5, -0.25, 1.0, math.nan, math.nan, -math.inf, math.nan])
    torch.testing.assert_close(reduction_ratio(change, predicted), expected, equal_nan=True)
