"""Every option of every layer type, and unusual wiring, against autograd; and the oracles against one another."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from kronlaplace.testing import check_layer
from tests.support import oracles
from tests.support.architectures import ARCHITECTURES
from tests.support.assertions import assert_blocks_are, assert_close
from tests.support.cases import case
from tests.support.problems import estimate, problem
from tests.support.tiers import examples


class Network(nn.Module):
    """One layer between the inputs and a random linear readout."""

    def __init__(self, layer, call, x, outputs=2):
        super().__init__()
        self.layer = layer.double()
        self.call = call
        self.head = nn.Linear(self.features(x).shape[1], outputs).double()

    def features(self, x):
        return torch.tanh(self.call(self.layer, x)).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


def check(layer, x, call=lambda layer, x: layer(x), sua=False, size=2):
    """All rules for a layer with factors, or the diagonal, against the oracles."""
    made = case(Network(layer, call, x), x, 2, "regression")
    data = oracles.gradients(made.model, x, "regression")
    rules = [
        (kl.KFAC(), oracles.kfac_expand),
        (kl.KFAC(weight_sharing="reduce"), oracles.kfac_reduce),
        (kl.TKFAC(), oracles.tkfac_exact),
        (kl.TKFAC(spatial="uncorrelated"), oracles.tkfac_uncorrelated),
        *([(kl.SUA(), oracles.sua)] if sua else []),
    ]
    for estimator, rule in rules:
        fisher = estimate(made, estimator, size)
        assert_blocks_are(fisher, data, lambda d, rule=rule: oracles.block_dense(rule, d))
    assert_blocks_are(estimate(made, kl.Diagonal(), size), data, lambda d: oracles.diagonal(d.X))


# -- options -------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw):
    """A convolution of one to three dimensions with any of its options and an input that it accepts."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 2 if dims == 3 else 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["valid", "same", "numbers"]))
    stride = (1,) * dims if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    size = tuple(d * (k - 1) + 1 + draw(st.integers(2, 3)) for k, d in zip(kernel, dilation, strict=True))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        inputs, outputs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()), padding_mode=mode
    )
    return layer, torch.randn(draw(st.integers(1, 3)), inputs, *size).double()


@st.composite
def transposed_convolutions(draw):
    """A transposed convolution of one to three dimensions with any of its options and an input that it accepts."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    options = {
        name: tuple(draw(st.integers(least, 2 if dims == 3 else most)) for _ in range(dims))
        for name, least, most in (("kernel_size", 1, 3), ("stride", 1, 3), ("dilation", 1, 2), ("padding", 0, 2))
    }
    options["output_padding"] = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(options["stride"], options["dilation"], strict=True)
    )
    size = tuple(2 + p for p in options["padding"])  # no output is empty
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](
        inputs, outputs, groups=groups, bias=draw(st.booleans()), **options
    )
    return layer, torch.randn(draw(st.integers(1, 3)), inputs, *size).double()


@settings(max_examples=examples(20))
@given(transposed_convolutions())
def test_transposed_convolutions(drawn):
    """The oracle for the factors is autograd's gradient, pixel by pixel."""
    layer, x = drawn
    made = case(Network(layer, lambda layer, x: layer(x), x), x, 2, "regression")
    (found,) = (la for la in kl.find_layers(made.model) if la.name == "layer")
    a, y = found.activations(x), layer(x)
    weight = found.matrix().unflatten(0, (found.groups, -1)).unsqueeze(1)
    assert_close(a @ weight.mT, found.gradients(y.detach()), 1e-10)
    assert_close(found.project(x, torch.eye(a.shape[3]).double().expand(found.groups, -1, -1)), a, 1e-12)
    check_layer(layer, torch.cat([x, x.flip(0) + 1]))
    for estimator in (kl.KFAC(), kl.TKFAC(), kl.SUA(), kl.Diagonal()):
        fisher = estimate(made, estimator)
        assert fisher["layer"].shares_weights_over_space
    exact = estimate(made, kl.ExactBlock())["layer"].to_dense()
    assert_close(torch.trace(exact), estimate(made, kl.TKFAC())["layer"].trace(), 1e-9)
    assert_close(exact.diag(), fisher["layer"].values.flatten(), 1e-9)


