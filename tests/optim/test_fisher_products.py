"""Derivatives of outputs along directions against Jacobians by autograd, row by row, and Fisher products against them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace.optim.fisher_products import fisher_inner_products, jacobian_products, outputs_at, part_of_batch
from tests.support.architectures import ARCHITECTURES
from tests.support.likelihoods import cases, draw, expected_metric, make
from tests.support.networks import CASES
from tests.support.unchanged import assert_unchanged, everything


class Projected(nn.Module):
    """A recurrent layer with projections, which has no forward mode of its own."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, proj_size=2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


class Dropped(nn.Module):
    """Dropout in torch's own attention, in an encoder layer, and between the layers of an LSTM."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3, batch_first=True)
        self.rnn = nn.LSTM(4, 3, num_layers=2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.rnn(self.encoder(x))[0].mean(1))


class Exponential(torch.autograd.Function):
    """A function without ``jvp``, so that it has no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.exp()


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.drop(Exponential.apply(self.norm(self.first(x)))))


def network(name):
    if name in ("own", "projected"):
        model, shape = (Own(), (4, 3)) if name == "own" else (Projected(), (4, 5, 3))
        return model.double(), torch.randn(shape).double()
    if name == "dropped":
        return Dropped().double(), torch.randn(4, 3, 4).double()
    case = {**ARCHITECTURES, **CASES}[name]()
    return case.model, case.inputs


def draw_directions(model, k=2):
    return [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(k)]


def jacobian_rows(model, x, seed):
    """The outputs and their Jacobian ``(numel, P)`` by one backward pass for each output of a copy of the network."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    f = model(x)
    rows = []
    for output in f.flatten():
        grads = torch.autograd.grad(output, [*model.parameters()], retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return f.detach(), torch.stack(rows)


def flat(direction, model):
    return torch.cat([direction[name].flatten() for name, _ in model.named_parameters()])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *CASES, "dropped", "own", "projected"])
def test_products_with_the_jacobian(name, training):
    model, x = network(name)
    model.train(training)
    directions = draw_directions(model)
    f, rows = jacobian_rows(model, x, seed=3)
    torch.manual_seed(3)
    outputs, products = jacobian_products(model, (x,), {}, directions)
    torch.testing.assert_close(outputs, f)
    for direction, product in zip(directions, products, strict=True):
        torch.testing.assert_close(product.flatten(), rows @ flat(direction, model), rtol=1e-8, atol=1e-10)
        assert not product.requires_grad
    assert not outputs.requires_grad


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["residual", "dropped", "lstm", "own", "tied"])
def test_nothing_changes(name, training):
    """Running statistics, modes, hooks, gradients, the random state, and the last pass that an observer saw."""
    model, x = network(name)
    model.train(training)
    directions = draw_directions(model)
    layers = [layer for layer in kl.find_layers(model) if layer.has_kronecker_factors]
    with kl.NetworkObserver(model, layers, layout=kl.find_layout(model, x, layers)) as observer:
        f = model(x)
        seen, calls = dict(observer.inputs), sum(map(len, observer.inputs.values()))
        state, given = torch.get_rng_state(), x.clone()
        values = {key: value.clone() for key, value in model.state_dict().items()}
        jacobian_products(model, (x,), {}, directions)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(x, given)
        assert dict(observer.inputs) == seen
        assert sum(map(len, observer.inputs.values())) == calls
        assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
        observer.layer_batches(len(f))
        received = []
        observer.backward(f, torch.ones_like(f), lambda g: received.append(g.layer.name), retain_graph=True)
        assert sorted(received) == sorted(layer.name for layer in layers)
        f.sum().backward()
    before = everything(model)
    jacobian_products(model, (x,), {}, directions)
    assert_unchanged(model, before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["residual", "transformer", "lstm", "dropped", "tied"])
def test_outputs_at_other_weights(name, training):
    """At the network's own weights they are exactly those that the products come with, dropout included."""
    model, x = network(name)
    model.train(training)
    (direction,) = directions = draw_directions(model, 1)
    f, (product,) = jacobian_products(model, (x,), {}, directions)
    assert torch.equal(outputs_at(model, (x,), {}, {}), f)
    step = 1e-5
    ahead, behind = (
        outputs_at(model, (x,), {}, {name: p.detach() + s * direction[name] for name, p in model.named_parameters()})
        for s in (step, -step)
    )
    torch.testing.assert_close((ahead - behind) / (2 * step), product, rtol=1e-4, atol=1e-6)


def test_inputs_that_the_network_changes_stay_as_they_were():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
    x = torch.randn(4, 3)
    given = x.clone()
    jacobian_products(model, (x,), {}, draw_directions(model))
    assert torch.equal(x, given)


def test_all_directions_see_the_same_dropout():
    model, x = network("dropped")
    direction = draw_directions(model, 1)[0]
    _, (first, second) = jacobian_products(model.train(), (x,), {}, [direction, direction])
    assert torch.equal(first, second)


