"""Networks with data for laplace-torch, and its posteriors with our backend or its own."""

import pytest

from experiments.peers import laplace_torch

try:
    laplace = laplace_torch()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
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
