"""Layers observed in training mode: what they report adds up to autograd's gradients, with batch norms and dropout."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace.layers import UnusableLayersError
from kronlaplace.network.layer_checks import check_observed
from kronlaplace.network.observer import NetworkObserver


def images(*shape):
    return torch.randn(6, *shape, generator=torch.Generator().manual_seed(1)).double()


class Residual(nn.Module):
    """Without running statistics, and an in-place sum behind a norm."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4, momentum=None), nn.Dropout2d(0.3))
        self.head = nn.Linear(4, 3)

    def forward(self, x, scale=1.0):
        h = F.relu(self.norm(self.convolution(scale * x)))
        h = F.relu(self.inner(h) + h, inplace=True)
        return self.head(h.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.rnn = nn.LSTM(4, 5, num_layers=2, dropout=0.4, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, dropout=0.2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h, _ = self.rnn(self.norm(x).mT)
        h, _ = self.attention(h, h, h, need_weights=False)
        return self.head(h.mean(1))


def perceptron():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, affine=True), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(6, 3)
    )


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.2),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(100, 5),
        nn.LayerNorm(5),
        nn.Dropout(0.5),
        nn.Linear(5, 3),
    )


NETWORKS = {
    "perceptron": (perceptron, (4,)),
    "convolutional": (convolutional, (2, 5, 5)),
    "residual": (Residual, (2, 7, 7)),
    "recurrent": (Recurrent, (4, 5)),
}


def network(name):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make().double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # scales away from one, shifts away from zero
            parameter += 0.3 * torch.randn_like(parameter)
    return model, images(*shape)


