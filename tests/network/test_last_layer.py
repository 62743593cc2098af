"""``layers="last"``: the layer whose output is the network's, found by running it; else an error that asks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.architectures import ARCHITECTURES
from tests.support.networks import CASES as NETWORKS


class Network(nn.Module):
    """``head`` is registered before ``body``; ``end`` is what happens after the body."""

    def __init__(self, end, head=None, **others):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3) if head is None else head
        for name, module in others.items():
            self.add_module(name, module)
        self.body = nn.Linear(4, 4)
        self.end = end
        self.double().eval()

    def forward(self, x):
        return self.end(self, torch.tanh(self.body(x)))


def several_times(self, h):
    return self.head(self.head(h)[:, :1] + h)


def of_tokens(self, h):
    return self.head(h[:, None].expand(-1, 5, -1))[:, -1]


def indexed(self, h):
    outputs = self.head(h[:, None].expand(-1, 5, -1))
    return outputs[torch.arange(len(h)), torch.arange(len(h)) % 5]


FOUND = {
    "as it is": lambda s, h: s.head(h),
    "viewed": lambda s, h: s.head(h).view(-1, 3, 1).transpose(1, 2).squeeze(1),
    "permuted": lambda s, h: s.head(h.view(-1, 1, 4)).permute(0, 2, 1).reshape(len(h), -1),
    "logits": lambda s, h: SimpleNamespace(logits=s.head(h)),
    "a dictionary": lambda s, h: {"logits": s.head(h)},
    "another dtype": lambda s, h: s.head(h).float(),
    "a copy": lambda s, h: s.head(h).t().contiguous().t(),
    "log-softmax": lambda s, h: s.head(h).log_softmax(1),
    "several times": several_times,
    "a token": of_tokens,
    "indexed": indexed,
    "without effect": lambda s, h: s.head(h + 0 * s.body(h)),
}
X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(7) % 3
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def assert_same(fisher, other):
    assert list(fisher) == list(other)
    for name in fisher:
        torch.testing.assert_close(fisher[name].to_dense(), other[name].to_dense(), rtol=1e-12, atol=0)
    assert fisher.coverage() == other.coverage()


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", FOUND)
def test_found_whatever_was_registered_last(name):
    model = Network(FOUND[name])
    fisher = kl.estimate_fisher(model, BATCHES, "classification", layers="last")
    assert_same(fisher, kl.estimate_fisher(model, BATCHES, "classification", layers=["head"]))
    everything = kl.estimate_fisher(model, BATCHES, "classification", sampling="exact")
    named = kl.KronLaplace(model, "classification", layers=["head"]).fit(BATCHES)
    for options in ({"data": BATCHES}, {"fisher": everything}, {"data": iter(BATCHES)}):
        posterior = kl.KronLaplace(model, "classification", layers="last").fit(**options)
        assert posterior.layers == ["head"]
        assert_same(posterior.fisher, named.fisher)
        torch.testing.assert_close(posterior.predict(X), named.predict(X))
        assert posterior.fit(BATCHES).layers == ["head"]


def derivative(self, h):
    """As of an energy, with respect to what goes into the head."""
    with torch.enable_grad():
        x = h.detach().requires_grad_()
        return torch.autograd.grad(self.head(x).square().sum(), x, create_graph=True)[0][:, :3]


SEVERAL = {
    "derivatives": (derivative, {}, "Derivatives inside the forward pass"),
    "multiplied": (lambda s, h: 2 * s.head(h), {}, r"an operation after the last layer \(Mul\)"),
    "a temperature": (
        lambda s, h: s.head(h) / s.temperature.weight.squeeze(),
        {"temperature": nn.Linear(1, 1, bias=False)},
        r"an operation after the last layer \(Div\)",
    ),
    "two heads": (
        lambda s, h: s.head(h) + s.other(h),
        {"other": nn.Linear(4, 3)},
        r"\(Add\).*the last candidates that ran are \['body', 'head', 'other'\]",
    ),
    "heads side by side": (
        lambda s, h: torch.cat([s.head(h), s.other(h)], 1),
        {"other": nn.Linear(4, 3)},
        r"after the last layer \(Cat\)",
    ),
    "a norm": (lambda s, h: s.norm(s.head(h)), {"norm": nn.LayerNorm(3)}, r"are those of 'norm' \(LayerNorm\)"),
    "frozen": (
        lambda s, h: s.frozen(s.head(h)),
        {"frozen": nn.Linear(3, 3).requires_grad_(False)},
        r"are those of 'frozen' \(Linear\), whose parameters are frozen",
    ),
    "no gradients": (
        lambda s, h: s.head(h).detach(),
        {},
        r"\(nothing that can be differentiated\)",
    ),
    "a mean": (lambda s, h: s.head(h[:, None]).mean(1), {}, r"\(Mean\)"),
    "in place": (lambda s, h: s.head(h).relu_(), {}, r"\(Relu\)"),
    "unsupported": (
        lambda s, h: s.odd(s.head(h)),
        {"odd": nn.PReLU()},
        r"are those of 'odd' \(PReLU\)",
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_asks_where_no_layer_is_the_last(name):
    end, modules, message = SEVERAL[name]
    model = Network(end, **modules)
    options = {"layers": "last", "unsupported": "fixed"}
    with pytest.raises(ValueError, match=message) as error:
        kl.estimate_fisher(model, BATCHES, "classification", **options)
    assert "Name the layer that you mean, layers=[...]" in str(error.value)
    assert "'head'" in str(error.value)
    posterior = kl.KronLaplace(model, "classification", **options)
    with pytest.raises(ValueError, match=message):
        posterior.fit(BATCHES)
    assert "layers=last" in repr(posterior)


def test_a_fisher_from_a_file(tmp_path):
    model = Network(FOUND["as it is"])
    kl.estimate_fisher(model, BATCHES, "classification").save(tmp_path / "fisher.safetensors")
    fisher = kl.KroneckerFisher.load(tmp_path / "fisher.safetensors")
    posterior = kl.KronLaplace(model, "classification", layers="last").fit(fisher=fisher)
    assert posterior.layers == ["head"]
    assert {row.note for row in posterior.fisher.coverage()} == {"", "left out by layers="}


def test_a_fisher_that_does_not_tell():
    end, modules, _ = SEVERAL["two heads"]
    model = Network(end, **modules)
    fisher = kl.estimate_fisher(model, BATCHES, "classification")
    with pytest.raises(ValueError, match=r"does not tell which layer.*name one of \['head', 'other', 'body'\]"):
        kl.KronLaplace(model, "classification", layers="last").fit(fisher=fisher)


class Tied(nn.Module):
    """An embedding whose table is the head, too, as in T5."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.body, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.shared.weight
        self.double().eval()

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.shared(tokens)).mean(1)))


