"""K-FAC and KFC factors against definitions by autograd, and against code that we did not write."""

import curvlinops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from kronlaplace.layers import ConvolutionLayer
from tests.support import oracles
from tests.support.networks import CASES, cnn, mlp
from tests.support.tiers import examples

RTOL = 1e-10


def relative(a, b):
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b))


def assert_factors_are(fisher, name, A, G):
    block = fisher[name]
    assert relative(block.activation_factor, A) < RTOL
    assert relative(block.scale * block.gradient_factor, G) < RTOL


@pytest.mark.quick(3)
@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression"])
@pytest.mark.parametrize("network", CASES)
def test_exact_factors_equal_their_definition(network, likelihood):
    case = CASES[network](likelihood)
    fisher = kl.estimate_fisher(case.model, case.batches(), likelihood, sampling="exact", layers=case.layers)
    assert list(fisher) == case.layers
    assert fisher.n_examples == len(case.inputs)
    for name in case.layers:
        A, G = oracles.kfac_factors(case.model, case.model.get_submodule(name), case.inputs, likelihood)
        assert_factors_are(fisher, name, A, G)


@st.composite
def convolutions(draw):
    """A convolution of one, two or three dimensions with any of its options, and an input size that it accepts."""
    dims = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["valid", "same", "numbers"]))
    stride = (1,) * dims if padding == "same" else tuple(draw(st.integers(1, 3)) for _ in range(dims))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    # Large enough for the (dilated) kernel, and for paddings that need as much input.
    size = tuple(d * (k - 1) + 1 + draw(st.integers(2, 3)) for k, d in zip(kernel, dilation, strict=True))
    channels = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        *channels, kernel, stride, padding, dilation, bias=draw(st.booleans()), padding_mode=mode
    )
    return layer, size, draw(st.integers(1, 3))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=examples(150))
@given(convolutions())
def test_kfc_equals_its_definition_for_every_option_of_a_convolution(drawn):
    layer, size, n = drawn
    x = torch.randn(n, layer.in_channels, *size).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    model(x)
    fisher = kl.estimate_fisher(model, [x], "regression", sampling="exact")
    A, G = oracles.kfac_factors(model, layer, x, "regression")
    assert_factors_are(fisher, "0", A, G)


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("way", ["rows", "columns", "patches"])
@settings(max_examples=examples(60))
@given(convolutions())
def test_every_way_to_the_activation_factor_of_a_convolution(way, drawn):
    """Which one is taken depends on sizes; here each is, wherever it applies."""
    layer, size, n = drawn
    x = torch.randn(n, layer.in_channels, *size).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    model(x)
    applies = {
        "rows": len(size) == 2 and layer.padding_mode == "zeros",
        "columns": len(size) == 2 and layer.stride[1] == 1,
        "patches": True,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvolutionLayer, "_rows_pay", lambda layer, x: way == "rows" and applies[way])
        patch.setattr(ConvolutionLayer, "_columns_pay", lambda layer: way == "columns" and applies[way])
        fisher = kl.estimate_fisher(model, [x[:1], x], "regression", sampling="exact")
    A, _ = oracles.kfac_factors(model, layer, torch.cat([x[:1], x]), "regression")
    assert relative(fisher["0"].activation_factor, A) < RTOL


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("kernel", "dilation"), [((2, 4), 1), ((2, 3), (3, 1))])
def test_same_padding_that_is_not_symmetric(kernel, dilation):
    """An even total of padding cannot be halved: torch puts the larger half at the end."""
    layer = nn.Conv2d(1, 2, kernel, padding="same", dilation=dilation)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(2 * 5 * 6, 2)).double()
    x = torch.randn(3, 1, 5, 6).double()
    fisher = kl.estimate_fisher(model, [x], "regression", sampling="exact")
    A, G = oracles.kfac_factors(model, layer, x, "regression")
    assert_factors_are(fisher, "0", A, G)


def test_patches_may_be_unfolded_a_few_examples_at_a_time(monkeypatch):
    case = cnn()
    whole = kl.estimate_fisher(case.model, case.batches(5), "classification", sampling="exact")
    monkeypatch.setattr("kronlaplace.layers.convolution._SMALL", 1)
    monkeypatch.setattr(ConvolutionLayer, "_rows_pay", lambda layer, x: False)
    monkeypatch.setattr(ConvolutionLayer, "_columns_pay", lambda layer: False)
    parts = kl.estimate_fisher(case.model, case.batches(5), "classification", sampling="exact")
    for name in whole:
        torch.testing.assert_close(parts[name].activation_factor, whole[name].activation_factor, rtol=1e-12, atol=1e-14)


@pytest.mark.quick(2)
@pytest.mark.parametrize("sampling", ["exact", "empirical"])
@pytest.mark.filterwarnings("ignore:sampling=.empirical.")
@pytest.mark.parametrize("network", CASES)
def test_factors_do_not_depend_on_batches_or_their_order(network, sampling):
    case = CASES[network]()
    whole = kl.estimate_fisher(
        case.model, case.batches(len(case.inputs)), "classification", sampling=sampling, layers=case.layers
    )
    for size, order in [(1, slice(None)), (2, slice(None, None, -1)), (4, slice(None))]:
        parts = kl.estimate_fisher(
            case.model, case.batches(size)[order], "classification", sampling=sampling, layers=case.layers
        )
        for name in case.layers:
            torch.testing.assert_close(parts[name].to_dense(), whole[name].to_dense(), rtol=1e-12, atol=1e-14)


