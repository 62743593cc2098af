"""Training finds the mode of the posterior that it claims, the same one every time."""

import pytest
import torch
from torch import nn

from kronlaplace.demo.fitting import build, seeds_of
from kronlaplace.demo.training import GaussianNLL, Recipe, train


@pytest.fixture
def linear_problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3 * torch.randn(60, 1, generator=generator)
    return x, y


@pytest.mark.grid
def test_linear_regression_reaches_the_ridge_solution(linear_problem):
    x, y = linear_problem
    model, loss = nn.Linear(3, 1, bias=False), GaussianNLL()
    train(model, loss, x, y, Recipe(2000, 100, 0.05, prior_precision=20.0), seed=0)
    noise_variance = loss.log_std.detach().mul(2).exp()
    ridge = torch.linalg.solve(x.T @ x / noise_variance + 20.0 * torch.eye(3), x.T @ y / noise_variance)
    torch.testing.assert_close(model.weight.detach().T, ridge, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noise_variance, (model(x) - y).square().mean().detach(), atol=1e-4, rtol=1e-4)
    assert not model.training


@pytest.mark.grid
def test_weight_decay_is_a_prior_that_grows_with_the_data(linear_problem):
    """Under the mean squared error: `weight_decay / 2` of the squared norm, whatever the number of examples."""
    x, y = linear_problem
    model = nn.Linear(3, 1, bias=False)
    train(model, nn.MSELoss(), x, y, Recipe(2000, 100, 0.05, prior_precision=6.0, weight_decay=0.3), seed=0)
    decay = 0.5 * len(x) * (0.3 + 6.0 / len(x)) * torch.eye(3)
    torch.testing.assert_close(
        model.weight.detach().T, torch.linalg.solve(x.T @ x + decay, x.T @ y), atol=1e-4, rtol=1e-4
    )


def test_gaussian_nll_equals_the_density_but_for_its_constant():
    loss, f, y = GaussianNLL(), torch.randn(5, 2), torch.randn(5, 2)
    with torch.no_grad():
        loss.log_std.fill_(0.7)
    density = torch.distributions.Normal(f, torch.tensor(0.7).exp()).log_prob(y).mean()
    constant = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    torch.testing.assert_close(loss(f, y), constant - density)


@pytest.mark.grid
def test_every_epoch_visits_every_example_once():
    seen = []

    class Recorder(nn.Module):
        def forward(self, outputs, targets):
            seen.extend(targets.flatten().tolist())
            return outputs.mean()

    x = torch.zeros(12, 1)
    train(nn.Linear(1, 1), Recorder(), x, torch.arange(12.0)[:, None], Recipe(6, 4, 0.1, 1.0), seed=0)
    epochs = [seen[:12], seen[12:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_same_seed_same_weights_and_global_state_untouched(linear_problem):
    x, y = linear_problem
    state = torch.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        weight_seed, batch_seed = seeds_of(seed)
        model = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), weight_seed, torch.device("cpu"))
        train(model, GaussianNLL(), x, y, Recipe(20, 16, 0.01, 1.0), seed=batch_seed)
        weights.append(model[0].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert len({seeds_of(seed, split) for seed in range(5) for split in range(5)}) == 25


def test_initial_weights_depend_on_the_seed_only():
    def weights(seed):
        return build(lambda: nn.Sequential(nn.Linear(3, 4)), seed, torch.device("cpu"))[0].weight.detach()

    before = weights(0)
    torch.rand(7)
    assert torch.equal(weights(0), before)
    assert not torch.equal(weights(1), before)