def test_transposed_convolution_with_an_output_size_of_its_own():
    """Which only the call tells: a diagonal block."""
    layer = nn.ConvTranspose1d(2, 3, 2, stride=2)
    x = torch.randn(4, 2, 3).double()
    made = case(Network(layer, lambda layer, x: layer(x, output_size=[7]), x), x, 2, "regression")
    assert estimate(made, kl.KFAC())["layer"].kind == "diagonal"
    exact = estimate(made, kl.ExactBlock())["layer"].to_dense()
    rows = [torch.autograd.grad(out, list(layer.parameters()), retain_graph=True) for out in made.model(x).flatten()]
    squares = sum(torch.cat([part.flatten() for part in row]).square().sum() for row in rows)
    assert_close(exact.trace(), squares / len(x), 1e-9)


@settings(max_examples=examples(30))
@given(convolutions())
def test_convolutions(drawn):
    layer, x = drawn
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        check(layer, x, sua=layer.padding_mode == "zeros")


@settings(max_examples=examples(20))
@given(st.data())
def test_linear_layers_with_any_number_of_axes(data):
    axes = data.draw(st.lists(st.integers(1, 3), max_size=2))
    layer = nn.Linear(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), bias=data.draw(st.booleans()))
    x = torch.randn(data.draw(st.integers(1, 4)), *axes, layer.in_features).double()
    check(layer, x, sua=all(length == 1 for length in axes))


@settings(max_examples=examples(25))
@given(st.data())
def test_recurrent_layers(data):
    draw = data.draw
    family, options = draw(
        st.sampled_from(
            [(nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {}), (nn.LSTM, {"proj_size": 2}), (nn.GRU, {})]
        )
    )
    layer = family(
        draw(st.integers(1, 3)),
        draw(st.integers(3, 4) if options.get("proj_size") else st.integers(1, 3)),
        num_layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        **options,
    )
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 4)), layer.input_size).double()
    given_state, use = draw(st.booleans()), draw(st.sampled_from(["sequence", "state"]))

    def call(layer, x):
        first = x.sum((1, 2))[None, :, None] * torch.linspace(-1, 1, layer.hidden_size, dtype=x.dtype)
        first = first.expand(layer.num_layers * (1 + layer.bidirectional), -1, -1).contiguous()
        short = first[..., : layer.proj_size or None].contiguous()
        state = ((short, first.cos()) if isinstance(layer, nn.LSTM) else first) if given_state else None
        sequence, state = layer(x if layer.batch_first else x.transpose(0, 1), state)
        if use == "sequence":
            return sequence if layer.batch_first else sequence.transpose(0, 1)
        # Both parts, so that all layers and directions reach the output.
        return torch.cat(state if isinstance(layer, nn.LSTM) else (state,), dim=2).transpose(0, 1)

    check(layer, x, call)


@settings(max_examples=examples(15))
@given(st.data())
def test_recurrent_cells(data):
    draw = data.draw
    family, options = draw(
        st.sampled_from([(nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"}), (nn.LSTMCell, {}), (nn.GRUCell, {})])
    )
    layer = family(draw(st.integers(1, 3)), draw(st.integers(1, 3)), bias=draw(st.booleans()), **options)
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 3)), layer.input_size).double()
    zeros_first = draw(st.booleans())

    def call(layer, x):
        state = None
        if zeros_first:
            state = x.new_zeros(len(x), layer.hidden_size)
            state = (state, state) if isinstance(layer, nn.LSTMCell) else state
        for step in x.unbind(1):
            state = layer(step, state)
        return state[1] if isinstance(state, tuple) else state

    check(layer, x, call)


@settings(max_examples=examples(20))
@given(st.data())
def test_attention(data):
    draw = data.draw
    heads = draw(st.integers(1, 2))
    layer = nn.MultiheadAttention(
        heads * draw(st.integers(1, 2)), heads, bias=draw(st.booleans()), batch_first=draw(st.booleans())
    )
    x = torch.randn(draw(st.integers(1, 3)), draw(st.integers(1, 4)), layer.embed_dim).double()
    masked, weights = draw(st.booleans()), draw(st.booleans())

    def call(layer, x):
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if masked else None
        x = x if layer.batch_first else x.transpose(0, 1)
        out, _ = layer(x, x, x, attn_mask=mask, need_weights=weights)
        return out if layer.batch_first else out.transpose(0, 1)

    check(layer, x, call)


@pytest.mark.quick(1)
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_between_sequences_of_two_lengths(batch_first):
    """Each group has positions of its own: as many as the query has, as many as key and value have."""
    layer = nn.MultiheadAttention(2, 2, batch_first=batch_first)

    def call(layer, x):
        query, key, value = x[:, :2], x[:, 2:], x[:, 2:].cos()
        streams = (query, key, value) if batch_first else (s.transpose(0, 1) for s in (query, key, value))
        out, _ = layer(*streams, need_weights=False)
        return out if batch_first else out.transpose(0, 1)

    x = torch.randn(3, 5, 2).double()
    check(layer, x, call)


