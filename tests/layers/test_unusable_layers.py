"""Layers of which only the data show that they cannot have a block: kept at their trained values, or refused by name.

The oracle is the Fisher of the same network with ``layers=`` of the others.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import kronlaplace as kl


class Network(nn.Module):
    """Two layers, ``body`` and ``head``, and a third, ``odd``, of which the forward pass makes some strange use."""

    def __init__(self, odd, use):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.odd, self.head = nn.Linear(4, 4), odd, nn.Linear(4, 3)
        self.use = use
        self.double().eval()

    def forward(self, x):
        return self.head(self.use(self, torch.tanh(self.body(x))))


def never_called(self, h):
    return h


def as_a_function(self, h):
    return h + F.linear(h, self.odd.weight)


def also_as_a_function(self, h):
    return self.odd(h) + F.linear(h, self.odd.weight)


def unused_head(self, h):
    self.auxiliary = self.odd(h)
    return h


def under_no_grad(self, h):
    with torch.no_grad():
        change = self.odd(h)
    return h + change


def detached(self, h):
    return h + self.odd(h).detach()


def expert(self, h):
    """Half of the examples, chosen by what they are, go through the expert."""
    chosen = (h[:, 0] > h[:, 0].median()).nonzero().squeeze(1)
    return h.index_add(0, chosen, self.odd(h[chosen]))


def packed(self, h):
    lengths = torch.full((len(h),), 2)
    sequences = pack_padded_sequence(h.reshape(len(h), 2, 2), lengths, batch_first=True)
    return self.odd(sequences)[1][0][0]


NOT_CALLED = "its module is not called: a function uses its parameters, or nothing does"
NO_EFFECT = "the network's outputs do not depend on it"
CASES = {
    "never called": (never_called, nn.Linear, NOT_CALLED),
    "as a function": (as_a_function, nn.Linear, NOT_CALLED),
    "also as a function": (
        also_as_a_function,
        nn.Linear,
        "its parameters are also used by a function, or a hook changed it",
    ),
    "unused head": (unused_head, nn.Linear, NO_EFFECT),
    "no grad": (under_no_grad, nn.Linear, "it runs without gradients, inside torch.no_grad() for example"),
    "detached": (detached, nn.Linear, NO_EFFECT),
    "expert": (
        expert,
        nn.Linear,
        "it does not see a fixed number of rows per example, like an expert that sees only part of the batch",
    ),
    "packed": (packed, lambda *_: nn.LSTM(2, 4, batch_first=True), "packed sequences are not supported"),
}
X = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(9) % 3
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]
OTHERS = ["body", "head"]


def network(name):
    use, odd, reason = CASES[name]
    return Network(odd(4, 4), use), reason


def assert_same_blocks(fisher, other):
    assert list(fisher) == list(other)
    for name in fisher:
        torch.testing.assert_close(fisher[name].to_dense(), other[name].to_dense(), rtol=1e-12, atol=0)


def assert_told(coverage, reason):
    """The odd layer's parameters are all there, without a block, and for this reason."""
    rows = [row for row in coverage if row.layer.startswith("odd")]
    assert {row.note for row in rows} == {reason}
    assert all(row.shape is None and row.block == "none" for row in rows)
    assert sum(row.share for row in coverage) == pytest.approx(1)


