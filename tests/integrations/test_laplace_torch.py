"""Our estimators as a backend of laplace-torch."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import StackDataset, TensorDataset

import kronlaplace as kl
from tests.support.laplace_torch import (
    NETWORKS,
    ONE_PASS,
    PRIORS,
    KroneckerBackend,
    N,
    assert_close,
    cnn,
    double,
    fitted,
    loader,
    mlp,
    predictive,
    problem,
    separate,
)

# -- K-FAC: the same as laplace-torch's own ------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_kfac_is_laplace_torchs_own(likelihood, network, subset):
    """Same factors (theirs halve the factor 2 of the squared error between the two), evidence and predictions."""
    model, x, _, data = problem(NETWORKS[network](), likelihood)
    theirs, ours = (fitted(model, data, likelihood, subset, backend) for backend in (None, KroneckerBackend))
    assert_close(ours.H_facs.to_matrix(), theirs.H_facs.to_matrix(), 1e-12)
    if likelihood == "classification":
        for mine, other in zip(ours.H_facs.kfacs, theirs.H_facs.kfacs, strict=True):
            assert len(mine) == len(other)
            ratios = [float(m.trace() / o.trace()) for m, o in zip(mine, other, strict=True)]
            assert math.prod(ratios) == pytest.approx(1)
            for m, o, ratio in zip(mine, other, ratios, strict=True):
                assert_close(m, ratio * o, 1e-12)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    for prior in PRIORS:
        torch.testing.assert_close(
            ours.log_marginal_likelihood(double(prior)),
            theirs.log_marginal_likelihood(double(prior)),
            rtol=1e-12,
            atol=1e-10,
        )
        torch.testing.assert_close(predictive(ours, x), predictive(theirs, x), rtol=1e-9, atol=1e-12)


def test_kfac_in_single_precision():
    model, x, _, data = problem(cnn(), dtype=torch.float32)
    theirs, ours = (fitted(model, data, backend=backend) for backend in (None, KroneckerBackend))
    assert_close(ours.H_facs.to_matrix(), theirs.H_facs.to_matrix(), 1e-5)
    torch.testing.assert_close(predictive(ours, x), predictive(theirs, x), rtol=1e-4, atol=1e-5)


def test_kfac_with_more_data_later():
    """``override=False`` discounts the second factor by the data before: so the number of examples is in the first."""
    model, x, y, _ = problem(cnn())
    posteriors = []
    for backend in (None, KroneckerBackend):
        la = fitted(model, loader(TensorDataset(x[:9], y[:9])), backend=backend)
        la.fit(loader(TensorDataset(x[9:], y[9:])), override=False)
        posteriors.append(la.H_facs.to_matrix())
    assert_close(posteriors[1], posteriors[0], 1e-12)


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, batch):
        return self.body(batch["input_ids"])


def test_batches_that_are_dicts():
    model, x, y, data = problem(mlp())
    expected = fitted(model, data).H_facs.to_matrix()
    of_dict = OfDict().double()
    of_dict.body = model
    la = fitted(of_dict, loader(StackDataset(input_ids=x, labels=y)))
    assert_close(la.H_facs.to_matrix(), expected, 1e-12)


# -- every estimator: one pass of it, cut into laplace-torch's batches ----------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ONE_PASS)
def test_a_fit_is_one_pass_of_the_estimator(name, network):
    """Factors that are no sums over batches too."""
    model, _, _, data = problem(NETWORKS[network]())
    la = fitted(model, data, estimator=ONE_PASS[name]())
    fisher = kl.estimate_fisher(model, data, "classification", ONE_PASS[name](), sampling="exact")
    expected = separate(fisher, model)
    assert_close(la.H_facs.to_matrix(), expected, 1e-9)
    la.prior_precision = 0.7
    assert_close(la.posterior_precision.to_matrix(), expected + 0.7 * torch.eye(len(expected)).double(), 1e-9)


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", ["tkfac", "kfoc-running"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_a_fit_of_the_last_layer(likelihood, name):
    model, _, _, data = problem(cnn(), likelihood)
    la = fitted(model, data, likelihood, "last_layer", estimator=ONE_PASS[name]())
    fisher = kl.estimate_fisher(model, data, likelihood, ONE_PASS[name](), sampling="exact", layers=["5"])
    assert_close(la.H_facs.to_matrix(), separate(fisher, model), 1e-9)


def test_a_shorthand_is_its_estimator():
    model, _, _, data = problem(mlp())
    matrices = [fitted(model, data, estimator=e).H_facs.to_matrix() for e in ("tkfac", kl.TKFAC(), "kfac")]
    assert torch.equal(matrices[0], matrices[1]) and not torch.allclose(matrices[0], matrices[2])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(5, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.rnn(x.flatten(1, 2))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
def test_recurrent_layers(kind):
    """One block ``[W_ih W_hh b]``; both biases act through ``b``, so both get its block."""
    model, _, _, data = problem(Recurrent(kind), "regression")
    la = fitted(model, data, "regression", estimator="tkfac")
    fisher = kl.estimate_fisher(model, data, "regression", "tkfac", sampling="exact")
    assert len(la.H_facs) == 6
    assert_close(la.H_facs.to_matrix(), separate(fisher, model), 1e-10)


def normalised():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, 3)
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


def test_normalisations_have_diagonal_blocks():
    model, _, _, data = problem(normalised())
    la = fitted(model, data)
    fisher = kl.estimate_fisher(model, data, "classification", sampling="exact")
    assert_close(la.H_facs.to_matrix(), separate(fisher, model), 1e-12)
    assert [len(factors) for factors in la.H_facs.kfacs] == [2, 1, 1, 1, 1, 1, 2, 1]


class OneStep(Recurrent):
    def forward(self, x):
        return super().forward(x.flatten(1)[:, None, None, :5])


ONCE = {
    "mlp": lambda: mlp(outputs=1),
    "norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(40, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)),
    "rnn": lambda: nn.Sequential(OneStep(nn.RNN), nn.Linear(2, 1)),
    "gru": lambda: nn.Sequential(OneStep(nn.GRU), nn.Linear(2, 1)),
}


@pytest.mark.parametrize("network", ONCE)
def test_one_example_by_laplace_torchs_jacobians(network):
    """One example, one output, weights used once: the gradient is ``g aᵀ``, and K-FAC exact.

    So rows, columns and order of the parameters are those of the Jacobians that laplace-torch predicts with.
    """
    model, x, _, data = problem(ONCE[network](), "regression", 1)
    la = fitted(model, data, "regression")
    jacobian = la.backend.jacobians(x)[0].flatten()
    sizes = [p.numel() for p in model.parameters()]
    matrix = la.H_facs.to_matrix()
    for (name, p), j, rows in zip(model.named_parameters(), jacobian.split(sizes), matrix.split(sizes), strict=True):
        start = sum(sizes[: [n for n, _ in model.named_parameters()].index(name)])
        expected = torch.outer(j, j)
        if network == "norm" and name.startswith("2."):
            expected = torch.diag(expected.diagonal())
        assert_close(rows[:, start : start + p.numel()], expected, 1e-10)
    assert_close(matrix.diagonal(), jacobian.square(), 1e-10)


def test_frozen_parameters_have_no_factors():
    model = cnn()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model, _, _, data = problem(model)
    la = fitted(model, data)
    fisher = kl.estimate_fisher(model, data, "classification", sampling="exact")
    assert len(la.H_facs) == 3
    assert_close(la.H_facs.to_matrix(), separate(fisher, model), 1e-12)


# -- fits in a row, draws ------------------------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["kfac", "tkfac", "kfoc-running"])
def test_a_second_fit_begins_anew(name):
    model, _, _, data = problem(cnn())
    la = fitted(model, data, estimator=ONE_PASS[name]())
    first = la.H_facs.to_matrix()
    la.fit(data)
    assert torch.equal(la.H_facs.to_matrix(), first)
    with torch.no_grad():
        model[0].weight.mul_(2)
    la.fit(data)
    expected = fitted(model, data, estimator=ONE_PASS[name]()).H_facs.to_matrix()
    assert torch.equal(la.H_facs.to_matrix(), expected) and not torch.allclose(first, expected)


def test_draws_differ_between_batches_and_seeds():
    model, x, y, data = problem(mlp())
    backend = KroneckerBackend(model, "classification", sampling="mc")
    parts = [backend.kron(x, y, 3 * N)[1].to_matrix() for _ in range(3)]
    assert not torch.allclose(parts[0], parts[1]) and not torch.allclose(parts[1], parts[2])
    first, same, other = (fitted(model, data, sampling="mc", seed=seed).H_facs.to_matrix() for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.allclose(first, other)


@pytest.mark.grid
def test_many_draws_are_exact():
    model, _, _, data = problem(mlp())
    exact = fitted(model, data).H_facs.to_matrix()
    assert_close(fitted(model, data, sampling="mc", mc_samples=1000).H_facs.to_matrix(), exact, 0.05)


def test_nothing_is_left_behind():
    model, x, y, _ = problem(mlp())
    state = torch.get_rng_state()
    backend = KroneckerBackend(model, "classification", estimator="tkfac")
    backend.kron(x, y, N)
    assert backend._pass is None
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules())
