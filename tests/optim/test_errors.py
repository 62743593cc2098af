"""Wrong uses of the natural-gradient optimizer: each error says what to do, and leaves everything as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl

FIXED = {"damping": kl.damping.FactoredTikhonov(0.1), "lr": 0.3}
BOTH = pytest.mark.parametrize("options", [FIXED, {}], ids=["fixed", "adaptive"])
LATER = pytest.mark.parametrize("steps", [0, 3])


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def x():
    return torch.randn(16, 4)


@pytest.fixture
def y():
    return torch.randint(3, (16,))


def mean_loss(f, y):
    return F.cross_entropy(f, y)


def squared_error(f, y):
    return 0.5 * (f - y).square().sum() / len(f)


def step(optimizer, model, x, y, loss=mean_loss, targets=None):
    optimizer.zero_grad()
    outputs = model(x)
    optimizer.update_curvature(outputs, targets)
    loss(outputs, y).backward()
    optimizer.step()


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def everything(optimizer, model):
    return tensors_in([model.state_dict(), optimizer.state_dict()])


def assert_as_before(optimizer, model, before):
    after = everything(optimizer, model)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# -- Batches that are not finite ---------------------------------------------------------------------------------


@BOTH
@LATER
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite(options, steps, value, x):
    """Nothing changes, and the next good batch trains."""
    model, y = network(), torch.randn(16, 3)
    bad = x.clone()
    bad[3, 1] = value
    with kl.NaturalGradient(model, "regression", **options, curvature_every=1) as optimizer:
        for _ in range(steps):
            step(optimizer, model, x, y, squared_error)
        before = everything(optimizer, model)
        with pytest.raises(ValueError, match=rf"step {steps}: the (network's outputs|inputs of layer '0') are NaN"):
            step(optimizer, model, bad, y, squared_error)
        assert_as_before(optimizer, model, before)
        step(optimizer, model, x, y, squared_error)
        assert all(torch.isfinite(t).all() for t in everything(optimizer, model))


@BOTH
@LATER
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_targets_that_are_not_finite(options, steps, value, x):
    """The step is not made: neither for the layers with a block nor for the others, nor does the damping change."""
    model, y = network(), torch.randn(16, 3)
    bad = y.clone()
    bad[2, 1] = value
    plain = {"layers": ["0"], "others": kl.PlainSGD(lr=0.1)}
    with kl.NaturalGradient(model, "regression", **options, **plain) as optimizer:
        for _ in range(steps):
            step(optimizer, model, x, y, squared_error)
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.update_curvature(outputs)
        squared_error(outputs, bad).backward()
        before, damping = everything(optimizer, model), optimizer.damping
        message = (
            rf"step {steps} was not made, because the gradient of '0\.weight' is NaN or infinite.*Look at the loss"
        )
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert_as_before(optimizer, model, before)
        assert optimizer.damping == damping
        step(optimizer, model, x, y, squared_error)
        assert all(torch.isfinite(t).all() for t in everything(optimizer, model))


@BOTH
def test_a_plain_gradient_that_is_not_finite(options, x, y):
    model = network()
    with kl.NaturalGradient(model, "classification", **options, layers=["0"], others=kl.PlainSGD(lr=0.1)) as optimizer:
        optimizer.update_curvature(outputs := model(x))
        mean_loss(outputs, y).backward()
        model[2].bias.grad[0] = torch.nan
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"gradient of '2\.bias' is NaN"):
            optimizer.step()
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_singular_blocks_without_damping(x, y):
    model = network()
    with kl.NaturalGradient(model, "classification", damping=kl.damping.FactoredTikhonov(0)) as optimizer:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="the block of layer '2' is singular; use a damping larger than 0"):
            step(optimizer, model, x, y)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


# -- The loss ----------------------------------------------------------------------------------------------------

WRONG = {
    "sum": ("classification", lambda f, y: F.cross_entropy(f, y, reduction="sum")),
    "other loss": ("classification", lambda f, y: F.mse_loss(f, F.one_hot(y, 3).float())),
    "class weights": ("classification", lambda f, y: F.cross_entropy(f, y, weight=torch.tensor([1.0, 2.0, 9.0]))),
    "binary sum": (
        "binary",
        lambda f, y: F.binary_cross_entropy_with_logits(f, F.one_hot(y, 3).float(), reduction="sum"),
    ),
}


@BOTH
@pytest.mark.parametrize("name", WRONG)
def test_losses_that_are_not_the_likelihoods(options, name, x, y):
    likelihood, loss = WRONG[name]
    model = network()
    with kl.NaturalGradient(model, likelihood, **options) as optimizer:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r'not that of the mean negative log-likelihood.*reduction="sum"'):
            step(optimizer, model, x, y, loss)
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@BOTH
def test_with_targets_a_wrong_loss_of_regression_is_found(options, x):
    model, y = network(), torch.randn(16, 3)
    with kl.NaturalGradient(model, "regression", **options) as optimizer:
        for loss in (lambda f, y: (f - y).square().sum(), lambda f, y: (f - y).abs().mean()):
            with pytest.raises(ValueError, match="mean negative log-likelihood of Gaussian"):
                step(optimizer, model, x, y, loss, targets=y)
        step(optimizer, model, x, y, F.mse_loss, targets=y)  # a mean over outputs, twice: only a factor


@BOTH
def test_tokens(options):
    """A mean over tokens, some of which are ignored, with the classes on axis 1."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 3, 1))
    x, y = torch.randn(8, 2, 6), torch.randint(3, (8, 6))
    with kl.NaturalGradient(model, kl.Categorical(class_axis=1), **options) as optimizer:
        for _ in range(2):
            step(optimizer, model, x, y)
        y[:, 4:] = -100
        step(optimizer, model, x, y)


