"""Validation data, and validation written out as a loop."""

import torch

import kronlaplace as kl


def shifted(made, seed=5, n=9):
    """Validation data: other inputs, other targets."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(made.targets), (n,), generator=generator)
    x = made.inputs[index] + 0.3 * torch.randn(n, *made.inputs.shape[1:], generator=generator, dtype=torch.float64)
    y = made.targets[torch.randint(len(made.targets), (n,), generator=generator)]
    return x, y


def independent_nll(made, precision, x, y, predictive, **options):
    """Mean negative log-likelihood of a posterior made with this precision, with nothing of the library's scores."""
    posterior = made.fitted(prior_precision=precision, **options)
    p = posterior.predict(
        x,
        method=predictive.method,
        link=predictive.link,
        n_samples=predictive.n_samples,
        diagonal=predictive.diagonal,
        antithetic=predictive.antithetic,
        seed=predictive.seed,
    )
    if isinstance(p, kl.Prediction):
        return -kl.metrics.gaussian_log_likelihood(p.mean, p.total_variance, y)
    if made.name == "binary":
        return float(torch.nn.functional.binary_cross_entropy(p, y))
    if p.ndim == 2:
        return kl.metrics.negative_log_likelihood(p, y)
    flat, labels = p.reshape(-1, p.shape[-1]), y.flatten()
    keep = labels != -100
    return kl.metrics.negative_log_likelihood(flat[keep], labels[keep])


PREDICTIVES = {
    "default": kl.Predictive(),
    "probit": kl.Predictive(link="probit"),
    "mc": kl.Predictive(link="mc", n_samples=30, seed=2),
    "mc, diagonal": kl.Predictive(link="mc", n_samples=30, diagonal=True),
    "bridge": kl.Predictive(link="bridge"),
    "sample": kl.Predictive(method="sample", n_samples=6, seed=3),
    "antithetic": kl.Predictive(method="sample", n_samples=6, antithetic=True),
}
GRID = [1e-2, 0.1, 0.5, 2.0, 10.0, 100.0, 1e4]
