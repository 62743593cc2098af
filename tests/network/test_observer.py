"""An observer on a forward pass that somebody else runs, and what an optimizer needs of the core."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from tests.support.networks import mlp

EXACT = kl.DirectionSampling("exact")


def convolutional(dropout=0.3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 25, 8),
        nn.Dropout(dropout),
        nn.Tanh(),
        nn.Linear(8, 3),
    ).double()


class Tagger(nn.Module):
    """Modules that run written out while they are observed, with dropout in all of them."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, num_layers=2, bidirectional=True, dropout=0.4, batch_first=True)
        self.attention = nn.MultiheadAttention(12, 3, dropout=0.2, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        h, _ = self.rnn(x)
        h, _ = self.attention(h, h, h, need_weights=False)
        return self.head(h.mean(1))


def tagger():
    torch.manual_seed(0)
    return Tagger().double()


def batches(model, n=4):
    shape = (6, 5, 4) if isinstance(model, Tagger) else (6, 1, 5, 5)
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(shape, generator=generator, dtype=torch.float64),
            torch.randint(3, (6,), generator=generator),
        )
        for _ in range(n)
    ]


def train(model, observe):
    """A training loop as a user writes it; with an observer, curvature is taken between forward pass and loss."""
    torch.manual_seed(7)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trace = []
    layout = kl.find_layout(model, batches(model)[0][0]) if observe else None
    observer = kl.NetworkObserver(model, kl.find_layers(model), layout=layout) if observe else None
    accumulation = kl.Accumulation(kl.KFAC(), observer.layers, ema_decay=0.9) if observe else None
    for step, (x, y) in enumerate(batches(model)):
        optimizer.zero_grad()
        f = model(x)
        if observe:
            sampling = kl.DirectionSampling("mc")
            kl.accumulate_batch(observer, f, kl.Categorical(), sampling, accumulation, index=step, retain_graph=True)
            trace.append(None)
        F.cross_entropy(f, y).backward()
        trace[step:] = [[f.detach().clone(), *(p.grad.clone() for p in model.parameters())]]
        optimizer.step()
    if observe:
        observer.close()
    return trace, accumulation


def flags(model):
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), "forward" in vars(m))
        for m in model.modules()
    ]
    return hooks, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


@pytest.mark.parametrize("make", [convolutional, tagger])
def test_a_training_loop_is_what_it_would_be_without(make):
    """Outputs, gradients, weights, buffers, random numbers, flags, hooks; with batch norm and dropout in training mode."""
    alone, observed = make(), make()
    observed.train()
    before = flags(observed)
    expected, _ = train(alone, observe=False)
    random_state = torch.get_rng_state()
    found, accumulation = train(observed, observe=True)
    assert torch.equal(torch.get_rng_state(), random_state)
    written_out = make is tagger
    for left, right in zip(itertools.chain(*expected), itertools.chain(*found), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-10 if written_out else 0, atol=1e-12 if written_out else 0)
    for left, right in zip(alone.state_dict().values(), observed.state_dict().values(), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-10, atol=1e-12)
    assert flags(observed) == before
    assert all(torch.isfinite(block.trace()) and block.trace() > 0 for block in accumulation.finish().values())