def observe(model, x):
    return NetworkObserver(model, kl.find_layers(model), layout=kl.find_layout(model, x))


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def check(observer, f, independent=False):
    check_observed(observer, f, generator(), examples_independent=independent)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_examples_gradients_add_up_to_autograds(name):
    """Of the summed loss, with all that batch norms couple, in the pass that ran."""
    model, x = network(name)
    y = torch.randint(3, (6,), generator=generator())
    with observe(model, x) as observer:
        f = model(x)
        loss = F.cross_entropy(f, y, reduction="sum")
        expected = {
            layer.name: layer.assemble(
                {
                    key: torch.autograd.grad(loss, parameter, retain_graph=True)[0]
                    for key, parameter in layer.parameters.items()
                }
            )
            for layer in observer.layers
        }
        found = {}

        def receive(gradients):
            total, _ = gradients.total_weight_gradient()
            by_example = gradients.weight_gradients().sum(1).flatten(0, 1)
            torch.testing.assert_close(by_example, total)
            found[gradients.layer.name] = total

        observer.layer_batches(len(x))
        (direction,) = torch.autograd.grad(loss, f, retain_graph=True)
        observer.backward(f, direction, receive, retain_graph=False)
    assert len(found) == len(expected) > 3 or name == "perceptron"
    assert set(found) == set(expected)
    for layer, total in found.items():
        torch.testing.assert_close(total, expected[layer], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_squares_of_a_batch_norm_are_those_of_its_own_pass(name):
    """The diagonal block of every norm, from the input and gradient that hooks of torch see."""
    model, x = network(name)
    seen = {}

    def keep(module, args, output):
        seen[module] = args[0].detach(), output

    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for module in norms:
        module.register_forward_hook(keep)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with observe(model, x) as observer:
        f = model(x)
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        sampling = kl.DirectionSampling("exact")
        kl.accumulate_batch(observer, f, kl.Categorical(), sampling, accumulation, retain_graph=True)
    blocks = accumulation.finish()
    by_module = {layer.module: layer for layer in observer.layers}
    for module in norms:
        before, out = seen[module]
        rest = tuple(range(2, before.ndim))
        axes = (0, *rest)
        centered = before - before.mean(axes, keepdim=True)
        normalized = centered / (before.var(axes, keepdim=True, unbiased=False) + module.eps).sqrt()
        expected = 0
        for d in kl.Categorical().directions(f.detach(), kl.Sampling.EXACT):
            (g,) = torch.autograd.grad(f, out, d, retain_graph=True)
            columns = [(g * normalized), g]
            per_example = torch.stack([c.sum(rest) if rest else c for c in columns], dim=-1)
            expected = expected + per_example.square().sum(0) / len(x)
        torch.testing.assert_close(blocks[by_module[module].name].values, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NETWORKS)
def test_checks_pass_and_leave_everything_as_it_is(name):
    model, x = network(name)
    with observe(model, x) as observer:
        f = model(x)
        f.sum().backward(retain_graph=True)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        check(observer, f)
        assert torch.equal(torch.get_rng_state(), random_state)
        for before, after in zip(gradients, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
            assert torch.equal(before, after)
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        f.sum().backward()  # the graph is still there


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norms_couple_the_examples(name):
    """Which only matters to those who say that examples are independent; in evaluation mode they are."""
    model, x = network(name)
    with observe(model, x) as observer:
        if name == "recurrent":  # whose norm comes first: no layer is below it
            check(observer, model(x), independent=True)
        else:
            with pytest.raises(UnusableLayersError, match="rows do not belong to the examples one by one"):
                check(observer, model(x), independent=True)
        if name != "residual":  # which has no running statistics
            model.eval()
            check(observer, model(x), independent=True)


class Elsewhere(nn.Module):
    def __init__(self, mixes):
        super().__init__()
        self.first, self.last, self.mixes = nn.Linear(4, 4), nn.Linear(4, 3), mixes

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h.flip(0) if self.mixes else h @ self.first.weight)


def test_uses_that_no_call_accounts_for_are_found():
    model = Elsewhere(mixes=False).double().train()
    with NetworkObserver(model, kl.find_layers(model)) as observer:
        f = model(images(4))
        for independent in (False, True):
            with pytest.raises(UnusableLayersError, match="the calls of layer 'first' do not account") as caught:
                check(observer, f, independent)
        assert list(caught.value.reasons) == ["first"]


def test_examples_in_another_order_are_found():
    model = Elsewhere(mixes=True).double().train()
    with NetworkObserver(model, kl.find_layers(model)) as observer:
        f = model(images(4))
        check(observer, f)
        with pytest.raises(UnusableLayersError, match=r"one by one and in order: \['first'\]"):
            check(observer, f, independent=True)


def test_one_example_has_nothing_to_be_mixed_with():
    model = Elsewhere(mixes=True).double()
    with NetworkObserver(model, kl.find_layers(model)) as observer:
        check(observer, model(images(4)[:1]), independent=True)


def test_under_autocast():
    model = perceptron().train()
    with NetworkObserver(model, kl.find_layers(model)) as observer, torch.autocast("cpu", torch.bfloat16):
        f = model(images(4).float())
        assert f.dtype is torch.bfloat16
        check(observer, f)


def test_without_a_pass():
    model = perceptron()
    observer = NetworkObserver(model, kl.find_layers(model))
    with pytest.raises(RuntimeError, match="no forward pass was observed"):
        check(observer, torch.zeros(6, 3))


def test_arguments_are_kept_as_long_as_their_pass():
    torch.manual_seed(0)
    model, x = network("residual")
    observer = NetworkObserver(model, kl.find_layers(model))
    assert observer.arguments is None
    scale = torch.ones((), dtype=torch.float64)
    f = model(x, scale=scale)
    args, kwargs = observer.arguments
    assert args[0] is x
    assert kwargs == {"scale": scale}
    assert len(args) == 1
    torch.manual_seed(5)
    first = model(x, scale=scale)
    torch.manual_seed(5)
    args, kwargs = observer.arguments
    assert torch.equal(model(*args, **kwargs), first)
    with torch.no_grad():
        model(2 * x)  # not observed
    assert observer.arguments[0][0] is x
    x = torch.randn_like(x)
    released = weakref.ref(x)
    model(x)
    assert observer.arguments[0][0] is released()
    del x, args, kwargs, f, first
    observer.clear()
    gc.collect()
    assert observer.arguments is None
    assert released() is None
    model(torch.zeros(6, 2, 7, 7, dtype=torch.float64))
    observer.close()
    assert observer.arguments is None
