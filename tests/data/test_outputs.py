"""Which tensor is the output of a network that returns several, and how to choose it."""

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.assertions import assert_close
from tests.support.inputs import WithLogits, fisher_of

X, Y = torch.randn(5, 5).double(), torch.tensor([0, 1, 2, 1, 0])


@dataclasses.dataclass
class Record:
    scores: Any
    features: Any = None


Pair = namedtuple("Pair", "scores features")

LOSS = torch.zeros(()).double()
CLEAR = {
    "tuple": lambda f: (f,),
    "beside nothing": lambda f: (f, None, 1.0),
    "beside a number": lambda f: {"loss": LOSS, "scores": f},
    "list": lambda f: [LOSS, f],
    "dataclass": Record,
    "named tuple": lambda f: Pair(f, None),
    "dataclass with logits": lambda f: dataclasses.make_dataclass("Out", ["logits", "hidden"])(f, f),
}
SEVERAL = {
    "first of a tuple": (lambda f: (f, 2 * f), 0),
    "last of a tuple": (lambda f: (2 * f, f), -1),
    "key": (lambda f: {"scores": f, "features": 2 * f}, "scores"),
    "index of a mapping": (lambda f: {"features": 2 * f, "scores": f}, 1),
    "field": (lambda f: Record(f, 2 * f), "scores"),
    "name in a tuple": (lambda f: Pair(f, 2 * f), "scores"),
    "function": (lambda f: {"heads": [f, 2 * f]}, lambda returned: returned["heads"][0]),
    "other than logits": (lambda f: {"logits": 2 * f, "scores": f}, "scores"),
    "a part of a tensor": (lambda f: torch.cat([f, f], 1), lambda returned: returned[:, :3]),
}


def check(model, inner):
    actual, expected = fisher_of(model, [(X, Y)]), fisher_of(inner, [(X, Y)])
    assert [name.removeprefix("inner.") for name in actual] == list(expected)
    assert_close(actual.to_dense(), expected.to_dense(), 1e-12)


@pytest.mark.parametrize("form", CLEAR)
def test_the_only_tensor_is_the_output(form):
    model = WithLogits(CLEAR[form])
    check(model, model.inner)


@pytest.mark.parametrize("form", SEVERAL)
def test_the_output_is_chosen(form):
    make, output = SEVERAL[form]
    model = WithLogits(make)
    returned = type(model(X))
    view = kl.with_output(model, output)
    check(view, model.inner)
    assert type(view) is WithLogits and type(model(X)) is returned and not model._forward_hooks
    posterior = kl.KronLaplace(view, "classification").fit([(X, Y)]).tune()
    plain = kl.KronLaplace(model.inner, "classification").fit([(X, Y)]).tune()
    torch.testing.assert_close(posterior.predict(X), plain.predict(X))


def test_a_view_shares_everything_and_is_trained():
    model = WithLogits(lambda f: (f, 2 * f))
    view = kl.with_output(nn.DataParallel(model), 0)
    assert [name for name, _ in view.named_parameters()] == [name for name, _ in model.named_parameters()]
    before = model.inner.head.weight.clone()
    optimizer = kl.AdaptiveKFAC(view, "classification")  # which runs the network itself, too
    assert not model._forward_hooks and not model._forward_pre_hooks
    for _ in range(2):
        optimizer.zero_grad()
        outputs = view(X)
        optimizer.update_curvature(outputs)
        nn.functional.cross_entropy(outputs, Y).backward()
        optimizer.step()
    assert not torch.equal(model.inner.head.weight, before)
    assert view.inner.head.weight is model.inner.head.weight
    assert view.float().inner.head.weight.dtype == model.inner.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda f: (f, 2 * f),
            r"it is not clear which tensor is the output: the model returned tuple with \{0: Tensor \(5, 3\), 1: Tensor "
            r"\(5, 3\)\}\. Choose one by its key or index, kl.with_output\(model, 0\)",
        ),
        (lambda f: {"a": f, "b": f}, r"dict with \{'a': .*kl.with_output\(model, 'a'\)"),
        (
            lambda f: Record((f,)),
            r"it returned Record with \{'scores': tuple, 'features': NoneType\}, without a tensor",
        ),
        (lambda f: 3, r"it returned int, without a tensor among its parts"),
    ],
)
def test_an_output_that_is_not_clear(make, message):
    with pytest.raises(TypeError, match=message):
        fisher_of(WithLogits(make), [X])


def test_choices_that_cannot_be():
    model = WithLogits(lambda f: (f, f))
    for output in (2, -3, "scores"):
        with pytest.raises(TypeError, match=rf"with_output\(model, {output!r}\): the model returned tuple with"):
            fisher_of(kl.with_output(model, output), [X])
    for output in (None, True, 1.5):
        with pytest.raises(TypeError, match="output must be a key, an index, or a function"):
            kl.with_output(model, output)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        kl.with_output("model", 0)
    with pytest.raises(TypeError, match="it is not clear which tensor"):
        fisher_of(kl.with_output(WithLogits(lambda f: {"a": (f, f)}), "a"), [X])


def test_a_single_layer():
    model = nn.LSTM(5, 2, batch_first=True).double()
    with pytest.raises(ValueError, match=r"the model is a single layer, LSTM.*nn.Sequential\(model\)"):
        kl.with_output(model, 0)
    view = kl.with_output(nn.Sequential(model), lambda returned: returned[0][:, -1])
    fisher = fisher_of(view, [(X.unsqueeze(1), Y % 2)])
    assert list(fisher) == ["0"]
