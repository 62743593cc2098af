"""Training by the evidence: the hyperparameters it finds, what it keeps, when it stops."""

import math

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import kronlaplace as kl

X = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.randn(60, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 0.3 * NOISE


def loader(x=X, y=Y, batch_size=20):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch_size)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 1)).double()


@pytest.mark.grid
def test_finds_the_marginal_likelihood_of_bayesian_linear_regression():
    """On a linear model the evidence is exact: ``y ~ N(0, σ² I + X Xᵀ / δ)``."""

    def negative_evidence(u):
        covariance = math.exp(2 * u[1]) * torch.eye(60) + X @ X.T / math.exp(u[0])
        normal = torch.distributions.MultivariateNormal(torch.zeros(60).double(), covariance)
        return -float(normal.log_prob(Y[:, 0]))

    expected = minimize(negative_evidence, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    model = nn.Linear(3, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    result = kl.train_by_evidence(
        nn.Sequential(model), loader(batch_size=60), "regression", optimizer=optimizer, epochs=300, structure="scalar"
    )
    assert result.best.log_marginal_likelihood == pytest.approx(-expected.fun, rel=1e-6)
    assert math.log(result.posterior.prior_precision) == pytest.approx(expected.x[0], abs=1e-3)
    assert math.log(result.posterior.likelihood.noise_std) == pytest.approx(expected.x[1], abs=1e-3)


@pytest.mark.grid
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diagonal"])
def test_keeps_the_weights_of_the_largest_evidence(structure):
    model = mlp()
    result = kl.train_by_evidence(
        model,
        loader(),
        "regression",
        optimizer=torch.optim.Adam(model.parameters(), lr=0.3),  # jumps about
        epochs=20,
        every=2,
        structure=structure,
    )
    assert [record.epoch for record in result.history] == list(range(2, 21, 2))
    evidences = [record.log_marginal_likelihood for record in result.history]
    assert result.best.log_marginal_likelihood == max(evidences) > evidences[0]
    again = kl.KronLaplace(model, result.posterior.likelihood, prior_precision=result.posterior.prior_precision)
    evidence = float(again.fit(loader()).log_marginal_likelihood())
    assert evidence == pytest.approx(max(evidences), rel=1e-9)
    assert float(result.posterior.log_marginal_likelihood()) == pytest.approx(max(evidences), rel=1e-9)
    with torch.no_grad():
        log_likelihood = torch.distributions.Normal(model(X), again.likelihood.noise_std).log_prob(Y).sum()
    assert result.best.log_likelihood == pytest.approx(float(log_likelihood), rel=1e-9)


def test_a_step_goes_down_the_gradient_of_the_negative_log_posterior():
    """One full batch of SGD: ``θ ← θ − lr · (−∇ log p(y | θ) / τ + δ θ) / N``."""
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    objective = -torch.distributions.Normal(model(X), 0.7).log_prob(Y).sum() / 0.5
    objective = objective + 0.5 * sum(
        delta * p.square().sum() for delta, p in zip((2.0, 2.0, 3.0, 3.0), model.parameters(), strict=True)
    )
    expected = [
        p - 0.1 * g / 60 for p, g in zip(before, torch.autograd.grad(objective, list(model.parameters())), strict=True)
    ]
    kl.train_by_evidence(
        model,
        loader(batch_size=60),
        kl.Gaussian(0.7),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        epochs=1,
        prior_precision=[2.0, 3.0],
        temperature=0.5,
    )
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)


def test_stops_when_the_evidence_does_not_get_larger():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)  # nothing changes
    result = kl.train_by_evidence(model, loader(), "regression", optimizer=optimizer, every=1, epochs=50, patience=3)
    assert len(result.history) < 10


def test_burn_in_every_and_scheduler():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    result = kl.train_by_evidence(
        model, loader(), "regression", optimizer=optimizer, scheduler=scheduler, epochs=8, every=3, burn_in=2
    )
    assert [record.epoch for record in result.history] == [5, 8]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 2**8)


def test_trains_in_training_mode_and_ends_in_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
    labels = (Y[:, 0] > 0).long()
    result = kl.train_by_evidence(model, loader(y=labels), "classification", epochs=3, every=1)
    assert not any(module.training for module in model.modules())
    assert model[1].num_batches_tracked > 0
    assert result.posterior.predict(X).shape == (60, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"burn_in": 5, "epochs": 5}, ValueError, "burn_in must be less than epochs"),
        ({"data": iter([(X, Y)])}, TypeError, "readable again and again"),
        ({"data": [X]}, TypeError, "without targets"),
        ({"data": loader(y=Y[:, 0])}, ValueError, r"batch 0: Gaussian targets must have the shape of .* \(20, 1\)"),
        ({"likelihood": "euclidean"}, NotImplementedError, "no noise model"),
        ({"structure": "full"}, ValueError, "unknown structure 'full'"),
    ],
)
def test_refusals(change, error, message):
    model = mlp()
    arguments = {"model": model, "data": loader(), "likelihood": "regression"} | change
    with pytest.raises(error, match=message):
        kl.train_by_evidence(**arguments)
    torch.testing.assert_close(model.state_dict(), mlp().state_dict(), rtol=0, atol=0)  # nothing was trained


def test_weight_decay_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match="weight decay"):
        kl.train_by_evidence(model, loader(), "regression", optimizer=torch.optim.AdamW(model.parameters()))


def test_divergence_is_an_error():
    model = mlp()
    with pytest.raises(FloatingPointError, match="diverged"):
        kl.train_by_evidence(model, loader(), "regression", optimizer=torch.optim.SGD(model.parameters(), lr=1e200))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda model: torch.optim.Adam(mlp().parameters()), ValueError, r"does not have these parameters.*0\.weight"),
        (
            lambda model: torch.optim.Adam(model[0].parameters()),
            ValueError,
            r"does not have .*: \['2.weight', '2.bias'\]",
        ),
        (lambda model: torch.optim.Adam, TypeError, "optimizer must be a torch optimizer"),
    ],
)
def test_optimizers_of_other_parameters(make, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        kl.train_by_evidence(model, loader(), "regression", optimizer=make(model))
