"""A softmax or sigmoid at the network's end is refused where the likelihood makes the probabilities itself."""

import pytest
import torch
from torch import nn

import kronlaplace as kl

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CLASSES = torch.arange(6) % 3
BITS = (torch.arange(18).reshape(6, 3) % 2).double()
TARGETS = {"classification": CLASSES, "binary": BITS, "regression": BITS}


class Network(nn.Module):
    """A linear layer, and what comes after it."""

    def __init__(self, end, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)
        for name, module in modules.items():
            self.add_module(name, module)
        self.end = end
        self.double().eval()

    def forward(self, x):
        return self.end(self, self.body(x))


def sequential(*modules):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), *modules).double().eval()


def with_attention(self, h):
    """A softmax inside, and the module of the same kind at the end."""
    return self.act(self.act(h) * h)


REFUSED = {
    "softmax module": (sequential(nn.Softmax(1)), "classification", r"with module '1' \(Softmax\).*Remove '1'"),
    "softmax function": (
        Network(lambda s, h: h.softmax(1)),
        "classification",
        r"with a softmax in its forward.*Return the input of the softmax from the forward",
    ),
    "squeezed": (Network(lambda s, h: h[:, None].softmax(-1).squeeze(1)), "classification", "with a softmax in"),
    "another dtype": (Network(lambda s, h: h.softmax(1).float()), "classification", "with a softmax in"),
    "module and view": (
        Network(lambda s, h: s.act(h[..., None])[..., 0].clone(), act=nn.Softmax(1)),
        "classification",
        r"with module 'act' \(Softmax\)",
    ),
    "used twice": (Network(with_attention, act=nn.Softmax(1)), "classification", r"with module 'act' \(Softmax\)"),
    "module inside, function at the end": (
        Network(lambda s, h: (s.act(h) * h).softmax(1), act=nn.Softmax(1)),
        "classification",
        "with a softmax in its forward",
    ),
    "sigmoid module": (
        sequential(nn.Sigmoid()),
        "binary",
        r"with module '1' \(Sigmoid\), and Bernoulli\(\) takes logits",
    ),
    "sigmoid function": (Network(lambda s, h: torch.sigmoid(h)), "binary", "with a sigmoid in its forward"),
    "sigmoid in place": (Network(lambda s, h: (h + 0).sigmoid_()), "binary", "with a sigmoid in its forward"),
    "sigmoid for classes": (sequential(nn.Sigmoid()), "classification", r"module '1' \(Sigmoid\)"),
    "softmax for bits": (sequential(nn.Softmax(1)), "binary", r"module '1' \(Softmax\)"),
    "log-softmax for bits": (sequential(nn.LogSoftmax(1)), "binary", r"module '1' \(LogSoftmax\)"),
    "log-sigmoid": (sequential(nn.LogSigmoid()), "binary", r"module '1' \(LogSigmoid\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    model, likelihood, message = REFUSED[name]
    data = [(X, TARGETS[likelihood])]
    for inputs in (data, [X]):
        with pytest.raises(ValueError, match=message):
            kl.estimate_fisher(model, inputs, likelihood)
    with pytest.raises(ValueError, match=message):
        kl.KronLaplace(model, likelihood).fit(data)


ALLOWED = {
    "softmax inside": (Network(lambda s, h: h.softmax(1) * h), "classification"),
    "sigmoid before the last layer": (sequential(nn.Sigmoid(), nn.Linear(3, 3)), "binary"),
    "softmax before the last layer": (sequential(nn.Softmax(1), nn.Linear(3, 3)), "classification"),
    "a regression": (sequential(nn.Sigmoid()), "regression"),
    "a regression to frequencies": (sequential(nn.Softmax(1)), "regression"),
    "the sum of two": (Network(lambda s, h: h + h.softmax(1)), "classification"),
    "log-softmax": (sequential(nn.LogSoftmax(1)), "classification"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_no_false_alarm(name):
    model, likelihood = ALLOWED[name]
    kl.KronLaplace(model, likelihood).fit([(X, TARGETS[likelihood])]).predict(X)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.double().eval()

    def forward(self, x):
        h = x[:, None] * torch.arange(1.0, 4.0, dtype=x.dtype).view(1, 3, 1)
        h = h + self.attention(h, h, h)[0]
        weights = (self.query(h) @ self.key(h).transpose(1, 2)).softmax(-1)
        return self.head((weights @ self.value(h)).mean(1))


def test_softmax_of_attention():
    kl.KronLaplace(Attention(), "classification").fit([(X, CLASSES)])


@pytest.mark.quick(1)
@pytest.mark.parametrize("sampling", ["exact", "empirical"])
@pytest.mark.filterwarnings("ignore:sampling=")
def test_log_softmax_has_the_same_fisher_evidence_and_draws(sampling):
    """The oracle: the same network without it, whose Fisher and evidence are the same; and all that is invariant to a
    common shift of the logits.
    """
    logits, normalized = sequential(), sequential(nn.LogSoftmax(1))
    data = [(X, CLASSES)]
    one, other = (
        kl.KronLaplace(model, "classification", "exact").fit(data, sampling=sampling) for model in (logits, normalized)
    )
    torch.testing.assert_close(one.fisher.to_dense(), other.fisher.to_dense(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(one.log_marginal_likelihood(), other.log_marginal_likelihood())
    for options in ({"link": "centered-probit"}, {"method": "sample", "seed": 3}, {"link": "bridge"}):
        torch.testing.assert_close(one.predict(X, **options), other.predict(X, **options))
    many = {"link": "mc", "n_samples": 20000}
    torch.testing.assert_close(one.predict(X, **many), other.predict(X, **many), rtol=0, atol=0.02)
