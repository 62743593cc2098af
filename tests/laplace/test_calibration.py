"""The scale of a classifier's logits, found on the training data."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

import kronlaplace as kl
from kronlaplace.laplace import calibration
from kronlaplace.laplace.calibration import _Covariance, _Marginals, calibrated_logit_scale
from kronlaplace.laplace.predictor import Predictor
from kronlaplace.network.example_axes import Layout
from tests.support.posteriors import problem


def classifier(likelihood="classification", n=60, seed=0):
    """A small network with data that it fits in part, so that all terms of the calibration matter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs = 1 if likelihood == "binary" else 3
        model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, outputs)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        f = model(x)
    noise = torch.rand(f.shape, generator=generator, dtype=torch.float64)
    y = (noise < torch.sigmoid(f)).double() if likelihood == "binary" else (f - torch.log(-torch.log(noise))).argmax(1)
    return model.eval(), x, y


def batches(x, y, size=17):
    return list(zip(x.split(size), y.split(size), strict=True))


def probability(f, covariance):
    """MacKay's probit of each margin to the most probable class, or of the one logit, as a loop."""
    if len(f) == 1:
        return torch.sigmoid(f / math.sqrt(1 + math.pi / 8 * covariance[0, 0]))
    t = int(f.argmax())
    scaled = []
    for k in range(len(f)):
        contrast = torch.zeros_like(f)
        contrast[k] += 1
        contrast[t] -= 1
        scaled.append((f[k] - f[t]) / math.sqrt(1 + math.pi / 8 * float(contrast @ covariance @ contrast)))
    return torch.stack(scaled).softmax(0)


def scale_by_loops(f, covariance, labels):
    """The same scale from the module's formulas, one example at a time; labels are probabilities, ``(n, C)``."""
    pi = f.sigmoid() if f.shape[1] == 1 else f.softmax(1)
    metric = [torch.diag(p) - torch.outer(p, p) for p in pi]
    h = sum(float(torch.trace(m @ c)) for m, c in zip(metric, covariance, strict=True)) / len(f)

    def cross_entropy(log_a, means, covariances, targets):
        total = 0.0
        for mean, c, target in zip(means, covariances, targets, strict=True):
            p = probability(math.exp(log_a) * mean, c)
            total -= float(target @ p.clamp_min(1e-300).log())
            if len(p) == 1:
                total -= float((1 - target) @ (1 - p).clamp_min(1e-300).log())
        return total

    def best(*arguments):
        return minimize_scalar(
            cross_entropy, args=arguments, bounds=(0, math.log(1e3)), method="bounded", options={"xatol": 1e-6}
        ).x

    larger = 1 / (1 - min(h, 0.95))
    without = [m + larger * c @ (p - y) for m, c, p, y in zip(f, covariance, pi, labels, strict=True)]
    fit, out = best(f, covariance, pi), best(without, [larger * c for c in covariance], labels)
    return math.exp((1 - min(h, 1)) * fit + min(h, 1) * out)


def marginals(posterior, model, x):
    """Outputs and covariances at a scale of 1."""
    with torch.no_grad():
        return model(x), posterior.functional_variance(x)


@pytest.mark.parametrize("estimator", ["kfac", "kfoc", "exact"])
@pytest.mark.parametrize("likelihood", ["classification", "binary"])
def test_the_scale_is_that_of_the_formulas(likelihood, estimator):
    model, x, y = classifier(likelihood)
    posterior = kl.KronLaplace(model, likelihood, estimator).fit(batches(x, y)).tune()
    labels = y if likelihood == "binary" else torch.nn.functional.one_hot(y, 3).double()
    expected = scale_by_loops(*marginals(posterior, model, x), labels)
    assert posterior.logit_scale == pytest.approx(expected, rel=1e-3)
    assert abs(math.log(expected)) > 0.05  # a scale of 1 would fail