@pytest.mark.parametrize("every", [1, 100])
def test_targets_that_do_not_fit_are_refused_before_the_averages_change(every, x, y):
    model = network()
    with kl.NaturalGradient(model, "classification", curvature_every=every, model_every=every) as optimizer:
        step(optimizer, model, x, y, targets=y)
        before = everything(optimizer, model)
        for wrong, message in ((y[:-1], "targets"), (y + 7, "class labels must lie in 0 … 2")):
            with pytest.raises(ValueError, match=message):
                optimizer.update_curvature(model(x), wrong)
        assert_as_before(optimizer, model, before)
        step(optimizer, model, x, y, targets=y)


@pytest.mark.parametrize(
    ("likelihood", "activation", "name"),
    [
        ("classification", lambda f: f.softmax(1), "softmax"),
        ("binary", torch.sigmoid, "sigmoid"),
        ("binary", F.logsigmoid, "log-sigmoid"),
    ],
)
def test_probabilities_in_place_of_logits(likelihood, activation, name, x):
    model = network()
    with kl.NaturalGradient(model, likelihood) as optimizer:
        with pytest.raises(ValueError, match=f"outputs of a {name}.*takes logits.*Give it the input of the {name}"):
            optimizer.update_curvature(activation(model(x)))
        optimizer.update_curvature(model(x))


@BOTH
def test_a_loss_of_logits_with_log_probabilities_for_the_curvature(options, x, y):
    """They are allowed, but the loss must come from them."""
    model = network()
    with kl.NaturalGradient(model, "classification", **options) as optimizer:
        outputs = model(x)
        optimizer.update_curvature(outputs.log_softmax(1))
        F.cross_entropy(outputs, y).backward()
        with pytest.raises(RuntimeError, match="not with a tensor that is computed from these"):
            optimizer.step()


