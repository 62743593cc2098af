"""Our estimators as a backend of laplace-torch, and our posterior beside laplace-torch's own."""

import importlib
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, StackDataset, TensorDataset

import kronlaplace as kl
from experiments.peers import laplace_torch

try:
    laplace = laplace_torch()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
from kronlaplace.integrations.laplace_torch import KroneckerBackend

N = 23
SIZES = [4, 11, 1, 7]  # of batches, in sum N
CONVERGED = {"max_iter": 1000, "tol": 1e-12}
ONE_PASS = {
    "kfac": lambda: kl.KFAC(),
    "sua": lambda: kl.SUA(),
    "tkfac": lambda: kl.TKFAC(),
    "tkfac-uncorrelated": lambda: kl.TKFAC(spatial="uncorrelated"),
    "kfoc-one-sweep": lambda: kl.KFOC(sweeps=1),
    "kfoc-running": lambda: kl.KFOC(aggregation="running", **CONVERGED),
    "kfoc-running-rank-3": lambda: kl.KFOC(aggregation="running", rank=3, **CONVERGED),
    "kfoc-approx": lambda: kl.KFOC(aggregation="approx", **CONVERGED),
    "kfoc-full": lambda: kl.KFOC(aggregation="full"),
}
PRIORS = [1e-3, 0.3, 10.0, 1e4]


def mlp(bias=True, outputs=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(40, 6, bias=bias), nn.Tanh(), nn.Linear(6, outputs, bias=bias))


def cnn(bias=True, outputs=3):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2, stride=2, bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, outputs, bias=bias),
    )


NETWORKS = {"mlp": mlp, "cnn": cnn}


def problem(model, likelihood="classification", n=N, dtype=torch.float64):
    """A network after a few steps of training, its data, and a loader with batches of unequal sizes."""
    model = model.to(dtype).eval()
    x = torch.randn(n, 2, 4, 5, dtype=dtype)
    outputs = model(x).shape[1]
    y = torch.randint(outputs, (n,)) if likelihood == "classification" else torch.randn(n, outputs, dtype=dtype)
    loss = F.cross_entropy if likelihood == "classification" else F.mse_loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model, x, y, loader(TensorDataset(x, y))


def loader(data):
    sizes = SIZES if len(data) == N else [len(data)]
    return DataLoader(data, batch_sampler=[part.tolist() for part in torch.arange(len(data)).split(sizes)])


def fitted(model, data, likelihood="classification", subset="all", backend=KroneckerBackend, **options):
    """laplace-torch's posterior; options are the backend's. ``backend=None`` is laplace-torch's default, curvlinops."""
    la = laplace.Laplace(
        model,
        likelihood,
        subset_of_weights=subset,
        hessian_structure="kron",
        backend=backend,
        backend_kwargs=options,
    )
    la.fit(data)
    return la


def columns_of(model):
    """Of every parameter its layer and its columns of ``W̄``, as docs/conventions.md has them."""
    result = {}
    for name, module in model.named_modules():
        weights = [key for key, p in module.named_parameters(recurse=False) if p.ndim > 1]
        prefix = f"{name}." if name else ""
        stop = 0
        for key in weights:
            start, stop = stop, stop + getattr(module, key)[0].numel()
            result[prefix + key] = name, list(range(start, stop))
        for key, p in module.named_parameters(recurse=False):
            if p.ndim == 1 and not weights:  # normalisations
                result[prefix + key] = name, [0 if key == "weight" else 1]
            elif p.ndim == 1:
                result[prefix + key] = name, [stop]
    return {name: result[name] for name, p in model.named_parameters() if p.requires_grad}


def separate(fisher, model):
    """A Fisher's blocks as a sum over the data in the order of the parameters, without terms between parameters."""
    parts = []
    for layer, columns in columns_of(model).values():
        if layer not in fisher:
            continue
        q, p = fisher[layer].shape
        index = torch.arange(q * p).view(q, p)[:, columns].flatten()
        parts.append(fisher.n_examples * fisher[layer].to_dense()[index][:, index])
    return torch.block_diag(*parts)


def assert_close(actual, expected, rtol):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert float(torch.linalg.norm(actual - expected)) <= rtol * float(torch.linalg.norm(expected))


def double(value):
    """In laplace-torch a tensor of single precision, such as ``torch.tensor(0.3)``, makes evidences less exact."""
    return torch.tensor(value, dtype=torch.float64)


def predictive(la, x):
    """Probit probabilities; in regression the functional covariance."""
    prediction = la(x, pred_type="glm", link_approx="probit")
    return prediction[1] if isinstance(prediction, tuple) else prediction


# -- K-FAC: the same as laplace-torch's own ------------------------------------------------------------------


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


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ("ekfac", r"EKFAC.* makes no Kronecker factors.*kronlaplace.KronLaplace"),
        ("diagonal", r"Diagonal\(\) makes no Kronecker factors"),
        (kl.ExactBlock(), r"ExactBlock.* makes no Kronecker factors"),
        ("kfoc", r"KFOC.* needs 2 passes.*laplace-torch makes one.*KFOC\(sweeps=1\)"),
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
    with pytest.warns(UserWarning, match="that is the empirical Fisher"):
        la = fitted(model, data, sampling="empirical")
    with pytest.warns(UserWarning, match="that is the empirical Fisher"):
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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(24, 3)),
            r"layer '0' \(Conv2d\) cannot be given to laplace-torch: .* 2 groups of rows.*Freeze it",
        ),
        (Attention, r"layer 'attention.in_proj' \(MultiheadAttention\) cannot be given.* 3 groups"),
        (Tokens, r"layer 'table' \(Embedding\) cannot be given.* diagonal, and its weight has more than one axis"),
        (
            lambda: nn.Sequential(nn.LayerNorm([4, 5]), nn.Flatten(), nn.Linear(40, 3)),
            r"layer '0' \(LayerNorm\) cannot be given.* more than one axis",
        ),
        (Scaled, r"(?s)no block for.*\(the model itself\) \(Scaled\).*Of these laplace-torch offers freezing"),
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
    message = r"9 examples came before and now 4 more, but the data set has only 12.*drop_last"
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
    with pytest.raises(TypeError, match=r"no options per batch, but got \['mc_samples'\].*backend_kwargs"):
        la.fit(data)