@pytest.mark.parametrize("estimator", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", CASES)
def test_they_stay_fixed_on_request(name, estimator):
    model, reason = network(name)
    fisher = kl.estimate_fisher(model, BATCHES, "classification", estimator, unsupported="fixed")
    assert_told(fisher.coverage(), reason)
    assert_same_blocks(fisher, kl.estimate_fisher(model, BATCHES, "classification", estimator, layers=OTHERS))


@pytest.mark.parametrize("fit", ["estimate_fisher", "KronLaplace"])
@pytest.mark.parametrize("name", CASES)
def test_or_are_refused_with_the_ways_out(name, fit):
    model, _ = network(name)
    with pytest.raises(
        NotImplementedError, match=r"odd.*leave these layers out with exclude=\['odd.*freeze.*unsupported=\"fixed\""
    ):
        if fit == "KronLaplace":
            kl.KronLaplace(model, "classification", unsupported="error").fit(BATCHES)
        else:
            kl.estimate_fisher(model, BATCHES, "classification", unsupported="error")


PRIORS = {
    "scalar": lambda layers: 0.7,
    "layerwise": lambda layers: [0.5 + i for i in range(len(layers))],
    "vector": lambda layers: torch.linspace(0.5, 2, sum(map(math.prod, layers.values())), dtype=torch.float64),
}


def cut(value, layers):
    """A prior for all layers (name to shape), cut down to the others by hand."""
    if isinstance(value, float):
        return value
    if len(value) == len(layers):
        return [v for v, name in zip(value, layers, strict=True) if name in OTHERS]
    parts = value.split([math.prod(shape) for shape in layers.values()])
    return torch.cat([part for part, name in zip(parts, layers, strict=True) if name in OTHERS])


def same(posterior, other):
    torch.testing.assert_close(posterior.prior_precision, other.prior_precision)
    assert posterior.prior_mean.keys() == other.prior_mean.keys() == set(OTHERS)
    for name in OTHERS:
        torch.testing.assert_close(posterior.prior_mean[name], other.prior_mean[name])
    torch.testing.assert_close(posterior.log_marginal_likelihood(), other.log_marginal_likelihood())
    torch.testing.assert_close(posterior.functional_variance(X), other.functional_variance(X))
    torch.testing.assert_close(posterior.predict(X), other.predict(X))
    for name, draws in other.sample(2).items():
        torch.testing.assert_close(posterior.sample(2)[name], draws)


@pytest.mark.quick(1)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", CASES)
def test_posterior_is_that_of_the_other_layers(name, prior, tmp_path):
    model, reason = network(name)
    posterior = kl.KronLaplace(model, "classification", unsupported="fixed")
    shapes = {layer: tuple(mean.shape) for layer, mean in posterior.prior_mean.items()}
    assert any(layer.startswith("odd") for layer in shapes)
    precision, mean = PRIORS[prior](shapes), PRIORS["vector"](shapes)
    posterior = kl.KronLaplace(
        model, "classification", prior_precision=precision, prior_mean=mean, unsupported="fixed"
    ).fit(BATCHES)
    other = kl.KronLaplace(
        model, "classification", prior_precision=cut(precision, shapes), prior_mean=cut(mean, shapes), layers=OTHERS
    ).fit(BATCHES)
    assert posterior.layers == OTHERS
    assert_told(posterior.fisher.coverage(), reason)
    same(posterior, other)
    same(posterior.fit(BATCHES), other)  # once more
    assert_told(posterior.fisher.coverage(), reason)
    posterior.fit(BATCHES[:1]).fit(BATCHES[1:], add=True)
    assert_told(posterior.fisher.coverage(), reason)
    same(posterior, other)
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = kl.KronLaplace.load(tmp_path / "posterior.safetensors", model)
    assert_told(loaded.fisher.coverage(), reason)
    same(loaded, other)
    same(posterior.tune(structure="layerwise"), other.tune(structure="layerwise"))


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", CASES)
def test_ready_made_fisher(name):
    model, reason = network(name)
    fisher = kl.estimate_fisher(model, BATCHES, "classification", sampling="exact", unsupported="fixed")
    posterior = kl.KronLaplace(model, "classification", unsupported="fixed").fit(fisher=fisher)
    assert_told(posterior.fisher.coverage(), reason)
    same(posterior, kl.KronLaplace(model, "classification", layers=OTHERS).fit(BATCHES))
    with pytest.raises(ValueError, match=r"odd.*: (.|\n)*unsupported=\"fixed\""):
        kl.KronLaplace(model, "classification", unsupported="error").fit(fisher=fisher)


def test_ready_made_fisher_that_could_have_the_layers():
    """A Fisher of fewer layers, by choice, is not one of a network in which the others are unusable."""
    model, _ = network("never called")
    fisher = kl.estimate_fisher(model, BATCHES, "classification", layers=["head"])
    with pytest.raises(ValueError, match=r"no blocks for the layers \['body', 'odd'\] of the posterior"):
        kl.KronLaplace(model, "classification", unsupported="fixed").fit(fisher=fisher)


def test_layers_that_only_a_later_batch_or_fit_shows():
    """The oracle: what is left out at the end has no block, and the others have all of the data."""

    def sometimes(self, h):
        return self.odd(h) if len(h) == 5 else h

    model = Network(nn.Linear(4, 4), sometimes)
    others = kl.KronLaplace(model, "classification", layers=OTHERS).fit(BATCHES)
    posterior = kl.KronLaplace(model, "classification", unsupported="fixed")
    same(posterior.fit(BATCHES), others)

    posterior = kl.KronLaplace(model, "classification", unsupported="fixed")
    assert posterior.fit(BATCHES[:1]).layers == ["body", "odd", "head"]
    same(posterior.fit(BATCHES[1:], add=True), others)  # the first fit's block of it is dropped
    assert_told(posterior.fisher.coverage(), NOT_CALLED)
    assert posterior.fit(BATCHES[:1]).layers == OTHERS  # and does not come back
    assert_told(posterior.fisher.coverage(), NOT_CALLED)


def test_a_fit_that_fails_changes_nothing():
    def only_body(self, h):
        return self.odd(h) if len(h) == 5 else h

    model = Network(nn.Linear(4, 4), only_body)
    posterior = kl.KronLaplace(model, "classification", prior_precision=[1.0, 2.0, 3.0], unsupported="fixed")
    with pytest.raises(ValueError, match="batch 1"):
        posterior.fit([*BATCHES[1:], (X * torch.nan, Y)])
    assert posterior.layers == ["body", "odd", "head"]
    assert posterior.prior_precision.tolist() == [1.0, 2.0, 3.0]
    assert posterior.fit(BATCHES[:1]).layers == ["body", "odd", "head"]


def test_training_by_the_evidence():
    model, reason = network("unused head")
    result = kl.train_by_evidence(
        model, BATCHES, "classification", epochs=4, every=1, structure="layerwise", unsupported="fixed"
    )
    assert result.posterior.layers == OTHERS
    assert len(result.posterior.prior_precision) == 2
    assert_told(result.posterior.fisher.coverage(), reason)


def test_nothing_is_left():
    model, _ = network("never called")
    model.requires_grad_(False)
    model.odd.requires_grad_(True)
    with pytest.raises(NotImplementedError, match=rf"no layer can have a block:\n  odd: {NOT_CALLED}"):
        kl.KronLaplace(model, "classification", unsupported="fixed").fit(BATCHES)
