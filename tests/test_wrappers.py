"""Wrapped networks: compiled, parallel, averaged, and modules of training frameworks are the network inside."""

import types

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import kronlaplace as kl
from kronlaplace._wrappers import unwrapped
from tests.support.assertions import assert_close

# A torch that breaks a graph at a hook reads `.grad` of tensors, and hides the warning of that from itself only.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "distributed": nn.parallel.DistributedDataParallel,
    "averaged": AveragedModel,
    "averaged and parallel": lambda model: AveragedModel(nn.DataParallel(model)),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request):
    if request.param == "distributed":
        request.getfixturevalue("process_group")
    yield WRAPPERS[request.param](network())
    if request.param == "compiled":
        torch.compiler.reset()


@pytest.mark.quick(2)
def test_a_wrapped_network_is_fitted_as_the_network_inside(wrapped, tmp_path):
    x, y = data()
    plain = kl.KronLaplace(network(), "classification").fit([(x, y)]).tune()
    posterior = kl.KronLaplace(wrapped, "classification").fit([(x, y)]).tune()
    inside = unwrapped(wrapped)
    assert posterior.model is inside and type(inside) is nn.Sequential
    assert list(posterior.fisher) == ["0", "2"] and [layer.name for layer in kl.find_layers(wrapped)] == ["0", "2"]
    torch.testing.assert_close(posterior.predict(x), plain.predict(x), rtol=0, atol=0)
    wrapped(x)
    posterior.predict(x)  # a call of the wrapper changes nothing
    plain.save(tmp_path / "plain")
    loaded = kl.KronLaplace.load(tmp_path / "plain", AveragedModel(network()))
    torch.testing.assert_close(loaded.predict(x), plain.predict(x))
    fisher = kl.estimate_fisher(wrapped, [(x, y)], "classification", layers=["0"])
    assert list(fisher) == ["0"]
    assert list(kl.relative_error(fisher, wrapped, [(x, y)])) == ["0"]


@pytest.mark.quick(2)
def test_a_memory_of_a_wrapped_network(wrapped, tmp_path):
    x, y = data()
    memory = kl.ContinualLaplace(wrapped, "classification")
    memory.consolidate([(x, y)])
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter += 0.1
    assert memory.penalty() > 0
    memory.save(tmp_path / "memory")
    again = kl.ContinualLaplace.load(tmp_path / "memory", wrapped)
    torch.testing.assert_close(again.penalty(), memory.penalty())


def train(optimizer, model, steps=3):
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.update_curvature(outputs)
        nn.functional.cross_entropy(outputs, y).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.quick(3)
def test_an_optimizer_of_a_wrapped_network(wrapped):
    """The training loop calls the wrapper, and the optimizer watches the network inside."""
    plain = network()
    expected = train(kl.NaturalGradient(plain, "classification"), plain)
    for actual, parameter in zip(train(kl.NaturalGradient(wrapped, "classification"), wrapped), expected, strict=True):
        assert_close(actual, parameter, 1e-10)


def test_a_module_compiled_in_place_is_trained():
    model, plain = network(), network()
    model.compile(backend="eager")
    expected = train(kl.NaturalGradient(plain, "classification"), plain)
    for actual, parameter in zip(train(kl.NaturalGradient(model, "classification"), model), expected, strict=True):
        assert_close(actual, parameter, 1e-10)
    torch.compiler.reset()


def test_a_network_compiled_before_the_optimizer_was_made():
    model = network()
    fast = compiled(model)
    fast(data()[0])
    optimizer = kl.NaturalGradient(model, "classification")
    with pytest.raises(RuntimeError, match=r"call torch\.compiler\.reset"):
        train(optimizer, fast)
    torch.compiler.reset()
    train(optimizer, fast)
    torch.compiler.reset()


def test_a_compiled_transformer_layer_is_trained():
    """Attention runs written out while it is observed, also inside compiled code."""

    def transformer():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), layer, nn.Flatten(), nn.Linear(12, 2)).double()

    model, plain = transformer(), transformer()
    expected = train(kl.NaturalGradient(plain, "classification"), plain)
    for actual, parameter in zip(
        train(kl.NaturalGradient(model, "classification"), compiled(model)), expected, strict=True
    ):
        assert_close(actual, parameter, 1e-8)
    torch.compiler.reset()


class LightningLike(nn.Module):
    """What matters of a LightningModule: the forward pass is the network's, and a trainer may refer back to it."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self._trainer = types.SimpleNamespace(model=self, lightning_module=self)

    @property
    def trainer(self):
        raise RuntimeError("not attached to a Trainer")

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)


def test_a_lightning_module_is_an_ordinary_module():
    x, y = data()
    module = LightningLike().eval()
    posterior = kl.KronLaplace(module, "classification").fit([(x, y)]).tune()
    plain = kl.KronLaplace(network(), "classification").fit([(x, y)]).tune()
    assert list(posterior.fisher) == ["net.0", "net.2"]
    torch.testing.assert_close(posterior.predict(x), plain.predict(x), rtol=0, atol=0)
    optimizer = kl.NaturalGradient(module, "classification")
    assert len(train(optimizer, module)) == 4


def test_an_average_of_iterates_goes_into_a_wrapper():
    average = kl.IterateAverage(nn.DataParallel(network()), timescale=2)
    target = network()
    with torch.no_grad():
        target[0].weight.zero_()
    average.copy_to(AveragedModel(target))
    average.copy_to(target)
    assert torch.equal(target[0].weight, network()[0].weight)


@pytest.mark.parametrize("value", [None, "model", nn.Linear(2, 2)])
def test_anything_else_stays(value):
    assert unwrapped(value) is value
