"""The user's model and random state are as before, whatever happened."""

import copy
import io
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from experiments.measure import peak_bytes
from tests.support.architectures import ARCHITECTURES
from tests.support.networks import CASES, cnn, residual
from tests.support.unchanged import assert_unchanged, everything


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", CASES)
def test_a_whole_life_changes_nothing(network):
    case = CASES[network]()
    frozen = next(iter(case.model.parameters()))
    frozen.grad = torch.ones_like(frozen)
    before = everything(case.model)
    posterior = kl.KronLaplace(case.model, "classification", layers=case.layers).fit(case.batches()).tune()
    for options in ({}, {"link": "mc"}, {"method": "sample", "n_samples": 3}):
        posterior.predict(case.inputs, **options)
    posterior.functional_variance(case.inputs)
    posterior.sample(2)
    for method in ("glm", "sample"):
        posterior.draw(case.inputs, 2, method=method).observations()
        posterior.uncertainty(case.inputs, method=method)
    posterior.report(case.batches(), case.inputs)
    assert_unchanged(case.model, before)
    copied = copy.deepcopy(case.model)
    assert torch.equal(copied(case.inputs), case.model(case.inputs))
    buffer = io.BytesIO()
    torch.save(case.model, buffer)


class LoaderDiedError(Exception):
    pass


@pytest.mark.parametrize("network", CASES)
@pytest.mark.parametrize("when", [0, 1])
def test_an_exception_in_the_loader_changes_nothing(network, when):
    case = CASES[network]()
    before = everything(case.model)

    def loader():
        for i, batch in enumerate(case.batches()):
            if i == when:
                raise LoaderDiedError
            yield batch

    with pytest.raises(LoaderDiedError):
        kl.KronLaplace(case.model, "classification", layers=case.layers).fit(loader())
    assert_unchanged(case.model, before)


def test_an_exception_in_the_forward_or_backward_pass_changes_nothing():
    case = cnn()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise LoaderDiedError

    class Model(torch.nn.Module):
        broken = False

        def __init__(self):
            super().__init__()
            self.inner = case.model

        def forward(self, x):
            f = self.inner[3:](Broken.apply(self.inner[:3](x)))
            if self.broken:
                raise LoaderDiedError
            return f

    model = Model()
    for broken in (False, True):
        model.broken = broken
        before = [sorted(vars(m)) for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]
        with pytest.raises(LoaderDiedError):
            kl.estimate_fisher(model, case.batches(), "classification")
        assert ([sorted(vars(m)) for m in model.modules()], [len(m._forward_hooks) for m in model.modules()]) == before
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_hooks_and_flags_of_the_user_stay():
    case = residual()
    calls = []
    case.model.first.register_forward_hook(lambda m, a, out: calls.append(out.shape))
    case.model.norm.weight.requires_grad_(False)
    kl.estimate_fisher(case.model, case.batches(5), "classification", layers=case.layers)
    assert len(case.model.first._forward_hooks) == 1
    assert len(calls) == 1
    flags = {name: p.requires_grad for name, p in case.model.named_parameters()}
    assert flags.pop("norm.weight") is False
    assert all(flags.values())


