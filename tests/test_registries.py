"""Classes of the user's own, each registered with one line: they fit, are tuned, predict, are saved and loaded."""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace._registry import Registry
from kronlaplace.blocks import block_from_tensors
from kronlaplace.estimators.registry import ESTIMATORS, estimator_from_json
from kronlaplace.layers import LAYERS, LinearLayer
from kronlaplace.likelihoods.base import LIKELIHOODS
from kronlaplace.likelihoods.links import variance_of
from kronlaplace.likelihoods.prediction import gaussian_nll
from kronlaplace.likelihoods.tensors import one_element_at_a_time, sum_and_count
from kronlaplace.testing import check_damping, check_estimator, check_layer, check_likelihood, temporary_registrations

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class CountLikelihood(kl.Likelihood):
    """Counts, with the logarithm of their rate as output."""

    exposure: float = 1.0

    def check_targets(self, outputs, targets):
        if targets.shape != outputs.shape:
            raise ValueError("one count for each output")
        return ((targets >= 0) & (targets == targets.round())).all(), "targets must be counts"

    def rate(self, outputs):
        return self.exposure * outputs.exp()

    def statistics(self, outputs, targets):
        rate, counts = self.rate(outputs), targets.to(outputs.dtype)
        return sum_and_count(rate - counts * rate.log() + torch.lgamma(counts + 1))

    def log_likelihood(self, statistics):
        return -statistics[0]

    def _exact_directions(self, outputs, targets):
        yield from one_element_at_a_time(self.rate(outputs).sqrt())

    def _sampled_direction(self, outputs, targets, generator):
        return self._gradient(outputs, torch.poisson(self.rate(outputs), generator))

    def _gradient(self, outputs, targets):
        return self.rate(outputs) - targets.to(outputs.dtype)

    @property
    def links(self):
        return ()

    def sample_mean(self, outputs):
        return self.rate(outputs)

    def noise_variance(self, outputs):
        return self.rate(outputs)

    def predictive(self, mean, covariance, link, n_samples, generator):
        variance = variance_of(mean, covariance)
        rate = self.rate(mean + 0.5 * variance)
        return kl.Prediction(rate, rate.square() * variance.expm1(), rate)

    def predictive_nll(self, prediction, targets):
        return sum_and_count(gaussian_nll(self, prediction, targets))


@dataclass(frozen=True)
class Shrunken(kl.Estimator):
    """The diagonal, drawn towards its mean."""

    name: ClassVar[str] = "shrunken"
    for_any_layer: ClassVar[bool] = True
    share: float = 0.1

    def start(self, layer):
        return {"values": torch.zeros(layer.shape, dtype=layer.dtype, device=layer.device)}

    def add_gradients(self, state, gradients):
        gradients.add_squared_weight_gradients(state["values"])

    def finish(self, state, layer, weight):
        values = state["values"] / weight
        return kl.DiagonalBlock((1 - self.share) * values + self.share * values.mean(), layer.name)


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in transformers: its weight is transposed."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(0.5 * torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class RootMeanSquareNorm(nn.Module):
    """As in Llama, or in Gemma with an offset of one."""

    def __init__(self, size, offset=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(size))
        self.offset = offset

    def forward(self, hidden_states):
        normalized = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + 1e-6)
        return (self.offset + self.scale) * normalized


class NamedTable(nn.Module):
    def __init__(self, tokens, size):
        super().__init__()
        self.table = nn.Parameter(torch.randn(tokens, size))

    def forward(self, index):
        return F.embedding(index, self.table)


class RowByRow(nn.Linear):
    """A forward pass of its own that does what its parent's does."""

    def forward(self, x):
        return torch.stack([x @ row for row in self.weight], dim=-1) + self.bias


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x):
        normalized = (x - self.running_mean) / (self.running_var + self.eps).sqrt()
        return normalized * self.weight + self.bias


class Unfolded(nn.Conv2d):
    def forward(self, x):
        height, width = (n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], self.padding, self.kernel_size, strict=True))
        patches = F.unfold(x, self.kernel_size, padding=self.padding)
        return (self.weight.flatten(1) @ patches + self.bias[:, None]).unflatten(2, (height, width))


