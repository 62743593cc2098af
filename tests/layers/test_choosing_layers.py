"""Which modules get a block: names, patterns, exclude=, and the last layer."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.architectures import ARCHITECTURES


class Encoder(nn.Module):
    """Two blocks with a query, a value and a norm each, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        parts = {"query": lambda: nn.Linear(4, 4), "value": lambda: nn.Linear(4, 4), "norm": lambda: nn.LayerNorm(4)}
        self.encoder = nn.ModuleList(nn.ModuleDict({k: make() for k, make in parts.items()}) for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.double().eval()

    def forward(self, x):
        for block in self.encoder:
            x = block["norm"](torch.tanh(block["query"](x)) * block["value"](x))
        return self.head(x)


X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(7) % 3
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]
ALL = [f"encoder.{i}.{part}" for i in range(2) for part in ("query", "value", "norm")] + ["head"]
QUERIES = ["encoder.0.query", "encoder.1.query"]
CHOICES = {
    "a pattern": ({"layers": "encoder.*.query"}, QUERIES),
    "a name": ({"layers": "head"}, ["head"]),
    "names and patterns": ({"layers": ["head", "*.query"]}, [*QUERIES, "head"]),
    "patterns that overlap": ({"layers": ["*.query", "encoder.0.*"]}, [*ALL[:3], "encoder.1.query"]),
    "a class of characters": ({"layers": "encoder.[!0].value"}, ["encoder.1.value"]),
    "an order of their own": ({"layers": ["head", "encoder.0.query"]}, ["encoder.0.query", "head"]),
    "all but": ({"exclude": "encoder.*"}, ["head"]),
    "all but some": ({"exclude": ["head", "*.norm", "*.value"]}, QUERIES),
    "both": ({"layers": "encoder.*", "exclude": ["*.norm", "encoder.1.*"]}, ALL[:2]),
}


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", CHOICES)
def test_names_patterns_and_exclude(name):
    options, expected = CHOICES[name]
    model = Encoder()
    fisher = kl.estimate_fisher(model, BATCHES, "classification", **options)
    assert list(fisher) == expected
    named = kl.estimate_fisher(model, BATCHES, "classification", layers=expected)
    for layer in expected:
        torch.testing.assert_close(fisher[layer].to_dense(), named[layer].to_dense(), rtol=1e-12, atol=0)
    posterior = kl.KronLaplace(model, "classification", **options)
    assert posterior.layers == expected
    assert list(posterior.fit(BATCHES).fisher) == expected
    assert list(posterior.prior_mean) == expected


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", CHOICES)
def test_coverage_says_which_argument_it_was(name):
    options, expected = CHOICES[name]
    excluded = set(ALL) - set(expected)
    if "layers" in options:  # exclude= says more
        excluded = (
            {"encoder.0.norm", "encoder.1.query", "encoder.1.value", "encoder.1.norm"} if name == "both" else set()
        )
    for fisher in (
        kl.estimate_fisher(Encoder(), BATCHES, "classification", **options),
        kl.KronLaplace(Encoder(), "classification", **options).fit(BATCHES).fisher,
    ):
        rows = [row for row in fisher.coverage() if row.shape is None]
        assert {row.layer for row in rows} == set(ALL) - set(expected)
        for row in rows:
            assert row.note == f"left out by {'exclude' if row.layer in excluded else 'layers'}="
        assert sum(row.parameters for row in fisher.coverage()) == sum(p.numel() for p in Encoder().parameters())


def test_ready_made_fisher_keeps_the_reasons():
    model = Encoder()
    fisher = kl.estimate_fisher(model, BATCHES, "classification")
    posterior = kl.KronLaplace(model, "classification", layers="*.query", exclude="encoder.1.*").fit(fisher=fisher)
    notes = {row.layer: row.note for row in posterior.fisher.coverage()}
    assert notes["encoder.0.query"] == ""
    assert notes["encoder.1.query"] == "left out by exclude="
    assert notes["head"] == "left out by layers="


