"""Changed weights are noticed, however they changed; everything else is not taken for a change."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from kronlaplace.network import fingerprint as module
from kronlaplace.network.fingerprint import WeightsGuard, fingerprint
from tests.support.networks import mlp

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
LAYOUTS = ["contiguous", "transposed", "channels last", "cut out", "every second"]


def holder(tensor):
    model = nn.Module()
    model.register_buffer("other", torch.ones(3))
    model.register_buffer("tensor", tensor)
    return model


def made(shape, dtype, layout="contiguous"):
    generator = torch.Generator().manual_seed(0)
    if layout == "transposed":
        return made((shape[1], shape[0], *shape[2:]), dtype).transpose(0, 1)
    if layout == "channels last":
        return made((shape[0], *shape[2:], shape[1]), dtype).movedim(-1, 1)
    if layout == "cut out":  # nothing is where a word of memory begins
        return made((1 + shape[0] * shape[1] * shape[2],), dtype)[1:].view(shape)
    if layout == "every second":
        return made((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]
    return (100 * torch.rand(shape, generator=generator)).to(dtype)


def past_the_counter(tensor, change):
    version = tensor._version
    change(tensor.data)
    assert tensor._version == version


def flipped_bit(index, bit):
    """One bit of one number."""

    def change(data):
        whole = data.contiguous().flatten()
        in_bytes = whole.view(torch.uint8) if whole.dtype != torch.bool else whole.to(torch.uint8)
        in_bytes[index % len(in_bytes)] ^= 1 << (bit if whole.dtype != torch.bool else 0)
        data.copy_(whole.view(data.shape) if whole.dtype != torch.bool else in_bytes.view(data.shape).bool())

    return change


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beginning", [16, 2**14], ids=["long", "short"])
@given(index=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_bit_that_changes_is_noticed(beginning, dtype, layout, index, bit):
    """Past the version counter, in tensors that are compared whole and in those whose ends are summed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BEGINNING", beginning)
        model = holder(made((3, 5, 7), dtype, layout))
        guard = WeightsGuard(model, fingerprint(model))
        assert guard.changed() is None
        past_the_counter(model.tensor, flipped_bit(index, bit))
        assert guard.changed() == "tensor"
        past_the_counter(model.tensor, flipped_bit(index, bit))
        assert guard.changed() is None


CHANGES = {
    "scaled": lambda data: data.mul_(2),
    "negated": lambda data: data.neg_(),
    "a little": lambda data: data.add_(1e-3),
    "one": lambda data: data.view(-1)[-1:].add_(1e-6),
    "zero": lambda data: data.zero_(),
    "in memory": lambda data: data.numpy().__setitem__(..., 3),
    "trained": lambda data: torch._foreach_add_([data], 0.1),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("tensor", ["big.weight", "big.bias", "norm.weight", "norm.running_mean", "norm.running_var"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_predictions_with_changed_data_are_refused(tensor, name, dtype):
    """``weight.data.mul_(2)`` has a version counter of its own; parameters with and without a posterior, and buffers."""
    model = nn.Sequential()
    model.add_module("big", nn.Linear(200, 128))
    model.add_module("norm", nn.BatchNorm1d(128))
    model.add_module("head", nn.Linear(128, 2))
    model = model.to(dtype).eval()
    nn.init.uniform_(model.norm.running_mean)
    x, y = torch.randn(6, 200, dtype=dtype), torch.tensor([0, 1, 0, 1, 0, 1])
    posterior = kl.KronLaplace(model, "classification", layers=["head"]).fit([(x, y)])
    posterior.predict(x)
    data = model.state_dict()[tensor].data if "running" in tensor else model.get_parameter(tensor).data
    if name == "negated" and tensor == "norm.running_var":
        data = data[:1]
    CHANGES[name](data)
    for call in (
        lambda: posterior.predict(x),
        lambda: posterior.predict([(x, y)]),
        lambda: posterior.predict(x, method="sample", n_samples=2),
        lambda: posterior.functional_variance(x),
        lambda: posterior.sample(1),
        lambda: posterior.log_marginal_likelihood(),
        lambda: posterior.tune("validation", data=[(x, y)]),
        posterior.covariance,
        posterior.tune,
    ):
        with pytest.raises(RuntimeError, match=rf"'{tensor}' changed after the posterior was fitted"):
            call()


def test_what_is_no_change():
    """Other places, other counts of threads, values that are there again, NaN in a buffer."""
    case = mlp()
    case.model.register_buffer("unused", torch.full((3,), float("nan")))
    guard = WeightsGuard(case.model, fingerprint(case.model))
    state = copy.deepcopy(case.model.state_dict())
    with torch.no_grad():
        case.model[0].weight.zero_()
    assert guard.changed() == "0.weight"
    case.model.load_state_dict(state)
    assert guard.changed() is None
    case.model[0].weight.data = case.model[0].weight.data.clone()
    assert guard.changed() is None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert guard.changed() is None
    torch.set_num_threads(threads)


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:the validation loss is smallest at the edge")
def test_values_are_read_once_in_a_call_with_many_batches(monkeypatch):
    """An accelerator is waited for once, whatever the number of batches."""
    case = mlp()
    posterior = kl.KronLaplace(case.model, "classification").fit(case.batches())
    looks = []
    original = module._look
    monkeypatch.setattr(module, "_look", lambda model: looks.append(1) or original(model))
    loader = [x for x, _ in case.batches(1)]
    assert len(loader) == 7
    for call in (
        lambda: posterior.predict([(x,) for x in loader]),
        lambda: posterior.functional_variance([(x,) for x in loader]),
        lambda: posterior.predict(case.inputs, method="sample", n_samples=3),
        lambda: posterior.tune("validation", data=case.batches(1), grid=[1.0, 2.0, 3.0]),
        lambda: posterior.sample(3),
    ):
        looks.clear()
        call()
        assert len(looks) == 1