class Gain(nn.Module):
    """A module that no family describes: one gain for each feature."""

    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x * self.gain


class GainLayer(kl.Layer):
    """What it is to an estimator: a column of gains, without Kronecker factors."""

    has_kronecker_factors = False

    @property
    def shape(self):
        return len(self.module.gain), 1

    def assemble(self, values):
        return values[self.parameter_names[0]].unsqueeze(1)

    def split_directions(self, matrices):
        return {self.parameter_names[0]: matrices.squeeze(-1)}

    def input_shape(self):
        return "(examples, ..., features)"

    def positions(self, x, grad):
        return grad[0, ..., 0].numel()

    def weight_gradients(self, x, grad):
        products = (x * grad).to(self.dtype).reshape(len(x), -1, self.shape[0])
        return products.sum(1).unsqueeze(-1).unsqueeze(0)


class Doubled(LinearLayer):
    """Twice a linear layer's output, with another name for the weight."""

    def activations(self, x):
        return 2 * super().activations(x)

    def project(self, x, basis):
        return 2 * super().project(x, basis)

    add_activation_moment = kl.Layer.add_activation_moment

    def squared_weight_gradients(self, calls, out):
        return False


class Double(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x):
        return 2 * x @ self.matrix.T


@dataclass(frozen=True)
class Relative(kl.damping.Damping):
    """A share of the block's mean eigenvalue."""

    share: float = 0.01

    def eigenvalues(self, block):
        values = block.eigenvalues()
        q, p = block.shape
        return values + self.share * block.trace() / (q * p)


def register():
    """One line for each; not when this file is imported, so that other tests do not see them."""
    kl.register_likelihood(CountLikelihood)
    kl.register_estimator(Shrunken)
    kl.register_layer(Conv1D, "linear", transposed=True)
    kl.register_layer(RootMeanSquareNorm, "normalization", weight="scale")
    kl.register_layer(NamedTable, "embedding", weight="table")
    kl.register_layer(RowByRow, "linear")
    kl.register_layer(OwnNorm, "normalization")
    kl.register_layer(Unfolded, "convolution")
    kl.register_layer(Gain, GainLayer)
    kl.register_layer(Double, Doubled, weight="matrix")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with temporary_registrations():
        register()
        yield


# -- through a whole life, and into another process -----------------------------------------------------------


def own_network():
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(4, 5), nn.Tanh(), RootMeanSquareNorm(5), Gain(5), Conv1D(5, 3)).double()


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def inputs():
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def targets(likelihood):
    if isinstance(likelihood, CountLikelihood):
        return torch.arange(36).remainder(4).double().view(12, 3)
    return torch.arange(12).remainder(3)


CASES = {
    "likelihood": (plain_network, CountLikelihood(exposure=2.0), "kfac"),
    "estimator": (plain_network, kl.Categorical(), Shrunken(share=0.25)),
    "layer": (own_network, kl.Categorical(), kl.TKFAC()),
    "all": (own_network, CountLikelihood(exposure=2.0), kl.EKFAC()),
}


def numbers(prediction):
    prediction = prediction if isinstance(prediction, torch.Tensor) else prediction.total_variance
    return prediction.flatten().tolist()


