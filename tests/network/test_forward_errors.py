"""What a network's forward pass cannot do is said in terms of what it was given; what it says itself passes through."""

import copy

import pytest
import torch
from torch import nn

import kronlaplace as kl
from tests.support.inputs import WithLogits

X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def ways(model=None):
    """Everything that calls the network, by name, as a function of inputs."""
    model = network() if model is None else model
    posterior = kl.KronLaplace(network(), "classification").fit([(X, Y)])
    return {
        "fit": lambda x: kl.KronLaplace(model, "classification").fit([(x, Y)]),
        "fisher": lambda x: kl.estimate_fisher(model, [(x, Y)], "classification", "ekfac"),
        "train": lambda x: kl.train_by_evidence(model, [(x, Y)], "classification", epochs=1),
        "predict": lambda x: posterior.predict(x),
        "sample": lambda x: posterior.predict(x, method="sample", n_samples=2),
        "variance": lambda x: posterior.functional_variance([(x, Y)]),
        "validation": lambda x: posterior.tune("validation", data=[(x, Y)]),
    }


WRONG = {
    "width": (
        torch.randn(6, 7),
        r"the model failed on inputs of shape \(6, 7\) \(float32\) in module '0', Linear\(in_features=4, out_features=5, "
        r"bias=True\): .*cannot be multiplied \(6x7 and 4x5\)",
    ),
    "integers": (
        torch.randint(3, (6, 4)),
        r"inputs of dtype torch.int64; its parameters are torch.float32. Use inputs.to\(torch.float32\) if they are numbers",
    ),
    "precision": (
        X.double(),
        r"inputs of dtype torch.float64; its parameters are torch.float32. Use inputs.to\(torch.float3",
    ),
}


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_do_not_fit(name, way):
    x, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        ways()[way](x)
    assert isinstance(error.value.__cause__, RuntimeError)  # torch's own words
    assert ("batch 0: " in str(error.value)) == (way in ("fit", "fisher", "train"))


def test_the_batch_is_named():
    with pytest.raises(ValueError, match=r"batch 2: the model failed on inputs of shape \(6, 7\)"):
        kl.estimate_fisher(network(), [(X, Y), (X, Y), (torch.randn(6, 7), Y)], "classification")


def test_targets_that_come_as_a_batch():
    with pytest.raises(
        ValueError, match=r"batch 1: .* dtype torch.int64; .* pass pairs instead: \[\(inputs, targets\)\]"
    ):
        kl.KronLaplace(network(), "classification").fit([X, Y])