def test_random_states_stay():
    """Iterating over a DataLoader draws from torch's global generator; labels are drawn from our own."""
    case = cnn()
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=2, shuffle=True)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    posterior = kl.KronLaplace(case.model, "classification").fit(loader, sampling="mc")
    posterior.predict(case.inputs, link="mc")
    posterior.predict(case.inputs, method="sample")
    posterior.sample(3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradient_mode_of_the_caller_does_not_matter(mode):
    case = cnn()
    with mode():
        grad_mode = torch.is_grad_enabled()
        posterior = kl.KronLaplace(case.model, "classification").fit(case.batches())
        variance = posterior.functional_variance(case.inputs)
        assert torch.is_grad_enabled() is grad_mode
    torch.testing.assert_close(variance, posterior.functional_variance(case.inputs))
    assert not variance.requires_grad


def test_importing_prints_nothing_and_extends_nothing(capsys):
    case = cnn()
    kl.estimate_fisher(case.model, case.batches(), "classification", progress=True)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""  # not a terminal: no bar


# -- several passes, other architectures ---------------------------------------------------------------------

SOME_ARCHITECTURES = ["resnet18", "norms", "transformer", "lstm", "from_dict", "tied"]
SEVERAL_PASSES = {
    "kfoc": lambda: kl.KFOC(),
    "ekfac": lambda: kl.EKFAC(),
    "ekfac of kfoc": lambda: kl.EKFAC(basis=kl.KFOC()),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", SOME_ARCHITECTURES)
@pytest.mark.parametrize("name", SEVERAL_PASSES)
def test_a_whole_life_in_other_architectures_changes_nothing(name, network):
    case = ARCHITECTURES[network]()
    frozen = next(iter(case.model.parameters()))
    frozen.grad = torch.ones_like(frozen)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    before = everything(case.model)
    posterior = kl.KronLaplace(case.model, "classification", SEVERAL_PASSES[name]())
    posterior.fit(case.batches(), sampling="mc")
    posterior.sample(2)
    kl.relative_error(posterior.fisher, case.model, case.batches())
    if network != "from_dict":
        for options in ({}, {"link": "mc"}, {"method": "sample", "n_samples": 3}):
            posterior.predict(case.inputs, **options)
    assert_unchanged(case.model, before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]


class DiesLate:
    """A loader that ends with an exception in one of its passes."""

    def __init__(self, batches, dies_in):
        self.batches, self.dies_in, self.passes = batches, dies_in, 0

    def __iter__(self):
        number = self.passes = self.passes + 1
        yield self.batches[0]
        if number == self.dies_in:
            raise LoaderDiedError
        yield from self.batches[1:]


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", SOME_ARCHITECTURES)
@pytest.mark.parametrize("name", SEVERAL_PASSES)
def test_an_exception_in_the_last_pass_changes_nothing(name, network):
    case = ARCHITECTURES[network]()
    estimator = SEVERAL_PASSES[name]()
    good = kl.KronLaplace(case.model, "classification", estimator).fit(case.batches())
    evidence = good.log_marginal_likelihood()
    before, state = everything(case.model), torch.get_rng_state()
    loader = DiesLate(case.batches(), estimator.passes)
    with pytest.raises(LoaderDiedError):
        good.fit(loader)
    assert loader.passes == estimator.passes  # it died where it was meant to
    assert_unchanged(case.model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(good.log_marginal_likelihood(), evidence)  # the last good fit stays


@pytest.mark.parametrize("network", SOME_ARCHITECTURES)
def test_an_exception_in_the_network_changes_nothing(network):
    """In the middle of the forward pass, in modules that run written out, too."""
    case = ARCHITECTURES[network]()
    modules = [m for m in case.model.modules() if not list(m.children())]
    before = everything(case.model)

    def die(module, args):
        raise LoaderDiedError

    handle = modules[-1].register_forward_pre_hook(die)
    with pytest.raises(LoaderDiedError):
        kl.estimate_fisher(case.model, case.batches(), "classification", "ekfac")
    handle.remove()
    assert_unchanged(case.model, before)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "kfoc", "ekfac", "diagonal"])
def test_a_second_fit_needs_no_more_memory_than_the_first(estimator):
    """Nothing of a fit outlives it but the posterior."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 36, 20),
        torch.nn.Linear(20, 4),
    )
    data = [(torch.randn(16, 1, 8, 8), torch.randint(4, (16,))) for _ in range(3)]

    def fit():
        kl.KronLaplace(model, "classification", estimator).fit(data).tune()

    fit()  # what torch sets up once
    one = peak_bytes(fit)
    assert one > 10_000
    assert peak_bytes(lambda: [fit() for _ in range(3)]) <= 1.01 * one