@pytest.mark.parametrize("classes", [1, 4])
def test_leaving_a_label_out_undoes_its_update(classes):
    """The mode of ``N(m, C)`` times one label's likelihood, without that label, is ``m`` again."""
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(classes, generator=generator, dtype=torch.float64)
    root = torch.randn(classes, classes, generator=generator, dtype=torch.float64)
    c = root @ root.T + 0.1 * torch.eye(classes)
    label = torch.nn.functional.one_hot(torch.tensor(0), classes).double()
    f = m.clone().requires_grad_()
    for _ in range(200):  # Newton's method on the log posterior
        pi = f.sigmoid() if classes == 1 else f.softmax(0)
        metric = torch.diag(pi) - torch.outer(pi, pi)
        gradient = torch.linalg.solve(c, f - m) + pi - label
        f = (f - 0.5 * torch.linalg.solve(torch.linalg.inv(c) + metric, gradient)).detach()
    out = _Marginals(f[None], _Covariance(c[None]), label[None], torch.ones(1).double()).without_their_labels(1.0)
    torch.testing.assert_close(out.mean[0], m, rtol=1e-8, atol=1e-8)


def test_order_and_batches_do_not_matter():
    model, x, y = classifier()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    one = kl.KronLaplace(model, "classification").fit(batches(x, y)).tune().logit_scale
    other = kl.KronLaplace(model, "classification").fit(batches(x[order], y[order], 5)).tune().logit_scale
    assert other == pytest.approx(one, rel=1e-3)


def test_without_variance_the_network_is_left_as_it_is():
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification", prior_precision=1e12).fit(batches(x, y))
    scale = calibrated_logit_scale(Predictor(model, posterior._state), posterior._state.fitted.examples, Layout())
    assert scale == pytest.approx(1, abs=1e-3)


def test_covariances_that_do_not_fit_are_computed_twice(monkeypatch):
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification").fit(batches(x, y)).tune()
    kept = posterior.logit_scale
    monkeypatch.setattr(calibration, "_BUDGET", 50)
    assert posterior.tune().logit_scale == pytest.approx(kept, rel=1e-6)


def test_many_outputs_take_fewer_examples_and_too_many_are_refused(monkeypatch):
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification").fit(batches(x, y)).tune()
    kept = posterior.logit_scale
    monkeypatch.setattr(calibration, "_WORK", 3 * 40)
    few = posterior.tune().logit_scale
    assert few != kept and few == pytest.approx(kept, rel=0.5)
    monkeypatch.setattr(calibration, "_WORK", 2)
    with pytest.warns(UserWarning, match="the scale of the logits stays as it is: one example has 3 outputs"):
        posterior.tune()
    assert posterior.logit_scale == few


@pytest.mark.parametrize("network", ["cnn", "tokens", "segmentation"])
def test_positions_whose_targets_are_ignored_do_not_count(network):
    """Tokens and pixels: each position is a row, the ignored ones are none."""
    if network == "cnn":
        made = problem("cnn")
        posterior = made.fitted().tune()
        f = made.model(made.inputs).detach()
        covariance, labels = posterior.functional_variance(made.inputs), made.targets
    else:
        torch.manual_seed(0)
        if network == "tokens":
            model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double().eval()
            x, axis = torch.randn(12, 6, 4).double(), 2
        else:
            model = (
                torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 1)).double().eval()
            )
            x, axis = torch.randn(8, 2, 4, 5).double(), 1
        f = model(x).detach()
        y = (3 * f + torch.randn_like(f)).argmax(axis)
        y[torch.rand(y.shape) < 0.4] = -100
        posterior = kl.KronLaplace(model, "classification").fit([(x, y)]).tune()
        n, positions = len(x), y[0].numel()
        whole = posterior.functional_variance(x).view(n, *f.shape[1:], *f.shape[1:])
        rows = f.movedim(axis, -1).reshape(n, positions, 3)
        whole = whole.movedim((axis, f.ndim - 1 + axis), (-2, -1)).reshape(n, positions, positions, 3, 3)
        own = torch.stack([whole[:, t, t] for t in range(positions)], dim=1)
        counts = (y != -100).reshape(n, positions)
        f, covariance, labels = rows[counts], own[counts], y.reshape(n, positions)[counts]
    one_hot = torch.nn.functional.one_hot(labels, f.shape[1]).double()
    assert posterior.logit_scale == pytest.approx(scale_by_loops(f, covariance, one_hot), rel=1e-3)