@pytest.mark.quick(1)
@pytest.mark.parametrize("bias", [True, False])
def test_attention_whose_keys_and_values_have_sizes_of_their_own(bias):
    """Each matrix is a block of its own; the biases, one parameter, are a block whose only input is the 1."""
    layer = nn.MultiheadAttention(2, 1, kdim=3, vdim=1, bias=bias, batch_first=True)

    def call(layer, x):
        return layer(x[:, :2, :2], x[:, 1:], x[:, 1:, 2:].cos(), need_weights=False)[0]

    check(layer, torch.randn(3, 4, 3).double(), call)


NORMS = {
    "batch1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "batch1d-sequence": (lambda: nn.BatchNorm1d(2), (2, 3)),
    "batch2d": (lambda: nn.BatchNorm2d(2), (2, 3, 2)),
    "batch3d": (lambda: nn.BatchNorm3d(2), (2, 2, 1, 3)),
    "layer": (lambda: nn.LayerNorm(3), (3,)),
    "layer-tokens": (lambda: nn.LayerNorm(3), (2, 3)),
    "layer-image": (lambda: nn.LayerNorm((2, 3)), (2, 2, 3)),
    "layer-no-bias": (lambda: nn.LayerNorm(3, bias=False), (2, 3)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "group-image": (lambda: nn.GroupNorm(1, 2), (2, 2, 3)),
    "instance1d": (lambda: nn.InstanceNorm1d(2, affine=True), (2, 3)),
    "instance2d": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), (2, 2, 3)),
    "instance3d": (lambda: nn.InstanceNorm3d(2, affine=True), (2, 2, 2, 2)),
    "root": (lambda: nn.RMSNorm(3), (2, 3)),
    "root-image": (lambda: nn.RMSNorm((2, 3), eps=1e-3), (2, 3)),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", NORMS)
def test_normalisations_have_diagonal_blocks(name):
    make, shape = NORMS[name]
    layer = make().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    check(layer, torch.randn(3, *shape).double())


@settings(max_examples=examples(10))
@given(st.data())
def test_embeddings_have_diagonal_blocks(data):
    draw = data.draw
    padding = draw(st.sampled_from([None, 0]))
    layer = nn.Embedding(draw(st.integers(2, 5)), draw(st.integers(1, 3)), padding_idx=padding)
    shape = (draw(st.integers(1, 4)), *draw(st.lists(st.integers(1, 3), max_size=2)))
    check(layer, torch.randint(layer.num_embeddings, shape))


# -- names ---------------------------------------------------------------------------------------------------


def names(model, x):
    made = case(model, x, 2)
    fisher = kl.estimate_fisher(made.model, [made.inputs], "classification", "kfac", sampling="exact")
    return {name: tuple(block.shape) for name, block in fisher.items()}


def test_names_and_shapes_of_recurrent_blocks():
    x = torch.randn(2, 3, 4).double()

    def of(layer):
        found = names(Network(layer, lambda layer, x: layer(x)[0], x), x)
        return {name: shape for name, shape in found.items() if name != "head"}

    assert of(nn.RNN(4, 5, batch_first=True)) == {"layer": (5, 10)}
    assert of(nn.RNN(4, 5, batch_first=True, bias=False)) == {"layer": (5, 9)}
    assert of(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True)) == {
        "layer.l0": (20, 10),
        "layer.l0_reverse": (20, 10),
        "layer.l1": (20, 16),
        "layer.l1_reverse": (20, 16),
    }
    assert of(nn.GRU(4, 5, batch_first=True)) == {"layer.ih_l0": (15, 5), "layer.hh_l0": (15, 6)}
    assert of(nn.GRU(4, 5, batch_first=True, bidirectional=True)) == {
        "layer.ih_l0": (15, 5),
        "layer.hh_l0": (15, 6),
        "layer.ih_l0_reverse": (15, 5),
        "layer.hh_l0_reverse": (15, 6),
    }


def test_names_and_shapes_of_cells():
    x = torch.randn(2, 4).double()
    assert names(Network(nn.RNNCell(4, 5), lambda layer, x: layer(x), x), x)["layer"] == (5, 10)
    assert names(Network(nn.LSTMCell(4, 5), lambda layer, x: layer(x)[0], x), x)["layer"] == (20, 10)
    of_gru = names(Network(nn.GRUCell(4, 5), lambda layer, x: layer(x, x.new_ones(len(x), 5)), x), x)
    assert of_gru["layer.ih"] == (15, 5)
    assert of_gru["layer.hh"] == (15, 6)