def test_a_tied_head():
    tokens = torch.arange(12).view(4, 3) % 5
    data = [(tokens, torch.arange(4))]
    with pytest.raises(ValueError, match=r"those of 'head' \(Linear\), which shares its weight.*ran are \['body'\]"):
        kl.estimate_fisher(Tied(), data, "classification", layers="last")
    assert list(kl.estimate_fisher(Tied(), data, "classification", layers=["head"])) == ["shared"]


ENDS = {name: make for name, make in {**NETWORKS, **ARCHITECTURES}.items() if name != "language_model"}


@pytest.mark.quick(11)
@pytest.mark.parametrize("name", ENDS)
def test_architectures(name):
    """All but one of the architectures end with the layer that they name last."""
    made = ENDS[name]()
    fisher = kl.estimate_fisher(made.model, made.batches(), made.likelihood, "diagonal", sampling="mc", layers="last")
    assert list(fisher) == made.layers[-1:]


def test_a_convolution():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 1)).double().eval()
    data = [(torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.zeros(3, 4, 4, dtype=torch.long))]
    assert list(kl.estimate_fisher(model, data, "classification", layers="last")) == ["2"]


def test_before_the_fit(tmp_path):
    """What belongs to single weights is not known before the fit, and said so; one number is."""
    model = Network(FOUND["as it is"])
    posterior = kl.KronLaplace(model, "classification", layers="last", prior_precision=2.0)
    assert posterior.prior_precision == 2
    assert "layers=last" in repr(posterior)
    for ask in (lambda: posterior.layers, lambda: posterior.prior_mean):
        with pytest.raises(RuntimeError, match='layers="last" is found by the fit'):
            ask()
    posterior.to(torch.float64)
    posterior.prior_precision = 3.0
    posterior.fit(BATCHES)
    assert posterior.prior_precision == 3
    assert list(posterior.prior_mean) == ["head"]
    posterior.save(tmp_path / "posterior.safetensors")
    assert kl.KronLaplace.load(tmp_path / "posterior.safetensors", model).layers == ["head"]


def test_priors_of_single_weights():
    """They are taken when the layer is known."""
    model = Network(FOUND["as it is"])
    vector = torch.linspace(0.5, 2, 15, dtype=torch.float64)
    mean = {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}
    posterior = kl.KronLaplace(model, "classification", layers="last", prior_precision=vector, prior_mean=mean)
    with pytest.raises(RuntimeError, match='layers="last" is found by the fit'):
        _ = posterior.prior_precision
    named = kl.KronLaplace(model, "classification", layers=["head"], prior_precision=vector, prior_mean=mean)
    posterior.fit(BATCHES), named.fit(BATCHES)
    torch.testing.assert_close(posterior.log_marginal_likelihood(), named.log_marginal_likelihood())
    torch.testing.assert_close(posterior.prior_precision, named.prior_precision)
    wrong = kl.KronLaplace(model, "classification", layers="last", prior_precision=vector[1:])
    with pytest.raises(ValueError, match=r"prior_precision must be one number, 1 \(one per block\) or 15"):
        wrong.fit(BATCHES)


def test_mistakes():
    with pytest.raises(ValueError, match=r'layers="last" is a single layer, so exclude=.* does not apply'):
        kl.KronLaplace(Network(FOUND["as it is"]), "classification", layers="last", exclude="body")
    with pytest.raises(ValueError, match="the model has none with trainable parameters"):
        kl.KronLaplace(nn.Sequential(nn.LayerNorm(3)), "classification", layers="last")
    assert kl.KronLaplace(nn.ModuleDict({"last": nn.Linear(4, 3)}), "classification", layers=["last"]).layers == [
        "last"
    ]


def test_wrong_inputs_are_explained():
    """The pass that looks for the last layer says what is wrong as all others do."""
    with pytest.raises(ValueError, match=r"batch 0: .*\(4, 5\)"):
        kl.estimate_fisher(
            Network(FOUND["as it is"]), [(X[:4].repeat(1, 2)[:, :5], Y[:4])], "classification", layers="last"
        )


def test_nothing_is_left_on_the_model():
    model = Network(lambda s, h: s.head(h).relu_())
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="Name the layer"):
        kl.estimate_fisher(model, BATCHES, "classification", layers="last")
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules())