def test_predictions_of_every_kind_use_the_scale():
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification").fit(batches(x, y)).tune(logit_scale="fixed")
    assert posterior.logit_scale == 1
    f, covariance = marginals(posterior, model, x)
    sampled = posterior.draw(x, 4, method="sample").outputs
    drawn = posterior.draw(x, 4).outputs
    posterior.logit_scale = 2.5
    expected = torch.stack([probability(2.5 * mean, c) for mean, c in zip(f, covariance, strict=True)])
    torch.testing.assert_close(posterior.predict(x), expected)
    torch.testing.assert_close(posterior.functional_variance(x), covariance)
    torch.testing.assert_close(posterior.draw(x, 4, method="sample").outputs, sampled + 1.5 * f)
    torch.testing.assert_close(posterior.draw(x, 4).outputs, drawn + 1.5 * f)
    averaged = posterior.predict(x, method="sample", n_samples=4)
    torch.testing.assert_close(averaged, (sampled + 1.5 * f).softmax(2).mean(0))


def test_the_scale_is_a_hyperparameter_and_is_saved(tmp_path):
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification").fit(batches(x, y)).tune()
    scale, predicted = posterior.logit_scale, posterior.predict(x)
    assert scale != 1 and f"logit_scale={scale:.4g}" in repr(posterior)
    posterior.save(tmp_path / "posterior")
    loaded = kl.KronLaplace.load(tmp_path / "posterior", model)
    assert loaded.logit_scale == scale
    torch.testing.assert_close(loaded.predict(x), predicted, rtol=0, atol=0)
    best = posterior.hyperparameters
    posterior.logit_scale = 3.0
    posterior.hyperparameters = best
    assert posterior.logit_scale == scale
    assert posterior.fit(batches(x, y)).logit_scale == scale  # as the prior precision


def test_a_posterior_without_data_says_so_and_takes_them(tmp_path):
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification").fit(batches(x, y)).tune()
    ready = kl.KronLaplace(model, "classification").fit(fisher=posterior.fisher)
    with pytest.warns(UserWarning, match=r"the fit has seen no data.*tune\(data=\.\.\.\)"):
        ready.tune()
    assert ready.logit_scale == 1
    ready.tune(logit_scale="fixed")
    assert ready.tune(data=batches(x, y)).logit_scale == pytest.approx(posterior.logit_scale, rel=1e-6)
    with pytest.raises(TypeError, match="targets"):
        ready.tune(data=[x])


def test_data_that_are_added_count_too():
    model, x, y = classifier()
    once = kl.KronLaplace(model, "classification").fit(batches(x, y)).tune()
    twice = kl.KronLaplace(model, "classification").fit(batches(x[:20], y[:20])).fit(batches(x[20:], y[20:]), add=True)
    assert twice.tune().logit_scale == pytest.approx(once.logit_scale, rel=1e-3)


def test_the_posterior_can_move(tmp_path):
    model, x, y = classifier()
    posterior = kl.KronLaplace(model.float(), "classification").fit(batches(x.float(), y)).tune()
    scale = posterior.logit_scale
    assert posterior.to(torch.float64).tune().logit_scale == pytest.approx(scale, rel=1e-3)


def test_validation_leaves_the_logits_alone():
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification").fit(batches(x, y)).tune()
    assert posterior.tune("validation", data=batches(x, y), grid=[1.0]).logit_scale == 1
    posterior.logit_scale = 2.0
    posterior.tune("validation", data=batches(x, y), grid=[1.0], logit_scale="fixed")
    assert posterior.logit_scale == 2


def test_only_logits_have_a_scale():
    made = problem("mlp", "regression")
    posterior = made.fitted().tune()
    assert posterior.logit_scale == 1
    with pytest.raises(ValueError, match="logit_scale is for outputs that are logits; Gaussian"):
        posterior.logit_scale = 2.0
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="logit_scale"):
            problem("mlp").fitted().logit_scale = value


def test_the_last_layer_alone_is_calibrated_too():
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification", layers="last").fit(batches(x, y)).tune()
    expected = scale_by_loops(*marginals(posterior, model, x), torch.nn.functional.one_hot(y, 3).double())
    assert posterior.logit_scale == pytest.approx(expected, rel=1e-3)


def test_all_targets_ignored_leave_a_scale_of_one():
    model, x, y = classifier()
    posterior = kl.KronLaplace(model, "classification").fit(batches(x, y))
    nothing = posterior._state.fitted.examples
    nothing._parts = [calibration_part(part) for part in nothing._parts]
    assert posterior.tune().logit_scale == 1


def calibration_part(part):
    part.targets.fill_(-100)
    return part
