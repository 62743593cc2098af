"""Posteriors with priors of every structure and mean, and the dense algebra that they must agree with.

The dense posterior precision is ``N/τ · F + diag(D)`` with ``F`` from `KroneckerFisher.to_dense` and ``D`` made here; the
Jacobians are autograd's.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn

import kronlaplace as kl
from tests.support import oracles
from tests.support.cases import select
from tests.support.problems import NETWORKS

ESTIMATORS = ["kfac", "tkfac", "ekfac", "diagonal", "exact"]
STRUCTURES = ["scalar", "layerwise", "vector", "dict"]
LIKELIHOODS = {
    "classification": lambda: kl.Categorical(),
    "binary": lambda: kl.Bernoulli(),
    "regression": lambda: kl.Gaussian(0.6, noise_known=False),
    "heteroscedastic": lambda: kl.HeteroscedasticGaussian(),
}
SMALL = ["mlp", "cnn"]
LARGER = ["norms", "lstm", "depthwise"]
TEMPERATURE = 0.7
RTOL = 1e-8


@dataclass
class Problem:
    """A network with data and all that the oracles know about it."""

    model: nn.Module
    inputs: object
    targets: torch.Tensor
    name: str
    blocks: dict

    @property
    def likelihood(self):
        return LIKELIHOODS[self.name]()

    def data(self, start=0, stop=None, size=2):
        """Some of the examples in batches."""
        order = torch.arange(len(self.targets))[start:stop]
        return [(select(self.inputs, part), self.targets[part]) for part in order.split(size)]

    def posterior(self, estimator="kfac", **options):
        return kl.KronLaplace(self.model, self.likelihood, estimator, **options)

    def fitted(self, estimator="kfac", **options):
        return self.posterior(estimator, **options).fit(self.data())


@functools.cache
def problem(network, likelihood="classification"):
    torch.manual_seed(0)
    kind = "regression" if likelihood == "heteroscedastic" else likelihood
    made = NETWORKS[network](kind, outputs=4) if network in SMALL else NETWORKS[network](kind)
    targets = made.targets[:, :2] if likelihood == "heteroscedastic" else made.targets
    return Problem(made.model, made.inputs, targets, likelihood, oracles.blocks(made.model))


@functools.cache
def outputs_and_jacobians(network, likelihood="classification"):
    """Of all examples: the outputs flattened, (N, C), and their derivative by all blocks in their order, (N, C, P)."""
    made = problem(network, likelihood)
    examples = [oracles.example(made.inputs, n) for n in range(len(made.targets))]
    rows = [oracles.weight_gradients(made.model, x) for x in examples]
    jacobians = torch.stack([torch.cat([x.flatten(1) for x in row.values()], dim=1) for row in rows])
    return torch.cat([made.model(x).detach().flatten(1) for x in examples]), jacobians


def joined(values, blocks):
    """Values of the parameters as the row-major matrices of all blocks joined, (P,); a second bias is left out."""
    return torch.cat(
        [torch.cat([values[p].reshape(b.q, -1) for p in b.parameters], dim=1).flatten() for b in blocks.values()]
    )


def weights(made):
    """``θ``, (P,), where two biases act through their sum."""
    values = {name: p.detach() for name, p in made.model.named_parameters()}
    return joined({**values, **summed_biases(values, made.blocks)}, made.blocks)


def summed_biases(values, blocks):
    """For recurrent blocks with two biases: their sum under the name of the first."""
    firsts = [b.parameters[2] for b in blocks.values() if len(b.parameters) == 3]
    return {name: values[name] + values[name.replace("bias_ih", "bias_hh")] for name in firsts}


def sizes(made):
    return [len(joined({p: made.model.get_parameter(p) for p in b.parameters}, {"": b})) for b in made.blocks.values()]


def some_prior(made, structure, seed=3):
    """A prior precision as the library takes it, and as ``D``, (P,)."""
    generator = torch.Generator().manual_seed(seed)
    n = sizes(made)
    if structure == "scalar":
        return 0.4, torch.full((sum(n),), 0.4, dtype=torch.float64)
    if structure == "layerwise":
        deltas = [0.3 + 0.2 * i for i in range(len(n))]
        return deltas, torch.cat([torch.full((k,), d, dtype=torch.float64) for k, d in zip(n, deltas, strict=True)])
    if structure == "vector":
        vector = 0.1 + 3 * torch.rand(sum(n), generator=generator, dtype=torch.float64)
        return vector, vector
    values = {
        name: 0.1 + 3 * torch.rand(p.shape, generator=generator, dtype=torch.float64)
        for name, p in made.model.named_parameters()
    }
    return values, joined(values, made.blocks)


def some_mean(made, form, seed=4):
    """A prior mean as the library takes it, and flat, (P,)."""
    generator = torch.Generator().manual_seed(seed)
    if form == "number":
        return 0.3, torch.full((sum(sizes(made)),), 0.3, dtype=torch.float64)
    if form == "flat":
        flat = torch.randn(sum(sizes(made)), generator=generator, dtype=torch.float64)
        return flat, flat
    state = {
        name: torch.randn(t.shape, generator=generator, dtype=torch.float64)
        for name, t in made.model.state_dict().items()
    }
    return state, joined({**state, **summed_biases(state, made.blocks)}, made.blocks)


def dense_precision(posterior, D):
    """``N/τ · F + diag(D)``."""
    fisher = posterior.fisher
    return fisher.to_dense() * fisher.n_examples / posterior.temperature + torch.diag(D)


def log_likelihood(made, noise_std=0.6):
    if made.name != "heteroscedastic":
        return oracles.log_likelihood(made.model, made.inputs, made.targets, made.name, noise_std)
    mean, log_variance = made.model(made.inputs).detach().chunk(2, dim=1)
    return torch.distributions.Normal(mean, (log_variance / 2).exp()).log_prob(made.targets).sum()


def dense_evidence(made, posterior, D, mean):
    deviation = weights(made) - mean
    return (
        log_likelihood(made) / posterior.temperature
        - 0.5 * (D * deviation**2).sum()
        - 0.5 * (torch.logdet(dense_precision(posterior, D)) - D.log().sum())
    )


def assert_like_dense(made, posterior, D, mean, jacobians):
    expected = dense_evidence(made, posterior, D, mean)
    torch.testing.assert_close(posterior.log_marginal_likelihood(), expected, rtol=RTOL, atol=0)
    expected = jacobians @ torch.linalg.inv(dense_precision(posterior, D)) @ jacobians.mT
    scale = float(expected.abs().max())
    torch.testing.assert_close(posterior.functional_variance(made.inputs), expected, rtol=RTOL, atol=RTOL * scale)
    expected = expected.diagonal(dim1=1, dim2=2)
    actual = posterior.functional_variance(made.inputs, diagonal=True)
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=RTOL * scale)


def same(first, second, made, rtol=1e-12):
    """Whether two posteriors agree in the evidence, predictions and samples."""
    torch.testing.assert_close(
        first.log_marginal_likelihood(), second.log_marginal_likelihood(), rtol=max(rtol, 1e-10), atol=0
    )
    torch.testing.assert_close(
        first.functional_variance(made.inputs), second.functional_variance(made.inputs), rtol=rtol, atol=rtol
    )
    for a, b in zip(first.sample(2).values(), second.sample(2).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=max(rtol, 1e-8), atol=max(rtol, 1e-8))