def told(folder):
    """What a process finds in the files: predictions, the posteriors' parts, and solutions with a damping of its own."""
    found = {}
    for name, (network, _, _) in CASES.items():
        posterior = kl.KronLaplace.load(folder / f"{name}.safetensors", network())
        inverse = Relative().invert_all(posterior.fisher)
        found[name] = {
            "prediction": numbers(posterior.predict(inputs())),
            "likelihood": repr(posterior.likelihood),
            "estimator": repr(posterior.estimator),
            "logdet": sum(one.logdet().item() for one in inverse.values()),
        }
        posterior.fit([(inputs(), targets(posterior.likelihood))])
        found[name]["refitted"] = numbers(posterior.predict(inputs()))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, (network, likelihood, estimator) in CASES.items():
        posterior = kl.KronLaplace(network(), likelihood, estimator)
        posterior.fit([(inputs(), targets(likelihood))]).tune()
        posterior.save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def elsewhere(folder):
    """What another process, which imports this file, finds."""
    program = (
        "import json, pathlib, sys; from tests.test_registries import register, told; register();"
        "print(json.dumps(told(pathlib.Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.grid
@pytest.mark.parametrize("name", CASES)
def test_a_class_of_ones_own_comes_back_in_another_process(name, folder, elsewhere):
    here = told(folder)[name]
    for key, value in elsewhere[name].items():
        assert (
            value == pytest.approx(here[key], rel=1e-9)
            if key != "likelihood" and key != "estimator"
            else value == here[key]
        )
    _, likelihood, estimator = CASES[name]
    assert here["likelihood"] == repr(likelihood)
    assert estimator == "kfac" or here["estimator"] == repr(estimator)
    assert here["refitted"] == pytest.approx(here["prediction"], rel=1e-6)


@pytest.mark.parametrize("likelihood", [CountLikelihood(), CountLikelihood(exposure=2.5)], ids=str)
def test_the_likelihood_keeps_the_laws(likelihood):
    check_likelihood(likelihood)


def test_the_estimator_keeps_the_laws():
    check_estimator(Shrunken())


def test_the_damping_keeps_the_laws():
    check_damping(Relative())


LAYER_CHECKS = {
    "transposed": (lambda: Conv1D(3, 4), (5, 3)),
    "transposed, positions": (lambda: Conv1D(3, 4), (5, 2, 3)),
    "norm": (lambda: RootMeanSquareNorm(4), (5, 4)),
    "norm with an offset": (lambda: RootMeanSquareNorm(4, 1.0), (3, 2, 4)),
    "subclass": (lambda: RowByRow(3, 4), (5, 3)),
    "subclass of a norm": (lambda: OwnNorm(4), (5, 4)),
    "subclass of a convolution": (lambda: Unfolded(2, 3, (2, 3), padding=1), (3, 2, 4, 4)),
    "own family": (lambda: Gain(4), (3, 2, 4)),
    "own family from a linear layer": (lambda: Double(3, 4), (3, 2, 3)),
}


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", LAYER_CHECKS)
def test_the_layers_keep_the_laws(name):
    torch.manual_seed(0)
    make, shape = LAYER_CHECKS[name]
    check_layer(make(), torch.randn(shape))


def test_the_table_keeps_the_laws():
    check_layer(NamedTable(5, 3), torch.tensor([[0, 1], [2, 2], [4, 0]]))


# -- what is the same as with torch's own ---------------------------------------------------------------------


@pytest.mark.quick(1)
@pytest.mark.parametrize("estimator", ["exact", "kfac", "kfoc", "ekfac", "diagonal"])
def test_a_transposed_weight_is_a_linear_layer(estimator):
    own = nn.Sequential(Conv1D(4, 5), nn.Tanh(), RootMeanSquareNorm(5), Conv1D(5, 3)).double()
    same = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.RMSNorm(5, eps=1e-6), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for i in (0, 3):
            same[i].weight.copy_(own[i].weight.T)
            same[i].bias.copy_(own[i].bias)
        same[2].weight.copy_(own[2].scale)
    data = [(inputs(), targets(kl.Categorical()))]
    fishers = [kl.estimate_fisher(m, data, "classification", estimator, sampling="exact") for m in (own, same)]
    for name, block in fishers[0].items():
        torch.testing.assert_close(block.to_dense(), fishers[1][name].to_dense())
    posteriors = [kl.KronLaplace(m, "classification", estimator).fit(data) for m in (own, same)]
    torch.testing.assert_close(*(p.predict(inputs()) for p in posteriors))
    # Samples are written into parameters of the transposed shape.
    torch.testing.assert_close(*(p.log_marginal_likelihood() for p in posteriors))


def test_derivatives_through_registered_layers():
    own = nn.Sequential(Conv1D(4, 5), RootMeanSquareNorm(5), Conv1D(5, 3)).double()
    same = nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5, eps=1e-6), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for i in (0, 2):
            same[i].weight.copy_(own[i].weight.T)
            same[i].bias.copy_(own[i].bias)
        same[1].weight.copy_(own[1].scale)
    gradients = []
    for model in (own, same):
        posterior = kl.KronLaplace(model, "classification").fit([(inputs(), targets(kl.Categorical()))])
        x = inputs().requires_grad_()
        probabilities = posterior.predict(x, differentiable=True)
        gradients.append(torch.autograd.grad(probabilities[:, 0].sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_inputs_by_keyword():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RootMeanSquareNorm(4)

        def forward(self, x):
            return self.norm(hidden_states=x)

    model = Block().double()
    fisher = kl.estimate_fisher(model, [inputs()], "euclidean", sampling="exact")
    normalized = inputs() * torch.rsqrt(inputs().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(fisher["norm"].to_dense().diagonal(), normalized.square().mean(0))


def test_the_last_layer_may_be_of_a_registered_type():
    model = own_network()
    fisher = kl.estimate_fisher(model, [inputs()], "classification", layers="last")
    assert list(fisher) == ["4"]


@pytest.mark.parametrize("named", [False, True])
def test_a_table_tied_with_an_output_layer(named):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = NamedTable(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.table.table

        def forward(self, index):
            return self.out(self.table(index).tanh().mean(1))

    model = Tied().double()
    fisher = kl.estimate_fisher(
        model,
        [torch.tensor([[0, 1], [2, 2]])],
        "euclidean",
        "diagonal",
        sampling="exact",
        layers=["table"] if named else None,
    )
    jacobian = torch.func.jacrev(
        lambda w: torch.func.functional_call(model, {"table.table": w}, torch.tensor([[0, 1], [2, 2]]))
    )(model.table.table.detach())
    torch.testing.assert_close(fisher["table"].to_dense().diagonal().view(5, 3), jacobian.square().sum((0, 1)) / 2)


# -- a wrong registration is an error, never a wrong number ------------------------------------------------------


class Square(Conv1D):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return super().forward(x)


class Rectified(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return super().forward(x).relu()


class Halved(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return 0.5 * super().forward(x)


class ChannelNorm(nn.Module):
    """Scales axis 1, which is as long as the last one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = x.unsqueeze(2) * torch.ones(4, dtype=x.dtype)
        return (x / x.norm(dim=-1, keepdim=True) * self.weight[:, None]).sum(1)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return (self.weight * x).softmax(-1)


class ScaledTable(NamedTable):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return 3 * super().forward((x > 0).long().sum(1))


WRONG = {
    "not transposed": (Square, "linear", {}),
    "an activation inside": (Rectified, "linear", {}),
    "scaled": (Halved, "linear", {}),
    "another axis": (ChannelNorm, "normalization", {}),
    "no scale": (Mixed, "normalization", {}),
    "a scaled table": (ScaledTable, "embedding", {"weight": "table"}),
    "a norm as a linear layer": (RootMeanSquareNorm, Doubled, {"weight": "scale"}),
}


@pytest.mark.parametrize("estimator", ["kfac", "diagonal"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_registration_is_an_error(name, estimator):
    kind, family, options = WRONG[name]
    torch.manual_seed(0)
    model = nn.Sequential(kind(4) if kind is RootMeanSquareNorm else kind(), nn.Linear(4, 3)).double()
    with temporary_registrations():
        kl.register_layer(kind, family, **options)
        with pytest.raises((RuntimeError, NotImplementedError, IndexError, ValueError)) as error:
            kl.estimate_fisher(model, [inputs()], "classification", estimator, unsupported="error")
        if name not in ("a norm as a linear layer", "a scaled table"):
            assert "'0'" in str(error.value)


# -- what is not known is named --------------------------------------------------------------------------------


def test_an_estimator_that_is_not_imported_still_predicts(folder):
    with temporary_registrations():
        ESTIMATORS.remove("shrunken")
        posterior = kl.KronLaplace.load(folder / "estimator.safetensors", plain_network())
        before = posterior.predict(inputs())
        message = (
            r"estimator 'shrunken' is not registered; .*import tests\.test_registries, .*"
            r"kl\.register_estimator\(Shrunken\)"
        )
        with pytest.raises(ValueError, match=message):
            posterior.fit([(inputs(), targets(kl.Categorical()))])
        posterior.save(folder / "again.safetensors")
    again = kl.KronLaplace.load(folder / "again.safetensors", plain_network())  # nothing was forgotten
    assert again.estimator == Shrunken(share=0.25)
    torch.testing.assert_close(again.predict(inputs()), before)


def test_a_likelihood_that_is_not_imported(folder):
    with temporary_registrations():
        LIKELIHOODS.remove("CountLikelihood")
        message = (
            r"likelihood 'CountLikelihood' is not registered; .*import tests\.test_registries, .*"
            r"kl\.register_likelihood\(CountLikelihood\)"
        )
        with pytest.raises(ValueError, match=message):
            kl.KronLaplace.load(folder / "likelihood.safetensors", plain_network())


def test_a_layer_type_that_is_not_registered(folder):
    with temporary_registrations():
        LAYERS.remove(Gain)
        message = (
            r"layer '3' by a rule for its type, Gain, and there is none now: .*import the module that registers it"
        )
        with pytest.raises(ValueError, match=message):
            kl.KronLaplace.load(folder / "layer.safetensors", own_network())
        with pytest.raises(
            NotImplementedError, match=r"(?s)3 \(Gain\): this layer type is not .*kl\.register_layer\(type, family\)"
        ):
            kl.estimate_fisher(own_network(), [inputs()], "classification", unsupported="error")
    with temporary_registrations():
        LAYERS.remove(Conv1D)  # which is recognized by what it does
        kl.KronLaplace.load(folder / "layer.safetensors", own_network()).predict(inputs())


def test_an_estimator_inside_another_one():
    @kl.register_estimator
    @dataclass(frozen=True)
    class Wrapper(kl.Estimator):
        name: ClassVar[str] = "wrapper"
        inner: kl.Estimator = Shrunken()
        start = add_gradients = finish = None

    with temporary_registrations():
        assert ESTIMATORS.from_json(json.loads(json.dumps(ESTIMATORS.to_json(Wrapper())))) == Wrapper()
        values = ESTIMATORS.to_json(Wrapper())
        ESTIMATORS.remove("shrunken")
        with pytest.raises(ValueError, match=r"the estimator 'shrunken' is not registered"):
            ESTIMATORS.from_json(values)
    ESTIMATORS.remove("wrapper")


def test_a_subclass_that_is_not_registered_is_not_taken_for_its_parent():
    @dataclass(frozen=True)
    class Mine(kl.KFAC):
        pass

    fisher = kl.estimate_fisher(plain_network(), [inputs()], "classification", Mine())
    estimator = estimator_from_json(fisher.metadata.settings)
    assert estimator != kl.KFAC() and "Mine" in repr(estimator)
    with pytest.raises(ValueError, match=r"the estimator 'kfac' is not registered"):
        estimator.start(None)


def test_a_registered_estimator_is_a_shorthand():
    fisher = kl.estimate_fisher(plain_network(), [inputs()], "classification", "shrunken")
    assert fisher.metadata.estimator == "shrunken"
    with pytest.raises(ValueError, match=r"unknown estimator 'shrink'; .*'kfac', 'kfc', .*'shrunken'"):
        kl.estimate_fisher(plain_network(), [inputs()], "classification", "shrink")


def test_settings_that_json_cannot_hold_are_refused_before_the_fit():
    with pytest.raises(TypeError, match=r"cannot be saved: .*Its fields must be numbers"):
        kl.estimate_fisher(plain_network(), [inputs()], "classification", Shrunken(share=torch.ones(())))


# -- what cannot be registered -----------------------------------------------------------------------------------


def test_estimators_that_cannot_be_registered():
    @dataclass(frozen=True)
    class Nameless(kl.KFAC):
        pass

    @dataclass(frozen=True)
    class Taken(Shrunken):
        name: ClassVar[str] = "kfac"

    class NoFields(kl.Estimator):
        name: ClassVar[str] = "no fields"

        def __init__(self, share):
            self.share = share

    @dataclass(frozen=True)
    class Reserved(Shrunken):
        name: ClassVar[str] = "reserved"
        defined_in: str = ""

    with pytest.raises(TypeError, match=r"takes a class derived from kl\.Estimator, got"):
        kl.register_estimator(Shrunken())
    with pytest.raises(TypeError, match=r"Nameless needs a name of its own"):
        kl.register_estimator(Nameless)
    with pytest.raises(ValueError, match=r"there is already an estimator 'kfac'"):
        kl.register_estimator(Taken)
    with pytest.raises(TypeError, match=r"NoFields must be a dataclass"):
        kl.register_estimator(NoFields)
    with pytest.raises(ValueError, match=r"Reserved has a field 'defined_in'"):
        kl.register_estimator(Reserved)


class Abstract(kl.Layer):
    pass


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.Linear, "linear"), {}, ValueError, r"torch\.nn\.Linear is already supported"),
        ((nn.Module, "linear"), {}, TypeError, "takes a class derived from torch.nn.Module"),
        ((Conv1D(2, 3), "linear"), {}, TypeError, "takes a class derived from torch.nn.Module, got Conv1D"),
        ((Conv1D, "lineal"), {}, ValueError, "unknown family 'lineal'; use one of 'linear', 'convolution', 'norm"),
        ((Conv1D, "recurrent"), {}, ValueError, "unknown family 'recurrent'"),
        ((Conv1D, nn.Linear), {}, TypeError, "must be a string or a class derived from kl.Layer"),
        ((Conv1D, Abstract), {}, TypeError, "Abstract cannot be instantiated: it does not define assemble, "),
        ((Conv1D, GainLayer), {"weight": "gain"}, ValueError, "takes all parameters of a module by their own names"),
        (
            (Conv1D, "embedding"),
            {"transposed": True},
            ValueError,
            'transposed=True only applies to the family "linear"',
        ),
        ((Conv1D, "convolution"), {"weight": "kernel"}, ValueError, "must be named weight and bias"),
        ((Conv1D, "embedding"), {"bias": "b"}, ValueError, "does not apply to an embedding"),
    ],
)
def test_layers_that_cannot_be_registered(arguments, options, error, message):
    before = dict(LAYERS)
    with pytest.raises(error, match=message):
        kl.register_layer(*arguments, **options)
    assert dict(LAYERS) == before


def test_modules_that_lack_what_their_family_needs():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2, 3))

        def forward(self, x):
            return F.conv1d(x, self.weight)

    with temporary_registrations():
        kl.register_layer(Kernel, "convolution")
        with pytest.raises(NotImplementedError, match=r"lacks the attributes \['in_channels', .*of torch.nn.Conv2d"):
            kl.estimate_fisher(
                nn.Sequential(Kernel(), nn.Flatten()), [torch.randn(2, 2, 5)], "euclidean", unsupported="error"
            )
    frozen = Conv1D(4, 3)
    frozen.weight.requires_grad_(False)
    norm = RootMeanSquareNorm(4)
    norm.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(NotImplementedError, match=r"must be the weight, with or without the bias; they are .'bias'."):
        kl.estimate_fisher(frozen, [torch.randn(2, 4)], "euclidean", unsupported="error")
    with pytest.raises(
        NotImplementedError, match=r"must be 'scale', with or without 'bias'; they are .'extra', 'scale'."
    ):
        kl.estimate_fisher(norm, [torch.randn(2, 4)], "euclidean", unsupported="error")


def test_a_subclass_that_overrides_forward_again_is_refused():
    class Again(Conv1D):
        def forward(self, x):
            return super().forward(x)

    class Same(Conv1D):
        pass

    with pytest.raises(
        NotImplementedError, match=r"it overrides Conv1D.forward, so the form of its gradient is unknown"
    ):
        kl.estimate_fisher(Again(4, 3), [torch.randn(2, 4)], "euclidean", unsupported="error")
    assert list(kl.estimate_fisher(nn.Sequential(Same(4, 3)), [torch.randn(2, 4)], "euclidean")) == ["0"]


# -- registries themselves ------------------------------------------------------------------------------------------


def test_what_is_registered_in_a_context_is_gone_after_it():
    before = dict(LAYERS), dict(LIKELIHOODS), dict(ESTIMATORS)
    with pytest.raises(KeyError, match=r"nothing"), temporary_registrations():
        kl.register_layer(Square, "linear")
        LIKELIHOODS.remove("CountLikelihood")
        ESTIMATORS.remove("nothing")
    assert (dict(LAYERS), dict(LIKELIHOODS), dict(ESTIMATORS)) == before


def test_many_threads_register_at_once_while_others_look():
    registry = Registry()
    problems = []

    def add(start):
        for i in range(start, start + 200):
            registry.add(i, -i)

    def look():
        for _ in range(200):
            if any(value != -key for key, value in registry.items()):
                problems.append("mixed")

    threads = [threading.Thread(target=add, args=(200 * k,)) for k in range(4)] + [threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems and sorted(registry) == list(range(800))


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_public_objects_show_what_they_are():
    block = replace(kl.damping.Tikhonov(0.001)).invert(kl.DiagonalBlock(torch.ones(50, 13), "0"))
    assert repr(block) == "DiagonalInverse('0', 50x13, diagonal, Tikhonov(0.001))"
    assert repr(kl.damping.Tikhonov(torch.ones(2, 3))) == "Tikhonov(2x3 numbers)"
    assert repr(kl.damping.FactoredTikhonov(torch.tensor(0.5))) == "FactoredTikhonov(0.5)"
    assert repr(kl.damping.TraceRestrictedAuto(0.5)) == "TraceRestrictedAuto(minimum=0.5)"
    prediction = kl.Prediction(torch.zeros(5, 2), torch.ones(5, 2), torch.tensor(0.25))
    assert repr(prediction) == "Prediction(mean and variance of shape (5, 2), noise_variance 0.25)"
    assert repr([kl.Sampling.MC, kl.Link.PROBIT]) == "['mc', 'probit']"
    joint = kl.JointPrediction(torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2, 1), torch.eye(2))
    assert repr(joint) == "JointPrediction(mean and variance of shape (2, 1), noise_variance of shape (2, 1))"
    assert repr(kl.IsotropicPrior(torch.tensor(0.5))) == "IsotropicPrior(precision=0.5, mean=0)"
    assert repr(kl.LayerwisePrior(torch.ones(3), {"0": torch.ones(2, 2)})) == (
        "LayerwisePrior(precision=3 values, mean=values for ['0'])"
    )
    fisher = kl.KroneckerFisher({"0": kl.DiagonalBlock(torch.ones(2, 3), "0")}, 5)
    assert repr(kl.KroneckerPrior(fisher, mean=0.0, plus=0.1)) == (
        "KroneckerPrior(fisher=values for ['0'], mean=0, scale=None, plus=0.1, factor=1)"
    )
    accumulation = kl.Accumulation(kl.SUA(), kl.find_layers(plain_network()), 0.9)
    assert repr(accumulation) == "Accumulation(SUA(), layers=['0', '2'], ema_decay=0.9, pass 1 of 1, 0 examples)"


def test_no_public_object_shows_an_address():
    data = [(inputs(), inputs()[:, :3])]
    posterior = kl.KronLaplace(plain_network(), kl.Gaussian()).fit(data)
    shown = [posterior, posterior.fisher, posterior.fisher.coverage(), posterior.hyperparameters, kl.Predictive()]
    shown += [*posterior.covariance().values(), *posterior.fisher.values(), *kl.find_layers(plain_network())]
    shown += [posterior.predict(inputs()), posterior.predict(inputs(), joint=True), kl.DirectionSampling()]
    for one in shown:
        assert " object at 0x" not in repr(one) and "tensor(" not in repr(one)


def test_a_kind_of_block_that_is_not_known():
    with pytest.raises(
        ValueError,
        match=r"block of layer '0' is of unknown kind 'sparse'; the known kinds are \['kronecker', 'truncated'",
    ):
        block_from_tensors("sparse", {}, "0")