def test_names_and_shapes_of_attention():
    x = torch.randn(2, 3, 4).double()
    found = names(Network(nn.MultiheadAttention(4, 2, batch_first=True), lambda layer, x: layer(x, x, x)[0], x), x)
    assert found["layer.in_proj"] == (12, 5)
    assert found["layer.out_proj"] == (4, 5)


def test_factors_of_groups_are_stacked():
    made, _ = problem("depthwise")
    block = estimate(made, kl.KFAC())["2"]
    assert block.shape == (3, 9)
    assert block.gradient_factor.shape == (3, 1, 1)
    assert block.activation_factor.shape == (3, 9, 9)


@pytest.mark.quick(2)
@pytest.mark.parametrize("network", ARCHITECTURES)
def test_layers_can_be_chosen_by_the_names_of_their_modules(network):
    """A module alone gives what it gives among all; also if another one shares its parameters."""
    made, data = problem(network)
    whole = estimate(made, kl.TKFAC())
    owners = list(dict.fromkeys(d.block.parameters[0].rpartition(".")[0] for d in data.values()))
    for name in owners if len(owners) < 12 else owners[::9]:
        one = estimate(made, kl.TKFAC(), layers=[name])
        assert [block for block, d in data.items() if d.block.parameters[0].startswith(f"{name}.")] == list(one)
        for block in one:
            assert_close(one[block].to_dense(), whole[block].to_dense(), 1e-12, block)


# -- wiring --------------------------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    """Inside, the examples are on the second axis."""

    def __init__(self):
        super().__init__()
        self.token = nn.Linear(2, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.token(x.transpose(0, 1))).mean(0))


class Broadcast(nn.Module):
    """The positions are embedded once for all examples."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(4, 3)
        self.position = nn.Embedding(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.token(x) + self.position(torch.arange(x.shape[1]))).mean(1))


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("kind", ["time first", "broadcast"])
def test_axes_that_are_not_the_examples_are_never_taken_for_them(kind, n):
    """With as many examples as time steps the shapes say nothing. Right or refused, but never silently wrong."""
    model, x = {
        "time first": lambda: (TimeFirst(), torch.randn(n, 3, 2)),
        "broadcast": lambda: (Broadcast(), torch.randint(4, (n, 3))),
    }[kind]()
    made = case(model, x, 2)
    data = oracles.gradients(made.model, made.inputs, made.likelihood)
    try:
        fisher = estimate(made, kl.TKFAC(), n)
    except (NotImplementedError, ValueError):
        return
    assert_blocks_are(fisher, data, lambda d: oracles.block_dense(oracles.tkfac_exact, d))


class Custom(nn.Module):
    """A parameter of no known layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.gain = Gain()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.gain(self.first(x)))


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return torch.tanh(self.value * x)


def test_unsupported_modules_are_refused_by_name_or_fixed_on_request():
    made = case(Custom(), torch.randn(4, 3), 2)
    with pytest.raises(NotImplementedError, match="gain"):
        estimate(made, kl.KFAC(), unsupported="error")
    fisher = estimate(made, kl.KFAC(), unsupported="fixed")
    assert list(fisher) == ["first", "head"]
    left_out = estimate(made, kl.KFAC(), layers=["first", "head"])
    for name in fisher:
        assert_close(fisher[name].to_dense(), left_out[name].to_dense(), 1e-15, name)
    assert made.model.gain.value.requires_grad
    with pytest.raises(ValueError, match="unsupported"):
        estimate(made, kl.KFAC(), unsupported="ignore")


@pytest.mark.parametrize("estimator", ["kfac", "tkfac", "ekfac", "kfoc"])
@pytest.mark.parametrize("network", ARCHITECTURES)
def test_the_network_is_left_as_it_was_found(network, estimator):
    """No hook, no changed method, attribute, flag, gradient or output, in any architecture."""
    torch.manual_seed(0)
    made = ARCHITECTURES[network]()

    def state():
        return {
            name: (
                m.training,
                {k: id(v) for k, v in vars(m).items() if not k.startswith("_")},
                [len(getattr(m, hooks)) for hooks in vars(m) if hooks.endswith("_hooks")],
                type(m).forward,
            )
            for name, m in made.model.named_modules()
        }

    parameters = {n: (p.clone(), p.requires_grad) for n, p in made.model.named_parameters()}
    before, output = state(), made.model(made.inputs)
    estimate(made, estimator, layers=None)
    assert state() == before
    assert torch.equal(made.model(made.inputs), output)
    for name, parameter in made.model.named_parameters():
        value, flag = parameters[name]
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == flag
        assert parameter.grad is None