def test_empirical_factors_use_the_gradients_of_the_labels():
    case = mlp()
    with pytest.warns(UserWarning, match="not the Fisher"):
        fisher = kl.estimate_fisher(case.model, case.batches(), "classification", sampling="empirical")
    G = 0
    for x, y in zip(case.inputs, case.targets, strict=True):
        _, g, f = oracles.layer_io(case.model, case.model[0], x)
        f.requires_grad_()
        (direction,) = torch.autograd.grad(oracles.negative_log_likelihood("classification", f, y), f)
        g = torch.einsum("ctq,c->tq", g, direction)
        G = G + g.T @ g / len(case.inputs)
    torch.testing.assert_close(fisher["0"].gradient_factor, G, rtol=RTOL, atol=0)


@pytest.mark.grid
@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression"])
def test_mc_factors_converge_to_the_exact_ones_as_one_over_root_samples(likelihood):
    """The root mean square error over ten seeds falls by 4 when samples grow by 16 (within its sampling error)."""
    case = cnn(likelihood)
    exact = kl.estimate_fisher(case.model, case.batches(5), likelihood, sampling="exact")

    def error(samples):
        squared = []
        for seed in range(10):
            mc = kl.estimate_fisher(
                case.model, case.batches(5), likelihood, sampling="mc", mc_samples=samples, seed=seed
            )
            squared += [relative(mc[n].gradient_factor, exact[n].gradient_factor) ** 2 for n in exact]
        return (sum(squared) / len(squared)) ** 0.5

    few, many = error(8), error(128)
    assert many < 0.15
    assert 2.5 < few / many < 6.5


@pytest.mark.slow
def test_mc_factors_reach_the_exact_ones():
    case = cnn()
    exact = kl.estimate_fisher(case.model, case.batches(5), "classification", sampling="exact")
    mc = kl.estimate_fisher(case.model, case.batches(5), "classification", sampling="mc", mc_samples=30_000)
    for name in exact:
        assert relative(mc[name].gradient_factor, exact[name].gradient_factor) < 0.02


def test_draws_depend_on_seed_and_batch_only():
    case = mlp()

    def run(seed, disturb):
        torch.manual_seed(disturb)
        fisher = kl.estimate_fisher(case.model, case.batches(), "classification", sampling="mc", seed=seed)
        return fisher["0"].gradient_factor

    assert torch.equal(run(0, 1), run(0, 2))
    assert not torch.equal(run(0, 1), run(1, 1))
    once = kl.estimate_fisher(case.model, [case.inputs], "classification", sampling="mc")["0"].gradient_factor
    twice = kl.estimate_fisher(case.model, [case.inputs] * 2, "classification", sampling="mc")["0"].gradient_factor
    assert not torch.allclose(once, twice)  # another batch, other draws


@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression"])
@pytest.mark.parametrize("network", ["mlp", "cnn", "sequence"])
def test_equals_curvlinops(network, likelihood):
    """curvlinops 3.0.1, ``type-2``, expand, weight and bias joined, ``reduction="sum"``.

    Conventions: its factors are ``S_A/(N T)`` and ``S_G``, so that the product is the sum over the data of KFC; ours
    is the mean, hence ``/ N``. Its sum of squares has the output Hessian ``2 I`` where our Gaussian has ``I``.
    """
    case = CASES[network](likelihood)
    loss = {
        "classification": nn.CrossEntropyLoss(reduction="sum"),
        "binary": nn.BCEWithLogitsLoss(reduction="sum"),
        "regression": nn.MSELoss(reduction="sum"),
    }[likelihood]
    hessian = 2 if likelihood == "regression" else 1
    theirs = curvlinops.KFACLinearOperator(
        case.model,
        loss,
        list(case.model.parameters()),
        case.batches(),
        fisher_type=curvlinops.FisherType.TYPE2,
        kfac_approx=curvlinops.KFACType.EXPAND,
        separate_weight_and_bias=False,
        check_deterministic=False,  # would compute, and so add up, the factors once more
    )
    theirs.compute_kronecker_factors()
    ours = kl.estimate_fisher(case.model, case.batches(), likelihood, sampling="exact")
    for name, block in ours.items():
        A, G = theirs._input_covariances[name], theirs._gradient_covariances[name]
        expected = torch.kron(G.contiguous(), A.contiguous()) / (hessian * len(case.inputs))
        assert relative(block.to_dense(), expected) < RTOL


def test_k_fac_is_exact_for_one_example_of_a_linear_network():
    """One example, used once: the block is a Kronecker product, and K-FAC equals the dense Fisher."""
    case = mlp("regression")
    x = case.inputs[:1]
    fisher = kl.estimate_fisher(case.model, [x], "regression", sampling="exact")
    for name in fisher:
        J = oracles.layer_jacobian(case.model, name, x[0])
        torch.testing.assert_close(fisher[name].to_dense(), J.T @ J, rtol=1e-10, atol=1e-13)


def test_frozen_bias_has_no_homogeneous_coordinate():
    case = mlp()
    case.model[0].bias.requires_grad_(False)
    fisher = kl.estimate_fisher(case.model, case.batches(), "classification", sampling="exact")
    assert fisher["0"].shape == (6, 4)
    assert fisher.metadata.parameters == {"0": ("0.weight",), "2": ("2.weight", "2.bias")}
    torch.testing.assert_close(fisher["0"].activation_factor, case.inputs.T @ case.inputs / len(case.inputs))


@pytest.mark.quick(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_factors_accumulate_in_at_least_float32(dtype):
    case = cnn()
    exact = kl.estimate_fisher(case.model, case.batches(), "classification", sampling="exact")
    model = case.model.to(dtype)
    fisher = kl.estimate_fisher(model, [case.inputs.to(dtype)], "classification", sampling="exact")
    block = fisher["0"]
    assert block.gradient_factor.dtype == block.activation_factor.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    assert relative(block.to_dense().double(), exact["0"].to_dense()) < tolerance
