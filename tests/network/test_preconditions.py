"""What a network must be like: layers that are supported, modes, forward passes that can be observed."""

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.bad_input import X, Y, mlp32


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.gate * x


class MyLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Twofold(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.both(x, x)


UNSUPPORTED = {
    "a module of the user's": (
        Gate(),
        r"1 \(Gate\): this layer type is not supported; its trainable parameters are gate",
    ),
    "a bilinear one": (
        nn.Sequential(Twofold()),
        r"1\.0\.both \(Bilinear\): this layer type is not supported; its trainable parameters are bias, weight",
    ),
    "an overridden forward": (MyLinear(4, 4), r"1 \(MyLinear\): it overrides Linear.forward"),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "1.parametrizations.weight"),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_layers_are_named_with_the_ways_out(name):
    module, message = UNSUPPORTED[name]
    model = nn.Sequential(nn.Linear(4, 4), module, nn.Linear(4, 3)).eval()
    with pytest.raises(NotImplementedError, match=message) as error:
        kl.KronLaplace(model, "classification", unsupported="error")
    assert "leave the module out with layers=[...]" in str(error.value)
    assert "freeze it" in str(error.value)
    assert 'unsupported="fixed"' in str(error.value)
    fixed = kl.KronLaplace(model, "classification", unsupported="fixed").fit([(X, Y)])
    assert list(fixed.fisher) == ["0", "2"]
    assert fixed.predict(X).shape == (6, 3)
    kl.KronLaplace(model, "classification", layers=["0", "2"]).fit([(X, Y)]).predict(X)
    module.requires_grad_(False)
    kl.KronLaplace(model, "classification").fit([(X, Y)]).predict(X)


def test_modules_that_share_only_some_parameters_are_refused():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(NotImplementedError, match=r"\['0', '1'\] share some of their parameters but not all"):
        kl.KronLaplace(tied, "classification", unsupported="error")
    kl.KronLaplace(tied, "classification", layers=["2"]).fit([(X, Y)]).predict(X)


def test_nothing_supported_is_left():
    with pytest.raises(NotImplementedError, match=r"\(the model itself\) \(Gate\)"):
        kl.KronLaplace(Gate(), "classification", unsupported="fixed")


def test_bias_alone_is_refused():
    model = mlp32()
    model[0].weight.requires_grad_(False)
    with pytest.raises(NotImplementedError, match=r"must be the weight, with or without the bias; they are \['bias'\]"):
        kl.KronLaplace(model, "classification", unsupported="error")


def test_nothing_trainable():
    with pytest.raises(ValueError, match="no trainable parameters"):
        kl.KronLaplace(mlp32().requires_grad_(False), "classification")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["4"], r"no module '4'; the modules with trainable parameters are \['0', '2'\]"),
        (["1"], r"module '1' \(ReLU\) has no trainable parameters"),
        (["0", "0"], r"layers contains duplicates: \['0', '0'\]"),
        ("4", r"no module '4'; the modules with trainable parameters are \['0', '2'\]"),
        ("[1]*", r"no module with trainable parameters of its own matches '\[1\]\*'; available names are \['0', '2'\]"),
        ([], r"layers is empty; name at least one of \['0', '2'\]"),
    ],
)
def test_bad_layer_names(layers, message):
    with pytest.raises(ValueError, match=message):
        kl.KronLaplace(mlp32(), "classification", layers=layers)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False).eval()])
def test_batch_norm_with_batch_statistics_is_refused(norm):
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 3))
    with pytest.raises(
        ValueError, match=r"module '1' \(BatchNorm1d\) normalizes with the statistics of the batch.*eval\(\)"
    ):
        kl.estimate_fisher(model, [X], "classification", layers=["0"])


def test_dropout_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"module '1' \(Dropout\) is in training mode.*Call model.eval\(\) first"):
        kl.KronLaplace(model, "classification")
    kl.KronLaplace(model.eval(), "classification").fit([(X, Y)])


class Wrapped(nn.Module):
    """A network whose forward pass is given."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(4, 4), nn.Linear(4, 3), run

    def forward(self, x):
        return self.run(self, x)


def under_no_grad(self, x):
    with torch.no_grad():
        x = self.a(x)
    return self.b(x)


STRANGE_FORWARDS = {
    "never called": (lambda s, x: s.b(x), RuntimeError, r"not called as modules in the forward pass: \['a'\]"),
    "as a function": (
        lambda s, x: s.b(nn.functional.linear(x, s.a.weight)),
        RuntimeError,
        r"not called as modules in the forward pass: \['a'\]",
    ),
    "cut off": (
        lambda s, x: s.b(x) + 0 * s.a(x).detach().sum(),
        RuntimeError,
        r"do not depend on these layers: \['a'\]",
    ),
    "no grad": (under_no_grad, RuntimeError, r"layer 'a' ran without gradients \(inside torch.no_grad\(\)\?\)"),
    "examples reshaped": (
        lambda s, x: s.b(s.a(x.repeat(2, 1)))[: len(x)],
        NotImplementedError,
        r"layer 'a' \(Linear\) got an input of shape \(12, 4\) in a batch of 6 examples; it must be \(examples, \.\.\., 4\)",
    ),
    "a tuple": (lambda s, x: (s.b(s.a(x)), x), TypeError, "it is not clear which tensor is the output"),
    "examples lost": (lambda s, x: s.b(s.a(x)).mean(0), ValueError, r"for 6 examples it returned .* shape \(3,\)"),
}


@pytest.mark.parametrize("name", STRANGE_FORWARDS)
def test_what_a_forward_pass_may_not_do(name):
    run, error, message = STRANGE_FORWARDS[name]
    with pytest.raises(error, match=message):
        kl.estimate_fisher(Wrapped(run), [(X, Y)], "classification", unsupported="error")
