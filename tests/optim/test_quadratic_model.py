"""The minimum of the quadratic model against dense algebra, and where its directions degenerate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronlaplace.optim.quadratic_model import adapted_damping, minimize, reduction_ratio


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
    found = minimize(curvature, slopes)
    torch.testing.assert_close(found.coefficients, -torch.linalg.solve(curvature, slopes))
    step = found.coefficients @ directions
    torch.testing.assert_close(found.change, model(matrix, gradient, step))
    for _ in range(5):
        assert model(matrix, gradient, step + 0.1 * torch.randn(2).double() @ directions) >= found.change


def test_several_at_once():
    problems = [terms(*problem(seed)) for seed in range(4)]
    together = minimize(*map(torch.stack, zip(*problems, strict=True)))
    for i, one in enumerate(problems):
        torch.testing.assert_close(together.coefficients[i], minimize(*one).coefficients)
        torch.testing.assert_close(together.change[i], minimize(*one).change)


@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0, 1 + 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_last_step_without_a_direction_of_its_own(factor, dtype):
    """There is only a learning rate then, that of the step without momentum."""
    matrix, gradient, (first, _) = problem(0)
    curvature, slopes = terms(matrix, gradient, torch.stack([first, factor * first]))
    coefficients, change = minimize(curvature.to(dtype), slopes.to(dtype))
    expected = -(gradient @ first) / (first @ matrix @ first)
    torch.testing.assert_close(coefficients, torch.tensor([expected, 0.0], dtype=dtype))
    torch.testing.assert_close(change, model(matrix, gradient, expected * first).to(dtype))


def test_no_gradient_no_step():
    coefficients, change = minimize(torch.zeros(2, 2), torch.zeros(2))
    assert torch.equal(coefficients, torch.zeros(2))
    assert change == 0
    matrix, gradient, (_, before) = problem(0)
    coefficients, _ = minimize(*terms(matrix, gradient, torch.stack([torch.zeros_like(before), before])))
    assert torch.equal(coefficients, torch.zeros(2).double())


def test_what_is_not_a_number_stays_so():
    coefficients, change = minimize(torch.eye(2), torch.tensor([math.nan, 1.0]))
    assert torch.isnan(coefficients[0])
    assert torch.isnan(change)


def test_reduction_ratio_and_its_damping():
    ratios = reduction_ratio(
        torch.tensor([-2.0, 1.0, 0.0, 1.0, math.nan, math.inf]), torch.tensor([-4.0, -4, 0, 0, -4, -4])
    )
    assert ratios.tolist() == [0.5, -0.25, 1.0, 0.0, -math.inf, -math.inf]
    damping = torch.tensor(8.0)
    assert [float(adapted_damping(damping, torch.tensor(r), 0.5)) for r in (0.8, 0.75, 0.5, 0.25, 0.2, -math.inf)] == [
        4.0,
        8.0,
        8.0,
        8.0,
        16.0,
        16.0,
    ]