def test_an_estimator_whose_blocks_are_of_another_kind():
    class Strange(kl.KFAC):
        def finish(self, state, layer, weight):
            q, p = layer.shape
            return kl.DenseBlock(torch.eye(q * p).double(), (q, p), name=layer.name)

    model, _, _, data = problem(mlp())
    with pytest.raises(TypeError, match="made a DenseBlock for layer '1'; laplace-torch takes Kronecker products only"):
        fitted(model, data, estimator=Strange())


def test_without_laplace_torch(monkeypatch):
    name = KroneckerBackend.__module__
    for module in [name, *(m for m in sys.modules if m.partition(".")[0] == "laplace")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "laplace", None)  # what is not installed
    with pytest.raises(ImportError, match=r"pip install 'laplace-torch==0\.3'"):
        importlib.import_module(name)


def test_nothing_else_imports_it():
    code = "import sys, kronlaplace; sys.exit(any(m.startswith(('laplace', 'kronlaplace.int')) for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- our posterior beside laplace-torch's --------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_parity_in_classification(network, subset):
    """`KronLaplace` and ``Laplace(..., "kron")`` with its default backend, on networks without biases.

    Theirs keeps the Kronecker factors of the sum over the data and calls the prior precision's parameter groups what are
    our layers; ours keeps means over examples and multiplies by ``N``. Both predictives are linearised, both probit links
    use the marginal variances. With biases the posteriors differ: joint blocks here, separate ones there (see
    `test_parity_with_biases`).
    """
    model, x, _, data = problem(NETWORKS[network](bias=False))
    last = [name for name, _ in model.named_modules()][-1]
    ours = kl.KronLaplace(model, "classification", layers=None if subset == "all" else [last]).fit(data)
    theirs = fitted(model, data, subset=subset, backend=None)
    layerwise = [0.1 * (i + 1) for i in range(len(ours.fisher))]
    for prior in [*PRIORS, layerwise]:
        for temperature in (1.0, 0.3):
            ours.prior_precision = prior
            ours.temperature = theirs.temperature = temperature
            theirs.prior_precision = double(prior)
            torch.testing.assert_close(
                ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), rtol=1e-10, atol=1e-8
            )
            torch.testing.assert_close(ours.predict(x), predictive(theirs, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_parity_in_regression(network, subset):
    """The same in regression.

    Theirs halves the squared error's second derivative, which leaves the Fisher of unit noise, and rescales it by
    ``sigma_noise``; ours is estimated with one noise and rescaled to another in the same way. The variance that theirs
    returns is of the function, without noise: `Prediction.variance`, not ``total_variance``.
    """
    model, x, _, data = problem(NETWORKS[network](bias=False), "regression")
    last = [name for name, _ in model.named_modules()][-1]
    ours = kl.KronLaplace(model, kl.Gaussian(noise_std=0.7), layers=None if subset == "all" else [last]).fit(data)
    theirs = fitted(model, data, "regression", subset, backend=None)
    for noise in (0.1, 1.0, 3.0):
        for prior in PRIORS:
            torch.testing.assert_close(
                ours.log_marginal_likelihood(prior, noise),
                theirs.log_marginal_likelihood(double(prior), double(noise)),
                rtol=1e-10,
                atol=1e-8,
            )
            ours.prior_precision, ours.likelihood = prior, kl.Gaussian(noise_std=noise)
            mean, covariance = theirs(x)
            prediction = ours.predict(x)
            torch.testing.assert_close(prediction.mean, mean, rtol=1e-12, atol=0)
            torch.testing.assert_close(prediction.variance, covariance.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(ours.functional_variance(x), covariance, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("estimator", ["kfac", "tkfac"])
@pytest.mark.parametrize("network", NETWORKS)
def test_parity_with_biases(network, estimator):
    """Our posterior's Fisher, with weights and biases taken apart, is theirs through our backend; so is the evidence.

    The evidences themselves differ: ours also has the terms between a layer's weights and its bias.
    """
    model, _, _, data = problem(NETWORKS[network]())
    ours = kl.KronLaplace(model, "classification", estimator).fit(data)
    theirs = fitted(model, data, estimator=estimator)
    fisher = separate(ours.fisher, model)
    assert_close(theirs.H_facs.to_matrix(), fisher, 1e-12)
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    for prior in PRIORS[1:]:
        log_det = torch.logdet(fisher + prior * torch.eye(len(fisher)).double()) - len(fisher) * math.log(prior)
        log_likelihood = ours.likelihood.log_likelihood(ours.fisher.statistics)
        evidence = log_likelihood - 0.5 * (log_det + prior * parameters.square().sum())
        apart = theirs.log_marginal_likelihood(double(prior))
        torch.testing.assert_close(apart, evidence, rtol=1e-10, atol=1e-8)
        if prior < 100:
            assert float((ours.log_marginal_likelihood(prior) - apart).abs()) > 1e-3
