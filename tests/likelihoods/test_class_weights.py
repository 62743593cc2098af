"""Weights of the classes and label smoothing: the loss is torch's, and the Fisher is its Hessian."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace.testing import check_likelihood
from tests.support.assertions import assert_close

WEIGHTS = (0.5, 2.0, 1.25, 0.3)
OPTIONS = {
    "weights": {"class_weights": WEIGHTS},
    "smoothing": {"label_smoothing": 0.2},
    "both": {"class_weights": WEIGHTS, "label_smoothing": 0.2},
}
SHAPES = {"examples": ((6, 4), None, (6,)), "pixels": ((3, 4, 2), 1, (3, 2)), "tokens": ((3, 2, 4), -1, (3, 2))}


def batch(shape, targets):
    generator = torch.Generator().manual_seed(3)
    f = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(4, targets, generator=generator)
    y.view(-1)[1] = -100
    return f, y


def torchs(f, y, axis, options, reduction="sum"):
    weights = options.get("class_weights")
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    smoothing = options.get("label_smoothing", 0.0)
    return F.cross_entropy(f.movedim(axis, 1), y, weight=weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_is_torchs(name, form):
    shape, axis, size = SHAPES[form]
    f, y = batch(shape, size)
    likelihood = kl.Categorical(class_axis=axis, **OPTIONS[name])
    statistics = likelihood.statistics(f, y)
    assert_close(statistics[0], torchs(f, y, axis or 1, OPTIONS[name]), 1e-12)
    probabilities = f.softmax(axis or 1)
    total, count = likelihood.predictive_nll(probabilities, y)
    assert_close(total, statistics[0], 1e-12)
    if name != "both":  # where torch divides by the weights of the unsmoothed targets
        assert_close(total / count, torchs(f, y, axis or 1, OPTIONS[name], "mean"), 1e-12)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_laws(name, form):
    shape, axis, size = SHAPES[form]
    check_likelihood(kl.Categorical(class_axis=axis, **OPTIONS[name]), *batch(shape, size))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_fisher_of_a_linear_network_is_the_hessian(name):
    model = nn.Linear(3, 4).double()
    _, y = batch((6, 4), (6,))
    x = torch.randn(6, 3, dtype=torch.float64)

    def loss(flat):
        return torchs(F.linear(x, flat.view(4, 4)[:, :3], flat.view(4, 4)[:, 3]), y, 1, OPTIONS[name])

    weights = torch.cat([model.weight, model.bias.unsqueeze(1)], 1).detach().flatten()
    hessian = torch.autograd.functional.hessian(loss, weights)
    likelihood = kl.Categorical(**OPTIONS[name])
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    fisher = kl.estimate_fisher(model, batches, likelihood, kl.ExactBlock(), sampling="exact")
    assert_close(6 * fisher[""].to_dense(), hessian, 1e-10)


def test_an_example_of_weight_two_counts_twice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 0, 1, 1, 0, 0])
    twice = torch.cat([torch.arange(8), (y == 1).nonzero().squeeze(1)])
    for estimator in ("kfoc", kl.ExactBlock()):
        weighted = kl.KronLaplace(model, kl.Categorical(class_weights=torch.tensor([1.0, 2.0])), estimator)
        repeated = kl.KronLaplace(model, "classification", estimator)
        weighted.fit([(x, y)])
        repeated.fit([(x[twice], y[twice])])
        for posterior in (weighted, repeated):
            posterior.tune(logit_scale="fixed")
        assert_close(weighted.log_marginal_likelihood(), repeated.log_marginal_likelihood(), 1e-6)
        torch.testing.assert_close(weighted.predict(x), repeated.predict(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_posteriors_are_tuned_and_saved(name, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 4
    likelihood = kl.Categorical(**OPTIONS[name])
    posterior = kl.KronLaplace(model, likelihood).fit([(x, y)], sampling="mc").tune()
    posterior.tune("validation", data=[(x, y)], grid=[1.0])
    posterior.save(tmp_path / "posterior")
    loaded = kl.KronLaplace.load(tmp_path / "posterior", model)
    assert loaded.likelihood == posterior.likelihood
    torch.testing.assert_close(loaded.predict(x), posterior.predict(x))
    assert posterior.fit_variational([(x, y)]).posterior.evidence_lower_bound([(x, y)]).value < 0


def test_training_with_label_smoothing():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 4
    optimizer = kl.NaturalGradient(model, kl.Categorical(label_smoothing=0.2))
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.update_curvature(outputs)
        loss = F.cross_entropy(outputs, y, label_smoothing=0.2)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_weights_need_targets():
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3, dtype=torch.float64)
    likelihood = kl.Categorical(class_weights=WEIGHTS)
    with pytest.raises(ValueError, match="class_weights need the targets of every batch"):
        kl.estimate_fisher(model, [x], likelihood)
    optimizer = kl.NaturalGradient(model, likelihood)
    with pytest.raises(ValueError, match="The optimizers, which do without targets"):
        optimizer.update_curvature(model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": [1.0, 0.0]}, r"class_weights must be one positive number per class; got \[1.0, 0.0\]"),
        ({"class_weights": [[1.0, 2.0]]}, "class_weights must be one positive number per class"),
        ({"class_weights": "abc"}, "class_weights must be one positive number per class"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and less than 1, got 1.0"),
        ({"label_smoothing": None}, "label_smoothing must be at least 0 and less than 1, got None"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        kl.Categorical(**options)


def test_weights_of_other_classes():
    f, y = batch((6, 4), (6,))
    likelihood = kl.Categorical(class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="there are 2 class_weights, for outputs of shape"):
        likelihood.check_outputs(f)
    with pytest.raises(ValueError, match="there are 2 class_weights, for 4 classes"):
        likelihood.check_targets(f, y)
