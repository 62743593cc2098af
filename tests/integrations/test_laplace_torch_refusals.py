"""What our backend of laplace-torch refuses, and why."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.laplace_torch import KroneckerBackend, N, assert_close, fitted, laplace, mlp, problem, separate


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ("ekfac", r"EKFAC.* does not make Kronecker factors.*kronlaplace.KronLaplace"),
        ("diagonal", r"Diagonal\(\) does not make Kronecker factors"),
        (kl.ExactBlock(), r"ExactBlock.* does not make Kronecker factors"),
        ("kfoc", r"KFOC.* needs 2 passes.*laplace-torch makes only one.*KFOC\(sweeps=1\)"),
        (kl.KFOC(sweeps=3), r"KFOC.* needs 3 passes"),
        ("kfax", r"unknown estimator 'kfax'; the shorthands are"),
    ],
)
def test_estimators_that_do_not_fit(estimator, message):
    with pytest.raises(ValueError, match=message):
        KroneckerBackend(mlp(), "classification", estimator=estimator)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"estimator": kl.KFAC}, TypeError, "estimator must be an instance"),
        ({"sampling": "none"}, ValueError, "unknown sampling 'none'; allowed are 'exact', 'mc', 'empirical'"),
        ({"mc_samples": 2}, ValueError, r'mc_samples=2 only applies when sampling="mc" \(got sampling=\'exact\'\)'),
        ({"mc_samples": 0, "sampling": "mc"}, ValueError, "mc_samples must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        KroneckerBackend(mlp(), "classification", **options)


def test_the_empirical_fisher_is_warned_of():
    model, _, _, data = problem(mlp())
    with pytest.warns(UserWarning, match="this gives the empirical Fisher"):
        la = fitted(model, data, sampling="empirical")
    with pytest.warns(UserWarning, match="this gives the empirical Fisher"):
        fisher = kl.estimate_fisher(model, data, "classification", sampling="empirical")
    assert_close(la.H_facs.to_matrix(), separate(fisher, model), 1e-12)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = x.flatten(1, 2)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.table((x.flatten(1) > 0).long()).mean(1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.flat = nn.Flatten()
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        return self.head(self.scale * self.flat(x))


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(24, 3)),
            r"layer '0' \(Conv2d\) cannot be passed to laplace-torch: .* 2 groups of rows.*Freeze it",
        ),
        (Attention, r"layer 'attention.in_proj' \(MultiheadAttention\) cannot be passed.* 3 groups"),
        (Tokens, r"layer 'table' \(Embedding\) cannot be passed.* diagonal, and its weight has more than one axis"),
        (
            lambda: nn.Sequential(nn.LayerNorm([4, 5]), nn.Flatten(), nn.Linear(40, 3)),
            r"layer '0' \(LayerNorm\) cannot be passed.* more than one axis",
        ),
        (
            Scaled,
            r"(?s)no block for.*\(the model itself\) \(Scaled\).*With laplace-torch, of these only freezing is possible",
        ),
    ],
)
def test_layers_that_do_not_fit(model, message):
    """They can be frozen, or left out by fitting the last layer."""
    model, _, _, data = problem(model())
    with pytest.raises(NotImplementedError, match=message):
        fitted(model, data)
    fisher = kl.estimate_fisher(
        model, data, "classification", sampling="exact", layers=[[name for name, _ in model.named_modules()][-1]]
    )
    expected = separate(fisher, model)
    assert_close(fitted(model, data, subset="last_layer").H_facs.to_matrix(), expected, 1e-12)
    for p in list(model.parameters())[:-2]:
        p.requires_grad_(False)
    assert_close(fitted(model, data).H_facs.to_matrix(), expected, 1e-12)


def test_more_examples_than_the_data_set_has():
    model, x, y, _ = problem(mlp())
    backend = KroneckerBackend(model, "classification")
    backend.kron(x[:9], y[:9], 12)
    message = r"9 examples have been seen and this batch has 4 more, but the data set has only 12.*drop_last"
    with pytest.raises(ValueError, match=message):
        backend.kron(x[:4], y[:4], 12)
    expected = KroneckerBackend(model, "classification").kron(x, y, N)[1].to_matrix()
    assert_close(backend.kron(x, y, N)[1].to_matrix(), expected, 1e-12)  # begins anew


def test_a_pass_that_fails_is_forgotten():
    model, x, y, _ = problem(mlp())
    backend = KroneckerBackend(model, "classification", estimator="tkfac")
    backend.kron(x[:9], y[:9], N)
    with pytest.raises(ValueError, match="NaN or infinite"):
        backend.kron(x[9:] / 0, y[9:], N)
    expected = KroneckerBackend(model, "classification", estimator="tkfac").kron(x, y, N)[1].to_matrix()
    assert_close(backend.kron(x, y, N)[1].to_matrix(), expected, 1e-12)


def test_options_per_batch():
    model, _, _, data = problem(mlp())
    la = laplace.Laplace(
        model,
        "classification",
        "all",
        "kron",
        backend=KroneckerBackend,
        asdl_fisher_kwargs={"mc_samples": 3},
    )
    with pytest.raises(TypeError, match=r"does not accept options per batch, but got \['mc_samples'\].*backend_kwargs"):
        la.fit(data)


def test_an_estimator_whose_blocks_are_of_another_kind():
    class Strange(kl.KFAC):
        def finish(self, state, layer, weight):
            q, p = layer.shape
            return kl.DenseBlock(torch.eye(q * p).double(), (q, p), name=layer.name)

    model, _, _, data = problem(mlp())
    with pytest.raises(
        TypeError, match="made a DenseBlock for layer '1'; laplace-torch only accepts Kronecker products"
    ):
        fitted(model, data, estimator=Strange())


def test_without_laplace_torch(monkeypatch):
    name = KroneckerBackend.__module__
    for module in [name, *(m for m in sys.modules if m.partition(".")[0] == "laplace")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "laplace", None)  # what is not installed
    with pytest.raises(ImportError, match=r"pip install 'laplace-torch==0\.3'"):
        importlib.import_module(name)


@pytest.mark.grid
def test_nothing_else_imports_it():
    code = "import sys, kronlaplace; sys.exit(any(m.startswith(('laplace', 'kronlaplace.int')) for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