MISTAKES = {
    "a pattern for nothing": (
        {"layers": "decoder.*"},
        ValueError,
        r"layers: no module with trainable parameters of its own matches 'decoder\.\*'; available names are \['encoder",
    ),
    "case": ({"layers": "ENCODER.*"}, ValueError, "matches 'ENCODER"),
    "nothing to exclude": ({"exclude": ["*.key"]}, ValueError, r"exclude: no module .* matches '\*\.key'"),
    "unknown": (
        {"exclude": "tail"},
        ValueError,
        r"exclude: the model has no module 'tail'; the modules with trainable",
    ),
    "a container": (
        {"layers": "encoder.0"},
        ValueError,
        r"layers: module 'encoder\.0' \(ModuleDict\) has no trainable parameters of its own; use 'encoder\.0\.\*' for all "
        r"modules inside it, or some of \['encoder\.0\.query'",
    ),
    "twice": ({"exclude": ["head", "head"]}, ValueError, "exclude contains duplicates"),
    "all": ({"exclude": "*"}, ValueError, r"exclude=.*leaves no layer"),
    "all of those": ({"layers": ["head"], "exclude": ["head"]}, ValueError, r"exclude=.*leaves no layer"),
    "no strings": ({"layers": [3]}, TypeError, "layers must be a module name or a pattern .*; got 3"),
    "no list": ({"exclude": 3}, TypeError, "exclude must be a module name or a pattern .*; got 3"),
    "a module": ({"layers": [nn.Linear(1, 1)]}, TypeError, "layers must be a module name.*; got Linear"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    options, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        kl.KronLaplace(Encoder(), "classification", **options)
    with pytest.raises(error, match=message):
        kl.estimate_fisher(Encoder(), BATCHES, "classification", **options)


def test_names_win_over_patterns():
    """A module whose name reads as a pattern is that module."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double().eval()
    model.add_module("[0]", nn.Linear(3, 3).double())
    assert kl.KronLaplace(model, "classification", layers=["[0]"]).layers == ["[0]"]
    del model._modules["[0]"]
    assert kl.KronLaplace(model, "classification", layers=["[0]"]).layers == ["0"]


def test_exclude_is_a_way_out_for_what_is_unsupported():
    model = nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 3)).double().eval()
    with pytest.raises(NotImplementedError, match=r"1 \(PReLU\)(.|\n)*exclude=\[\.\.\.\]"):
        kl.KronLaplace(model, "classification", unsupported="error")
    posterior = kl.KronLaplace(model, "classification", exclude="1").fit(BATCHES)
    assert posterior.layers == ["0", "2"]
    assert {row.note for row in posterior.fisher.coverage()} == {"", "left out by exclude="}
    with pytest.raises(NotImplementedError, match=r"1 \(PReLU\)"):
        kl.KronLaplace(model, "classification", layers="*", unsupported="error")


def test_single_blocks_of_a_module():
    """The other blocks of the same module are listed as left out."""
    made = ARCHITECTURES["lstm"]()
    everything = kl.estimate_fisher(made.model, made.batches(), "classification")
    blocks = [name for name in everything if name.startswith("lstm")]
    assert len(blocks) > 2
    some = kl.estimate_fisher(made.model, made.batches(), "classification", exclude=blocks[:-1])
    assert list(some) == ["embedding", blocks[-1], "head"]
    (left,) = [row for row in some.coverage() if row.shape is None]
    assert left.layer == "lstm"
    assert left.note == "left out by exclude="
    assert sum(row.share for row in some.coverage()) == pytest.approx(1)
    assert list(kl.estimate_fisher(made.model, made.batches(), "classification", layers="lstm.*")) == blocks


def test_modules_that_share_a_weight_are_excluded_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double().eval()
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    assert kl.KronLaplace(model, "classification").layers == ["0", "3"]
    assert kl.KronLaplace(model, "classification", exclude="2").layers == ["3"]
    assert kl.KronLaplace(model, "classification", layers="2").layers == ["0"]
