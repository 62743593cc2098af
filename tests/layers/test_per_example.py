"""Parameters whose use no rule describes: their blocks and predictions, against autograd on one example at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import kronlaplace as kl
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.one_batch import accumulate_batch
from kronlaplace.likelihoods import Sampling
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.observer import NetworkObserver
from tests.support.assertions import assert_close

N = 5


class Tokens(nn.Module):
    """A class token and a position embedding in front of a layer."""

    def __init__(self):
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 4, 4))
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = torch.tanh(self.body(x))
        return self.head(x[:, 0] * x[:, 1:].mean(1))


class Branch(nn.Module):
    """A residual branch with a scale of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x + self.scale * torch.tanh(self.layer(x))


class NormAndActivation(nn.LayerNorm):
    def forward(self, x):
        return F.gelu(super().forward(x))


class ScaleOfTwo(nn.Module):
    """The input twice, as two arguments."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.bilinear(x, torch.tanh(x))


class TiedByFunction(nn.Module):
    """An embedding whose table a function uses once more."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(torch.tanh(self.body(self.table(x).mean(1))), self.table.weight)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.full((len(x),), 3), batch_first=True)
        return self.head(self.recurrent(packed)[1][0][0])


class Experts(nn.Module):
    """Each example goes through one of two experts."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 3)

    def forward(self, x):
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = ((x[:, 0] > 0) == bool(i)).nonzero().squeeze(1)
            if len(chosen):
                result = result.index_add(0, chosen, torch.tanh(expert(x[chosen])))
        return self.head(result)


def between(*modules):
    return nn.Sequential(nn.Linear(4, 4), *modules, nn.Tanh(), nn.Linear(4, 3))


def bias_alone():
    model = between()
    model[0].weight.requires_grad_(False)
    return model


def sharing_some():
    model = between(nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def weight_norm(kind):
    return between(nn.Tanh(), kind(nn.Linear(4, 4)))


CASES = {
    "class token": (Tokens, (3, 4)),
    "scale of a branch": (lambda: between(Branch()), (4,)),
    "norm and activation": (lambda: between(NormAndActivation(4)), (4,)),
    "norm and activation of tokens": (
        lambda: nn.Sequential(between(NormAndActivation(4))[:3], nn.Flatten(), nn.Linear(8, 3)),
        (2, 4),
    ),
    "activation": (lambda: between(nn.PReLU(4)), (4,)),
    "bilinear": (lambda: between(ScaleOfTwo()), (4,)),
    "tied by a function": (TiedByFunction, None),
    "packed sequences": (Packed, (3, 4)),
    "experts": (Experts, (4,)),
    "bias alone": (bias_alone, (4,)),
    "some shared parameters": (sharing_some, (4,)),
    "weight norm": (lambda: weight_norm(nn.utils.parametrizations.weight_norm), (4,)),
    "orthogonal": (lambda: weight_norm(nn.utils.parametrizations.orthogonal), (4,)),
    "spectral norm": (lambda: weight_norm(nn.utils.parametrizations.spectral_norm), (4,)),
}


def made(name):
    make, shape = CASES[name]
    torch.manual_seed(1)
    model = make().double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    if shape is None:
        return model, torch.randint(3, (N, 4))
    x = torch.randn(N, *shape).double()
    x[..., 0] = x[..., 0].abs() * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).view(-1, *[1] * (len(shape) - 1))
    return model, x


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def jacobians(model, fisher, x):
    """By autograd, one example and output at a time: ``(N, C, P)`` for each block, in the order of its matrix."""
    layers = {layer.name: layer for layer in kl.find_layers(model)}
    own = {key: p for key, p in model.named_parameters() if p.requires_grad}
    result = {name: [] for name in fisher}
    for one in x:
        outputs = model(one[None])[0]
        grads = [torch.autograd.grad(o, list(own.values()), retain_graph=True, allow_unused=True) for o in outputs]
        for name in fisher:
            rows = []
            for grad in grads:
                filled = {
                    k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(own.items(), grad, strict=True)
                }
                rows.append(layers[name].assemble({k: filled[k] for k in layers[name].parameter_names}).flatten())
            result[name].append(torch.stack(rows))
    return {name: torch.stack(rows) for name, rows in result.items()}


@pytest.mark.quick(16)
@pytest.mark.parametrize("estimator", ["exact", "diagonal"])
@pytest.mark.parametrize("name", CASES)
def test_blocks_and_variances_are_those_of_autograd(name, estimator, tmp_path):
    model, x = made(name)
    before = copy.deepcopy(model.state_dict())
    posterior = kl.KronLaplace(model, "regression", estimator).fit(
        [(x[:2], torch.zeros(2, 3)), (x[2:], torch.zeros(3, 3))]
    )
    J = jacobians(model, posterior.fisher, x)
    assert sum(row.parameters for row in posterior.fisher.coverage() if row.shape) == trainable(model)
    expected = 0
    for layer, block in posterior.fisher.items():
        exact = torch.einsum("ncp,ncq->pq", J[layer], J[layer]) / N
        exact = exact if estimator == "exact" else exact.diag().diag()
        assert_close(block.to_dense(), exact, 1e-8, layer)
        precision = N * exact + torch.eye(len(exact)).double()
        expected = expected + J[layer] @ torch.linalg.inv(precision) @ J[layer].mT
    assert_close(posterior.functional_variance(x), expected, 1e-8)
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = kl.KronLaplace.load(tmp_path / "posterior.safetensors", model)
    assert_close(loaded.functional_variance(x), expected, 1e-8)
    assert all(
        float(error) < 1e-6 or estimator != "exact"
        for error in kl.relative_error(
            posterior.fisher, model, [(x[:2], torch.zeros(2, 3)), (x[2:], torch.zeros(3, 3))]
        ).values()
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules() if name != "orthogonal")


@pytest.mark.parametrize("name", CASES)
def test_coverage_says_by_which_rule(name):
    model, x = made(name)
    fisher = kl.estimate_fisher(model, [x], "regression")
    assert fisher.coverage().share == pytest.approx(trainable(model) / sum(p.numel() for p in model.parameters()))
    notes = {row.layer: row.note for row in fisher.coverage() if row.block == "diagonal"}
    assert any("per-example gradients of the " in note for note in notes.values())


def test_parameters_without_effect_are_left_out():
    """Also if only some batches use them, they have a block; else the reason is told."""
    model, x = made("experts")
    positive = x.abs()
    fisher = kl.estimate_fisher(model, [positive], "regression")
    assert list(fisher) == ["experts.1", "head"]
    assert fisher.coverage().reasons() == {"experts.0": "the network's outputs do not depend on it"}
    assert list(kl.estimate_fisher(model, [x], "regression")) == ["experts.0", "experts.1", "head"]


def test_predictions_have_gradients_with_respect_to_the_inputs():
    model, x = made("class token")
    posterior = kl.KronLaplace(model, "regression").fit([(x, torch.zeros(N, 3))])
    x = x[:2].clone().requires_grad_()

    def variance(x):
        return posterior.functional_variance(x, differentiable=True)

    assert torch.autograd.gradcheck(variance, (x,), atol=1e-6)


def test_a_norm_by_any_name_is_its_type():
    """A subclass that computes the same as its parent is one; weights of random values show it."""

    class Renamed(nn.LayerNorm):
        def forward(self, hidden_states):
            return F.layer_norm(hidden_states, self.normalized_shape, self.weight, self.bias, self.eps)

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    same, other = between(Renamed(4)), between(Doubled(4, 4))
    assert [type(layer).__name__ for layer in kl.find_layers(same)] == [
        "LinearLayer",
        "NormalizationLayer",
        "LinearLayer",
    ]
    assert [type(layer).__name__ for layer in kl.find_layers(other)] == ["LinearLayer", "ModuleLayer", "LinearLayer"]
    nn.init.zeros_(other[1].weight)
    nn.init.zeros_(other[1].bias)
    assert [type(layer).__name__ for layer in kl.find_layers(other)][1] == "ModuleLayer"


class Product(nn.Module):
    """A matrix product by another name, as in `Conv1D` of transformers (``transposed``)."""

    def __init__(self, inputs, outputs, transposed, bias):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(*(inputs, outputs) if transposed else (outputs, inputs)))
        self.offset = nn.Parameter(torch.randn(outputs)) if bias else None
        self.transposed = transposed

    def forward(self, x):
        y = x @ (self.matrix if self.transposed else self.matrix.T)
        return y if self.offset is None else y + self.offset


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("size", [4, 5])
def test_matrix_products_by_any_name_have_kronecker_factors(size, transposed, bias):
    """The oracle is the same network with a linear layer."""
    torch.manual_seed(0)
    own = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Product(4, size, transposed, bias), nn.Tanh(), nn.Linear(size, 2))
    linear = nn.Linear(4, size, bias=bias)
    linear.load_state_dict(
        {"weight": own[2].matrix.T if transposed else own[2].matrix} | ({"bias": own[2].offset} if bias else {})
    )
    plain = copy.deepcopy(own)
    plain[2] = linear
    x = torch.randn(6, 2, 3)
    found, expected = (kl.estimate_fisher(m.double(), [x.double().mean(1)], "regression") for m in (own, plain))
    assert found["2"].kind == "kronecker"
    for name in expected:
        assert_close(found[name].to_dense(), expected[name].to_dense(), 1e-12, name)


@pytest.mark.parametrize("sampling", ["mc", "exact"])
def test_in_training_it_is_the_square_of_the_gradient_of_the_batch(sampling):
    """Averaged over drawn labels, or over random signs of the examples, that is the diagonal of the Fisher."""
    model, x = made("class token")
    expected = kl.estimate_fisher(model, [x], "classification")[""].values
    with NetworkObserver(model, kl.find_layers(model)) as observer:
        accumulation = Accumulation(kl.KFAC(), observer.layers)
        outputs = model(x)
        many = 1000 if sampling == "mc" else 300
        for i in range(1 if sampling == "mc" else many):
            draws = DirectionSampling(Sampling(sampling), many if sampling == "mc" else 1, seed=0)
            accumulate_batch(
                observer, outputs, kl.Categorical(), draws, accumulation, index=i, retain_graph=True, n_examples=4
            )
        found = accumulation.finish()[""].values
    assert float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected)) < 0.2
    assert all(p.grad is None for p in model.parameters())


def test_an_optimizer_trains_what_no_rule_describes():
    model, x = made("class token")
    y = torch.arange(N) % 3
    losses = []
    with kl.NaturalGradient(model, "classification") as optimizer:
        for _ in range(20):
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.update_curvature(outputs)
            loss = F.cross_entropy(outputs, y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert optimizer.blocks[""].kind == "diagonal"
    assert losses[-1] < 0.3 * losses[0]