def test_a_direction_of_some_parameters():
    """The others stay constant; one that the outputs do not depend on has a derivative of zero."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model.unused = nn.Parameter(torch.randn(2).double())
    model[0].requires_grad_(False)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    x, v = torch.randn(5, 3).double(), torch.randn(2, 4).double()
    f, (product, nothing) = jacobian_products(model, (x,), {}, [{"2.weight": v}, {"unused": torch.ones(2).double()}])
    torch.testing.assert_close(product, torch.tanh(model[0](x)) @ v.T)
    assert torch.equal(nothing, torch.zeros_like(f))


def test_half_precision_is_the_callers():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    directions = draw_directions(model, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, (product,) = jacobian_products(model, (x,), {}, directions)
    assert outputs.dtype == product.dtype == torch.bfloat16
    _, (exact,) = jacobian_products(model, (x,), {}, directions)
    torch.testing.assert_close(product.float(), exact, rtol=0.05, atol=0.05)


def test_outputs_in_an_object_and_keywords():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, *, inputs):
            return {"logits": self.linear(inputs["x"])}

    model, x = Wrapped(), torch.randn(4, 3)
    f, (product,) = jacobian_products(model, (), {"inputs": {"x": x}}, [{"linear.weight": torch.ones(2, 3)}])
    torch.testing.assert_close(f, model.linear(x))
    torch.testing.assert_close(product, x.sum(1, keepdim=True).expand(4, 2))


def test_an_operation_that_supports_neither():
    model = nn.Sequential(nn.EmbeddingBag(5, 3), nn.Linear(3, 2))
    with pytest.raises(NotImplementedError, match="neither in forward mode nor twice"):
        jacobian_products(model, (torch.zeros(4, 3, dtype=torch.long),), {}, draw_directions(model))


def test_directions_that_do_not_fit():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"\['wait'\]"):
        jacobian_products(model, (x,), {}, [{"wait": torch.ones(2, 3)}])
    with pytest.raises(ValueError, match=r"'weight' is \(2, 3\), got \(3, 2\)"):
        jacobian_products(model, (x,), {}, [{"weight": torch.ones(3, 2)}])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["residual", "transformer", "lstm"])
def test_inner_products_are_those_of_the_dense_gauss_newton_matrix(name, training):
    model, x = network(name)
    model.train(training)
    directions = draw_directions(model, 3)
    f, rows = jacobian_rows(model, x, seed=0)
    p = torch.softmax(f, dim=1)
    metric = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    blocks = rows.view(len(f), -1, rows.shape[1])
    dense = sum(j.T @ m @ j for j, m in zip(blocks, metric, strict=True)) / len(f)
    vectors = torch.stack([flat(direction, model) for direction in directions])
    torch.manual_seed(0)
    actual = fisher_inner_products(kl.Categorical(), *jacobian_products(model, (x,), {}, directions))
    torch.testing.assert_close(actual, vectors @ dense @ vectors.T, rtol=1e-8, atol=1e-10)
    assert torch.equal(actual, actual.T)


@pytest.mark.quick(5)
@cases
def test_inner_products_of_every_likelihood(name, shape):
    f, y = draw(name, shape)
    metric = expected_metric(name, f, y)
    products = [torch.randn_like(f) for _ in range(2)]
    flattened = torch.stack([product.reshape(len(f), -1) for product in products])
    expected = torch.einsum("ani,nij,bnj->ab", flattened, metric, flattened) / len(f)
    torch.testing.assert_close(fisher_inner_products(make(name), f, products, y), expected)
    single = fisher_inner_products(make(name), f.float(), [product.float() for product in products], y)
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, expected, rtol=1e-5, atol=1e-6)


def test_part_of_a_batch():
    x, mask, shared, tokens = torch.randn(10, 3), torch.ones(10), torch.randn(4, 3), torch.zeros(10, 2)
    args, kwargs = part_of_batch((x, {"mask": mask}, 3), {"shared": shared, "tokens": tokens}, 1 / 4, 10)
    assert torch.equal(args[0], x[:3])
    assert torch.equal(args[1]["mask"], mask[:3])
    assert args[2] == 3
    assert kwargs["shared"] is shared
    assert torch.equal(kwargs["tokens"], tokens[:3])
    assert part_of_batch((x,), {}, 1, 10)[0][0] is x
    assert len(part_of_batch((torch.zeros(30),), {}, 0.1, 30)[0][0]) == 3
    assert part_of_batch((x.T,), {}, 1 / 2, 10, axis=1)[0][0].shape == (3, 5)
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match="fraction"):
            part_of_batch((x,), {}, fraction, 10)


def test_a_user_who_trains_on_meanwhile_is_not_disturbed():
    """The graph of the user's own pass can still be differentiated."""
    model, x = network("residual")
    model.train()
    loss = F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long))
    jacobian_products(model, (x,), {}, draw_directions(model))
    loss.backward()