INSIDE = {
    "convolution": (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 3)), (6, 1, 4, 4), "'0', Conv2d"),
    "norm": (nn.Sequential(nn.LayerNorm(5), nn.Linear(4, 3)), (6, 4), "'0', LayerNorm"),
    "deep": (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(5, 3))), (6, 4), "'1.1', Linear"),
    "recurrent": (nn.Sequential(nn.LSTM(5, 3), nn.Flatten()), (6, 2, 4), "'0', LSTM"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_the_module_is_named(name):
    model, shape, place = INSIDE[name]
    with pytest.raises(ValueError, match=f"the model failed on inputs of shape .* in module {place}"):
        kl.estimate_fisher(model.eval(), [(torch.randn(shape), Y)], "classification")


@pytest.mark.parametrize("way", ["predict", "sample"])
def test_a_list_of_tensors_is_several_inputs(way):
    with pytest.raises(TypeError, match=r"called with 2 inputs, of shape \(6, 4\) \(float32\), .* as a list of tuples"):
        ways()[way]([X, X])


class UsersError(RuntimeError):
    pass


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.layer, self.error = nn.Linear(4, 3), error

    def forward(self, x):
        self.layer(x)
        raise self.error


@pytest.mark.parametrize(
    "error",
    [UsersError("expected size"), RuntimeError("no licence"), KeyError("x"), ValueError("shape"), TypeError("a")],
)
def test_errors_of_the_networks_own_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught:
        kl.estimate_fisher(Raises(error), [(X, Y)], "classification")
    assert caught.value is error


# -- derivatives inside --------------------------------------------------------------------------------------


class Forces(nn.Module):
    """Returns the derivative of a network, as potentials do."""

    def __init__(self, outside=False):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.head = nn.Linear(4, 2)
        self.outside = outside

    def forward(self, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return self.head(gradient)


def test_derivatives_inside_the_forward_pass():
    """Refused where they go through a wanted layer; a layer after them is as any other."""
    model, targets = Forces(), torch.randn(6, 2)
    with pytest.raises(
        NotImplementedError, match=r"takes derivatives inside its forward pass, through layer 'energy.2'"
    ):
        kl.estimate_fisher(model, [(X, targets)], "regression", unsupported="error")
    posterior = kl.KronLaplace(model, "regression", layers=["head"]).fit([(X, targets)])
    with pytest.raises(NotImplementedError, match="takes derivatives inside"):
        kl.KronLaplace(model, "regression", layers=["energy.0"], unsupported="error").fit([(X, targets)])
    gradients = torch.autograd.functional.jacobian(lambda x: model.energy(x).sum(), X)
    alone = kl.KronLaplace(model.head, "regression").fit([(gradients, targets)])
    torch.testing.assert_close(posterior.functional_variance(X), alone.functional_variance(gradients))


# -- inference mode ------------------------------------------------------------------------------------------


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = network()
    for make in (lambda: kl.KronLaplace(model, "classification"), lambda: ways(model)["fisher"](X)):
        with pytest.raises(
            ValueError, match=r"were created under torch.inference_mode\(\) .*: \['0.weight', .*deepcopy\(model"
        ):
            make()
    kl.KronLaplace(copy.deepcopy(model), "classification").fit([(X, Y)])  # the way out


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_whole_life_in_inference_mode(mode):
    """The same as outside; what was made inside can be differentiated later."""
    torch.manual_seed(1)
    model = network()
    trained = copy.deepcopy(model)
    with mode():
        x, y = X.clone(), Y.clone()
        posterior = kl.KronLaplace(model, "classification", prior_precision=2.0).fit([(x, y)])
        ready = kl.KronLaplace(model, "classification").fit(
            fisher=kl.estimate_fisher(model, [(x, y)], "classification", sampling="exact")
        )
        inside = [posterior.predict(x), posterior.functional_variance(x), posterior.log_marginal_likelihood()]
        posterior.tune(structure="diagonal")
        kl.train_by_evidence(trained, [(x, y)], "classification", epochs=2, every=1)
    fresh = kl.KronLaplace(model, "classification", prior_precision=2.0).fit([(X, Y)])
    for a, b in zip(
        inside, [fresh.predict(X), fresh.functional_variance(X), fresh.log_marginal_likelihood()], strict=True
    ):
        torch.testing.assert_close(a, b)
    for made in (posterior, ready):
        precision = torch.ones(43, dtype=torch.float64, requires_grad=True)
        made.log_marginal_likelihood(precision).backward()
        assert precision.grad.abs().sum() > 0


# -- a mapping of outputs ------------------------------------------------------------------------------------


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    "call", ["predict", "mc", "sample", "differentiable", "variance", "joint", "tune", "validation"]
)
def test_a_network_that_returns_logits_in_a_mapping(call):
    """Everywhere the same as the network that returns the tensor."""
    model = WithLogits(lambda f: {"logits": f, "aux": None})
    x, y = torch.randn(6, 5).double(), Y
    calls = {
        "predict": lambda p: p.predict(x),
        "mc": lambda p: p.predict(x, link="mc"),
        "sample": lambda p: p.predict(x, method="sample", n_samples=3),
        "differentiable": lambda p: p.predict(x.clone().requires_grad_(), differentiable=True).detach(),
        "variance": lambda p: p.functional_variance(x),
        "joint": lambda p: p.functional_variance(x, joint=True),
        "tune": lambda p: p.tune().prior_precision,
        "validation": lambda p: p.tune("validation", data=[(x, y)], grid=[2.0]).prior_precision,
    }
    ours, expected = (calls[call](kl.KronLaplace(m, "classification").fit([(x, y)])) for m in (model, model.inner))
    torch.testing.assert_close(ours, expected)