# -- The order of calls ------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("every", [1, 100])
def test_outputs_that_are_not_the_last_passes(options, every, x, y):
    """In steps that update the curvature, and in others; the averages stay, and training goes on."""
    model, other = network(), network()
    with kl.NaturalGradient(model, "classification", curvature_every=every, invert_every=every, **options) as optimizer:
        step(optimizer, model, x, y)
        before = everything(optimizer, model)
        old = model(x)
        model(x)
        for outputs in (old, other(x)):
            with pytest.raises(RuntimeError, match="not those of the last forward pass of the model"):
                optimizer.update_curvature(outputs)
        with torch.no_grad():
            without = model(x)
        for outputs in (without, old.detach()):
            with pytest.raises(RuntimeError, match="the outputs carry no graph"):
                optimizer.update_curvature(outputs)
        optimizer.update_curvature(outputs := model(x))
        with pytest.raises(RuntimeError, match="no forward pass of the model was observed"):
            optimizer.update_curvature(outputs)
        optimizer.zero_grad()
        optimizer._forget_passes()
        if every > 1:
            assert_as_before(optimizer, model, before)
        step(optimizer, model, x, y)


@BOTH
def test_calls_that_are_missing(options, x, y):
    model = network()
    with kl.NaturalGradient(model, "classification", **options) as optimizer:
        mean_loss(model(x), y).backward()
        with pytest.raises(RuntimeError, match="update_curvature was not called in this step"):
            optimizer.step()
        optimizer.zero_grad()
        optimizer.update_curvature(model(x))
        with pytest.raises(RuntimeError, match="the loss was not propagated back"):
            optimizer.step()
        (loss := mean_loss(outputs := model(x), y)).backward()
        with pytest.raises(RuntimeError, match=r"call update_curvature\(outputs\) before loss\.backward"):
            optimizer.update_curvature(outputs)
        assert loss.isfinite()
        step(optimizer, model, x, y)
    with pytest.raises(RuntimeError, match="the optimizer was closed"):
        step(optimizer, model, x, y)


# -- Arguments ---------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "momentum": ({"momentum": 1.5}, ValueError, "momentum must be a number, at least 0 and less than 1, got 1.5"),
    "lr": ({"lr": -1}, ValueError, "lr must be a number, at least 0 and finite"),
    "ema_decay": ({"ema_decay": 1}, ValueError, "ema_decay must be at least 0 and less than 1, got 1"),
    "period": ({"curvature_every": 0}, ValueError, "curvature_every must be at least 1, got 0"),
    "estimator": ({"estimator": "kfacc"}, ValueError, "unknown estimator 'kfacc'; the shorthands are 'kfac'"),
    "damping": ({"damping": 0.1}, TypeError, r"damping must be a damping such as kl\.damping\.FactoredTikhonov"),
    "sampling": ({"sampling": "empirical"}, ValueError, 'sampling must be "mc" or "exact"'),
    "others": ({"others": "sgd"}, ValueError, r'others must be "diagonal" or PlainSGD'),
    "params": ({"params": nn.Linear(2, 2).parameters()}, ValueError, "not parameters of the model; pass model.param"),
    "no params": ({"params": []}, ValueError, "params is empty, or requires_grad is False everywhere"),
    "group": ({"params": [{"lr": 0.1}]}, TypeError, 'parameters under "params"'),
    "fraction": ({"model_fraction": 2}, ValueError, "model_fraction must be at most 1, got 2"),
    "clip": ({"kl_clip": 0.1}, ValueError, "has no effect on steps whose length adapts"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    options, kind, message = ARGUMENTS[name]
    with pytest.raises(kind, match=message):
        kl.NaturalGradient(network(), "classification", **options)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(3, 3)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) @ self.weight


def test_modules_without_a_block(x, y):
    """The error names what the optimizer offers; with that, they train."""
    forbidden = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 3))
    with pytest.raises(NotImplementedError, match=r"others=kl\.PlainSGD\(lr=0\.01\)") as caught:
        kl.NaturalGradient(forbidden, "classification")
    assert "exclude" not in str(caught.value)
    assert "unsupported" not in str(caught.value)
    model = Own()
    before = copy.deepcopy(model)
    with kl.NaturalGradient(model, "classification", others=kl.PlainSGD(lr=0.01)) as optimizer:
        step(optimizer, model, x, y)
    assert not torch.equal(model.weight, before.weight)
    assert not torch.equal(model.layer.weight, before.layer.weight)