def test_factors_in_training_mode_are_those_of_the_pass_that_ran():
    """Inputs and gradients by autograd, of the same pass: batch statistics, dropout masks and all."""
    model = convolutional().train()
    seen = {}

    def keep(name):
        def hook(_, args, output):
            seen[name] = args[0].detach().clone(), output

        return hook

    for name in ("1", "4", "7"):
        model[int(name)].register_forward_hook(keep(name))
    model[2].inplace = False
    with kl.NetworkObserver(model, kl.find_layers(model)) as observer:
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        x, y = batches(model)[0]
        f = model(x)
        kl.accumulate_batch(observer, f, kl.Categorical(), EXACT, accumulation, targets=y, retain_graph=True)
    blocks = accumulation.finish()
    directions = list(kl.Categorical().directions(f.detach(), kl.Sampling.EXACT))
    grads = {
        name: [torch.autograd.grad(f, out, d, retain_graph=True)[0] for d in directions]
        for name, (_, out) in seen.items()
    }
    for name in ("4", "7"):
        a = F.pad(seen[name][0], (0, 1), value=1.0)
        torch.testing.assert_close(blocks[name].activation_factor, a.T @ a / len(x))
        expected = sum(g.T @ g for g in grads[name]) / len(x)
        torch.testing.assert_close(blocks[name].gradient_factor, expected)
    inputs = seen["1"][0]
    normalized = (inputs - inputs.mean((0, 2, 3), keepdim=True)) / (
        inputs.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    squares = sum(torch.stack([(g * normalized).sum((2, 3)), g.sum((2, 3))], dim=2).square().sum(0) for g in grads["1"])
    torch.testing.assert_close(blocks["1"].values, squares / len(x))


@pytest.mark.quick(2)
@pytest.mark.parametrize("estimator", [kl.KFAC(), kl.TKFAC(), kl.KFOC(aggregation="running"), kl.Diagonal()])
@pytest.mark.parametrize("sampling", ["exact", "mc", "empirical"])
@pytest.mark.filterwarnings("ignore:sampling")
def test_user_run_batches_add_up_to_the_estimate(estimator, sampling):
    model = convolutional().eval()
    data = batches(model)
    expected = kl.estimate_fisher(model, data, "classification", estimator, sampling=sampling, seed=3)
    with kl.NetworkObserver(model, kl.find_layers(model)) as observer:
        accumulation = kl.Accumulation(estimator, observer.layers)
        for index, (x, y) in enumerate(data):
            draws = kl.DirectionSampling(sampling, seed=3)
            kl.accumulate_batch(observer, model(x), kl.Categorical(), draws, accumulation, targets=y, index=index)
    blocks = accumulation.finish()
    for name, block in expected.items():
        torch.testing.assert_close(blocks[name].to_dense(), block.to_dense(), rtol=1e-10, atol=1e-14)


def test_layers_behind_parameters_that_are_not_observed():
    """Two branches: one begins with an observed layer, the other behind a trainable one that is not observed."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.stem, self.right = nn.Linear(3, 2), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.left(x) + self.right(torch.tanh(self.stem(x)))

    model = Branches().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    with kl.NetworkObserver(model, kl.find_layers(model, ["left", "right"])) as observer:
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        kl.accumulate_batch(observer, model(x), kl.Gaussian(), EXACT, accumulation)
    expected = kl.estimate_fisher(model, [x], "regression", sampling="exact", layers=["left", "right"])
    for name, block in accumulation.finish().items():
        torch.testing.assert_close(block.to_dense(), expected[name].to_dense())


def test_only_the_last_pass_counts_and_passes_without_gradients_are_not_seen():
    model = mlp().model
    x = torch.randn(4, next(model.parameters()).shape[1], dtype=torch.float64)
    with kl.NetworkObserver(model, kl.find_layers(model)) as observer:
        model(2 * x)
        f = model(x)
        with torch.no_grad():
            model(3 * x)
        observer.enabled = False
        model(4 * x)
        observer.enabled = True
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        kl.accumulate_batch(observer, f, kl.Gaussian(), EXACT, accumulation)
    expected = kl.estimate_fisher(model, [x], "regression", sampling="exact")
    for name, block in accumulation.finish().items():
        torch.testing.assert_close(block.to_dense(), expected[name].to_dense())


def test_a_copy_of_an_observed_network_is_not_observed():
    model = tagger().eval()
    x = batches(model)[0][0]
    observer = kl.NetworkObserver(model, kl.find_layers(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = model(x)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        observer.clear()
        torch.testing.assert_close(other(x), expected)
        assert not observer.inputs
    observer.close()
    del observer


def test_an_observer_that_is_forgotten_does_nothing():
    model = convolutional().eval()
    x = batches(model)[0][0]
    expected = model(x)
    kl.NetworkObserver(model, kl.find_layers(model))
    torch.testing.assert_close(model(x), expected)


def test_without_a_pass_it_says_so():
    model = mlp().model
    with kl.NetworkObserver(model, kl.find_layers(model)) as observer:
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        with pytest.raises(RuntimeError, match="no forward pass was observed: call the model"):
            kl.accumulate_batch(observer, torch.randn(3, 2), kl.Gaussian(), EXACT, accumulation)


def test_where_shapes_do_not_tell_a_layout_is_asked_for():
    """Inputs that are standardized inside the network come from nowhere that was seen."""

    class Standardizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)

        def forward(self, x):
            return self.linear((x - 1) / 2 + 0 * self.norm(x))

    model = Standardizing().double().train()
    x = torch.randn(5, 3, dtype=torch.float64)
    with kl.NetworkObserver(model, kl.find_layers(model)) as observer:
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        with pytest.raises(NotImplementedError, match=r"'linear'.*layout=kl\.find_layout\(model, inputs\)"):
            kl.accumulate_batch(observer, model(x), kl.Gaussian(), EXACT, accumulation)
    state = copy.deepcopy(model.state_dict())
    layout = kl.find_layout(model, x)
    assert model.training and all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    with kl.NetworkObserver(model, kl.find_layers(model), layout=layout) as observer:
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        kl.accumulate_batch(observer, model(x), kl.Gaussian(), EXACT, accumulation)
    a = F.pad((x - 1) / 2, (0, 1), value=1.0)
    torch.testing.assert_close(accumulation.finish()["linear"].activation_factor, a.T @ a / 5)


def test_derivatives_inside_the_forward_pass_are_refused():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(torch.tanh(self.linear(x)).sum(), x, create_graph=True)[0]

    model = Energy()
    with kl.NetworkObserver(model, kl.find_layers(model)) as observer:
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        with pytest.raises(NotImplementedError, match="takes derivatives inside its forward pass"):
            kl.accumulate_batch(observer, model(torch.randn(2, 3)), kl.Gaussian(), EXACT, accumulation)


# -- Moving averages -----------------------------------------------------------------------------------------------


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "estimator", [kl.KFAC(), kl.KFAC(weight_sharing="reduce"), kl.TKFAC(), kl.Diagonal(), kl.ExactBlock()]
)
def test_a_moving_average_starts_from_given_factors(estimator):
    """KFC Eq. 33: after k batches the factors are ``ξ^k Ω₀ + (1 − ξ) Σ ξ^(k−j) Ω_j``."""
    model = convolutional().eval()
    decay, size = 0.8, 6
    first, *data = batches(model)

    def factors(fisher):
        for block in fisher.values():
            if not isinstance(block, kl.KroneckerBlock):
                yield block.to_dense()
            elif isinstance(estimator, kl.TKFAC):  # its sums are the partial traces
                yield block.scale * block.gradient_factor
                yield block.scale * block.activation_factor
            else:
                yield block.gradient_factor
                yield block.activation_factor

    def estimate(batch):
        return kl.estimate_fisher(model, [batch], "classification", estimator, sampling="exact")

    start = estimate(first)
    with kl.NetworkObserver(model, kl.find_layers(model)) as observer:
        accumulation = kl.Accumulation(estimator, observer.layers, ema_decay=decay)
        accumulation.start_from(start, size / (1 - decay))
        for x, y in data:
            kl.accumulate_batch(observer, model(x), kl.Categorical(), EXACT, accumulation, targets=y)
        found = accumulation.so_far()
    expected = [decay ** len(data) * f for f in factors(start)]
    for j, batch in enumerate(data, start=1):
        share = (1 - decay) * decay ** (len(data) - j)
        expected = [total + share * f for total, f in zip(expected, factors(estimate(batch)), strict=True)]
    for left, right in zip(factors(found), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-13)


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    "estimator", [kl.KFAC(), kl.TKFAC(), kl.KFOC(aggregation="running"), kl.KFOC(sweeps=1), kl.Diagonal()]
)
def test_what_it_starts_from_comes_out_again(estimator):
    model = convolutional().eval()
    start = kl.estimate_fisher(model, batches(model), "classification", estimator)
    accumulation = kl.Accumulation(estimator, kl.find_layers(model))
    accumulation.start_from(start, 12)
    assert accumulation.weight == 12
    for name, block in accumulation.finish().items():
        torch.testing.assert_close(block.to_dense(), start[name].to_dense(), rtol=1e-9, atol=1e-13)


def test_what_cannot_be_started_from_is_refused():
    model = convolutional().eval()
    start = kl.estimate_fisher(model, batches(model), "classification")
    layers = kl.find_layers(model)
    for estimator in (kl.EKFAC(), kl.SUA(), kl.KFOC(), kl.KFOC(aggregation="full"), kl.KFOC(aggregation="approx")):
        with pytest.raises(NotImplementedError, match="cannot start from a given block"):
            kl.Accumulation(estimator, layers).start_from(start, 1)
    with pytest.raises(TypeError, match="needs a DenseBlock to start from, got a KroneckerBlock"):
        kl.Accumulation(kl.ExactBlock(), layers).start_from(start, 1)
    with pytest.raises(ValueError, match=r"no blocks to start from for the layers \['7'\]"):
        kl.Accumulation(kl.KFAC(), layers).start_from({name: start[name] for name in ("0", "1", "4")}, 1)
    with pytest.raises(ValueError, match="weight must be"):
        kl.Accumulation(kl.KFAC(), layers).start_from(start, 0)


# -- Values and directions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [convolutional, tagger])
def test_directions_split_linearly_and_values_split_back(make):
    model = make()
    for layer in kl.find_layers(model):
        assert not any(part.any() for part in layer.split_directions(torch.zeros(layer.shape)).values())
        values = layer.split_values(layer.matrix())
        for name, parameter in layer.parameters.items():
            torch.testing.assert_close(values[name], parameter.detach())
        m, n = torch.randn(2, *layer.shape, dtype=torch.float64)
        both = layer.split_directions(torch.stack([m, n]))
        for name, part in layer.split_directions(m - 2 * n).items():
            torch.testing.assert_close(both[name][0] - 2 * both[name][1], part)
        torch.testing.assert_close(layer.assemble(layer.split_directions(m)), m)


# -- The metric of the outputs -------------------------------------------------------------------------------------


OUTPUTS = {
    "categorical": (kl.Categorical(), (4, 3), None),
    "pixels": (kl.Categorical(class_axis=1), (2, 3, 2, 2), (2, 2, 2)),
    "tokens": (kl.Categorical(class_axis=-1), (2, 4, 3), (2, 4)),
    "bernoulli": (kl.Bernoulli(), (3, 2), None),
    "one number": (kl.Bernoulli(), (5,), None),
    "gaussian": (kl.Gaussian(0.3), (3, 2), None),
    "euclidean": (kl.Euclidean(), (3, 2, 2), None),
    "heteroscedastic": (kl.HeteroscedasticGaussian(), (3, 4), None),
}


@pytest.mark.parametrize("name", OUTPUTS)
@given(seed=st.integers(0, 1000))
def test_metric_product_is_that_of_the_directions(name, seed):
    """``M v`` with ``M = Σ d dᵀ`` for one vector and for several, also by the formula that a new likelihood inherits."""
    likelihood, shape, labels = OUTPUTS[name]
    generator = torch.Generator().manual_seed(seed)
    f = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    v = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    targets = None if labels is None else torch.randint(3, labels, generator=generator)
    if targets is not None:
        targets[0, 0] = -100
    directions = torch.stack(list(likelihood.directions(f, kl.Sampling.EXACT, targets=targets)))
    flat = directions.flatten(2) if f.ndim > 1 else directions.unsqueeze(2)
    metric = torch.einsum("vni,vnj->nij", flat, flat)
    expected = torch.einsum("nij,knj->kni", metric, v.reshape(2, len(f), -1)).reshape(v.shape)
    torch.testing.assert_close(likelihood.metric_product(f, v, targets), expected)
    torch.testing.assert_close(likelihood.metric_product(f, v[0], targets), expected[0])
    torch.testing.assert_close(kl.Likelihood._metric_product(likelihood, f, v, targets), expected)


def test_vectors_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"vectors must have the shape of the outputs, \(4, 3\)"):
        kl.Categorical().metric_product(torch.zeros(4, 3), torch.zeros(4, 2))


# -- Fishers from blocks alone -------------------------------------------------------------------------------------


def test_a_fisher_of_blocks_alone(tmp_path):
    model = convolutional().eval()
    known = kl.estimate_fisher(model, batches(model), "classification", sampling="mc")
    with kl.NetworkObserver(model, kl.find_layers(model)) as observer:
        accumulation = kl.Accumulation(kl.KFAC(), observer.layers)
        for index, (x, y) in enumerate(batches(model)):
            kl.accumulate_batch(
                observer, model(x), kl.Categorical(), kl.DirectionSampling("mc"), accumulation, targets=y, index=index
            )
    fisher = kl.KroneckerFisher(accumulation.finish(), 24)
    fisher.save(tmp_path / "fisher")
    loaded = kl.KroneckerFisher.load(tmp_path / "fisher")
    for other in (fisher, loaded, loaded.to("cpu"), loaded.restricted_to(list(loaded))):
        assert other.n_examples == 24 and not other.has_metadata
        assert "n_examples=24" in repr(other)
        assert [row.layer for row in other.coverage()] == list(known)
        for damping in (
            kl.damping.Tikhonov(0.1),
            kl.damping.TraceRestrictedAuto(0.05),
            kl.damping.FactoredTikhonov(0.1),
        ):
            together, expected = damping.invert_all(other), damping.invert_all(known)
            by_name = damping.invert_all(dict(other))
            for name, block in other.items():
                for inverse in (together[name], by_name[name], damping.invert(block)):
                    torch.testing.assert_close(inverse.eigenvalues, expected[name].eigenvalues)
    with pytest.raises(ValueError, match="built from blocks alone"):
        fisher.metadata  # noqa: B018 - looking is what fails
    with pytest.raises(ValueError, match="built from blocks alone"):
        kl.relative_error(fisher, model, batches(model))


def test_a_posterior_takes_a_fisher_of_blocks_alone(tmp_path):
    """One object for several uses: what a training loop accumulated becomes a posterior."""
    model = convolutional().eval()
    data = batches(model)
    expected = kl.KronLaplace(model, "classification").fit(data)
    fisher = kl.KroneckerFisher(dict(expected.fisher), 24, statistics=expected.fisher.statistics)
    posterior = kl.KronLaplace(model, "classification").fit(fisher=fisher)
    x = data[0][0]
    torch.testing.assert_close(posterior.predict(x), expected.predict(x))
    torch.testing.assert_close(posterior.log_marginal_likelihood(), expected.log_marginal_likelihood())
    assert str(posterior.fisher.coverage()) == str(expected.fisher.coverage())
    posterior.save(tmp_path / "posterior")
    torch.testing.assert_close(kl.KronLaplace.load(tmp_path / "posterior", model).predict(x), expected.predict(x))
    other = kl.KroneckerFisher({name: block for name, block in fisher.items() if name != "7"}, 24)
    with pytest.raises(ValueError, match=r"has no blocks for the layers \['7'\]"):
        kl.KronLaplace(model, "classification").fit(fisher=other)
