"""Undamped natural-gradient steps with K-FAC and KFC do not see affine changes of activations and pre-activations.

K-FAC Theorem 1 (coordinate-free Theorem 2.1), KFC Theorem 3 and coordinate-free Theorem 4.2: a network is rewritten with
activations ``Ω φ(Φ s + τ) + γ`` and the weights that make it the same function again. Steps of the same size on both
must leave them the same function, to rounding. (TKFAC, K-FOC and EKFAC promise no such thing.)
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kronlaplace as kl
from tests.support.reparameterizations import absorb, difference, mlp, no_affine, random_affine, transformed_mlp
from tests.support.tiers import examples

pytestmark = pytest.mark.filterwarnings("ignore:sampling=.empirical.")

RTOL = 1e-6
"""Rounding errors, times the condition of inverses that nothing dampens."""
SEEDS = st.integers(0, 10_000)


# -- steps ---------------------------------------------------------------------------------------------------


def mean_loss(model, x, y, likelihood):
    f = model(x)
    if likelihood == "classification":
        return F.cross_entropy(f, y)
    if likelihood == "binary":
        return F.binary_cross_entropy_with_logits(f, y, reduction="sum") / len(x)
    return 0.5 * (f - y).square().sum() / len(x)


def solve(block, gradient):
    return kl.damping.Tikhonov(0).invert(block).solve(gradient)


def pseudo_solve(block, gradient):
    """For blocks that are singular whatever the data: a softmax does not see a shift of all its inputs."""
    inverse = torch.linalg.pinv(block.to_dense(), hermitian=True, rtol=1e-10)
    return (inverse @ gradient.flatten()).view_as(gradient)


def identity(block, gradient):
    return gradient


def step(model, x, y, likelihood, rate, estimator="kfac", sampling="exact", solve=solve):
    """One step on all parameters that have a block, in place."""
    fisher = kl.estimate_fisher(model, [(x, y)], likelihood, estimator, sampling=sampling)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(mean_loss(model, x, y, likelihood), list(parameters.values()))
    gradients = dict(zip(parameters, gradients, strict=True))
    for layer, block in fisher.items():
        names = fisher.metadata.parameters[layer]
        columns = [gradients[n].flatten(1) if gradients[n].ndim > 1 else gradients[n][:, None] for n in names]
        update = solve(block, torch.cat(columns, dim=1)).split([c.shape[1] for c in columns], dim=1)
        with torch.no_grad():
            for name, part in zip(names, update, strict=True):
                parameters[name] -= rate * part.reshape(parameters[name].shape)


def assert_steps_agree(original, transformed, x, y, likelihood, rate=0.1, **options):
    fresh = torch.randn(7, *x.shape[1:]).double()
    assert difference(original, transformed, fresh) < 1e-11  # they were made to be the same
    before = copy.deepcopy(original)
    for _ in range(2):
        for model in (original, transformed):
            step(model, x, y, likelihood, rate, **options)
    assert difference(before, original, fresh) > 1e-3  # something happened
    assert difference(original, transformed, fresh) < RTOL


def targets(likelihood, n, outputs=3):
    return {
        "regression": lambda: torch.randn(n, outputs).double(),
        "binary": lambda: torch.randint(2, (n, outputs)).double(),
        "classification": lambda: torch.randint(outputs, (n,)),
    }[likelihood]()


# -- multilayer perceptrons: K-FAC Theorem 1, coordinate-free Theorem 2.1 ------------------------------------


@pytest.mark.quick(1)
@settings(max_examples=examples(8))
@given(seed=SEEDS, hidden=st.lists(st.integers(2, 3), min_size=1, max_size=2))
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
@pytest.mark.parametrize("likelihood", ["regression", "binary"])
def test_kfac_steps_of_an_mlp(likelihood, activation, seed, hidden):
    torch.manual_seed(seed)
    model, x = mlp(3, hidden, activation), torch.randn(40, 3).double()
    assert_steps_agree(model, transformed_mlp(model), x, targets(likelihood, 40), likelihood)


@settings(max_examples=examples(5))
@given(seed=SEEDS)
def test_kfac_steps_of_a_classifier(seed):
    """The last gradient factor is singular: a pseudo-inverse, and no change of the coordinates of the logits."""
    torch.manual_seed(seed)
    model, x = mlp(3, hidden=(2, 2)), torch.randn(40, 3).double()
    transformed = transformed_mlp(model, last=no_affine)
    y = targets("classification", 40)
    assert_steps_agree(model, transformed, x, y, "classification", solve=pseudo_solve)


@pytest.mark.parametrize("sampling", ["mc", "empirical"])
def test_with_any_sampling(sampling):
    """The same labels are drawn for the same function."""
    model, x = mlp(), torch.randn(60, 3).double()
    assert_steps_agree(model, transformed_mlp(model), x, targets("regression", 60), "regression", sampling=sampling)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_kfac_steps_of_layers_that_are_used_at_several_positions(weight_sharing):
    """Means and sums over positions go through affine maps."""

    class Tokens(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x).mean(1)

    inner, x = mlp(), torch.randn(60, 5, 3).double()
    model, transformed = Tokens(inner), Tokens(transformed_mlp(inner))
    estimator = kl.KFAC(weight_sharing=weight_sharing)
    assert_steps_agree(model, transformed, x, targets("regression", 60), "regression", estimator=estimator)


def test_gradient_descent_has_no_such_invariance():
    """So the tests above can fail."""
    model, x = mlp(), torch.randn(40, 3).double()
    transformed, y = transformed_mlp(model), targets("regression", 40)
    for network in (model, transformed):
        step(network, x, y, "regression", rate=0.3, solve=identity)
    assert difference(model, transformed, x) > 1e-2


# -- convolutions: KFC Theorem 3 -----------------------------------------------------------------------------

CONVOLUTIONS = {
    "1d": lambda: (nn.Conv1d(2, 3, 3), nn.Conv1d(3, 2, 2), (8,)),
    "strided": lambda: (nn.Conv2d(2, 3, 2, stride=2), nn.Conv2d(3, 2, (2, 1)), (5, 6)),
    "dilated": lambda: (nn.Conv2d(2, 3, 2, dilation=2), nn.Conv2d(3, 2, 2), (5, 5)),
    "circular": lambda: (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 2, 2, padding=1, padding_mode="reflect"),
        (5, 4),
    ),
    "3d": lambda: (nn.Conv3d(1, 2, 2), nn.Conv3d(2, 2, (1, 2, 1)), (3, 3, 3)),
}


@pytest.mark.quick(1)
@settings(max_examples=examples(4))
@given(seed=SEEDS)
@pytest.mark.parametrize("network", CONVOLUTIONS)
def test_kfc_steps_of_a_convolutional_network(network, seed):
    """Pixel by pixel, the channels before and behind each nonlinearity; what is padded must keep a shift (no zeros)."""
    torch.manual_seed(seed)
    first, second, size = CONVOLUTIONS[network]()
    head = nn.Linear(second.out_channels, 3)
    pool = nn.Sequential(nn.Flatten(2), Mean())
    model = nn.Sequential(first, nn.Tanh(), second, nn.Softplus(), pool, head).double()
    channels = [first.in_channels, first.out_channels, second.out_channels]
    before = [random_affine(c, axis=1) for c in channels]
    after = [random_affine(c, axis=1) for c in (*channels[1:], 3)]
    transformed = nn.Sequential(
        before[0],
        absorb(first, before[0], after[0]),
        after[0],
        nn.Tanh(),
        before[1],
        absorb(second, before[1], after[1]),
        after[1],
        nn.Softplus(),
        before[2],
        pool,
        absorb(head, before[2], after[2]),
        after[2],
    )
    x = torch.randn(50, channels[0], *size).double()
    assert_steps_agree(model, transformed, x, targets("regression", 50), "regression", rate=0.02, estimator="kfc")


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(2)


# -- recurrent networks: coordinate-free Theorem 4.2 ---------------------------------------------------------


class Recurrence(nn.Module):
    """``h_t = tanh(W [x_t, h_{t−1}] + b)``: one module, called at every time step."""

    def __init__(self, linear, head, before=None, after=None):
        super().__init__()
        self.linear, self.head = linear, head
        self.before = nn.Identity() if before is None else before
        self.after = nn.Identity() if after is None else after

    def forward(self, x):
        h = x.new_zeros(len(x), self.linear.out_features)
        for step in x.unbind(1):
            h = torch.tanh(self.after(self.linear(self.before(torch.cat([step, h], dim=1)))))
        return self.head(h)


@settings(max_examples=examples(8))
@given(seed=SEEDS, steps=st.integers(2, 4))
def test_kfac_steps_of_a_recurrent_network(seed, steps):
    """Inputs and hidden states together, and pre-activations, in other coordinates at every time step."""
    torch.manual_seed(seed)
    hidden = 3
    linear, head = nn.Linear(2 + hidden, hidden).double(), nn.Linear(hidden, 3).double()
    model = Recurrence(linear, head)
    before, after = random_affine(2 + hidden), random_affine(hidden)
    last, readout = random_affine(hidden), random_affine(3)
    new_head = nn.Sequential(last, absorb(head, last, readout), readout)
    transformed = Recurrence(absorb(linear, before, after), new_head, before, after)
    x, y = torch.randn(60, steps, 2).double(), targets("regression", 60)
    assert_steps_agree(model, transformed, x, y, "regression")


class Sequence(nn.Module):
    """One of torch's recurrent layers behind a change of the inputs."""

    def __init__(self, before, recurrent, head):
        super().__init__()
        self.before, self.recurrent, self.head = before, recurrent, head

    def forward(self, x):
        return self.head(self.recurrent(self.before(x))[0].mean(1))


@pytest.mark.quick(2)
@pytest.mark.parametrize("family", [nn.RNN, nn.LSTM, nn.GRU])
def test_kfac_steps_of_torchs_recurrent_layers(family):
    """Their nonlinearity is inside, so only the inputs can be given in other coordinates."""
    before = random_affine(2)
    recurrent, head = family(2, 2, batch_first=True).double(), nn.Linear(2, 3).double()
    model = Sequence(nn.Identity(), recurrent, head)
    new = copy.deepcopy(recurrent)
    with torch.no_grad():
        new.weight_ih_l0.copy_(recurrent.weight_ih_l0 @ torch.linalg.inv(before.matrix))
        new.bias_ih_l0.copy_(recurrent.bias_ih_l0 - new.weight_ih_l0 @ before.shift)
    transformed = Sequence(before, new, copy.deepcopy(head))
    x, y = torch.randn(80, 4, 2).double(), targets("regression", 80)
    assert_steps_agree(model, transformed, x, y, "regression")
