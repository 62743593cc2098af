"""Reports: scores against `kronlaplace.metrics` on predictions made here, standard errors against the bootstrap."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from kronlaplace import _scores, metrics
from kronlaplace.laplace.calibration_picture import CalibrationCurve, pooled
from kronlaplace.laplace.comparison import Statistic, mean_of, two_samples
from kronlaplace.laplace.report import Report
from tests.support.output_shapes import problem

CLASSIFICATION = ["NLL", "Brier score", "ECE", "accuracy"]
REGRESSION = ["NLL", "CRPS", "RMSE", "coverage 50 %", "coverage 90 %", "coverage 95 %"]


# -- scores --------------------------------------------------------------------------------------------------


def two_columns(p):
    return torch.stack([1 - p, p], dim=-1)


@pytest.mark.parametrize("predictive", [None, kl.Predictive(link="mc"), kl.Predictive("sample", n_samples=6)])
@pytest.mark.parametrize(
    ("network", "likelihood", "rows"),
    [
        ("mlp", "classification", lambda p: p),
        ("tokens", "classification", lambda p: p.flatten(0, 1)),
        ("segmentation", "classification", lambda p: p.movedim(1, -1).flatten(0, -2)),
        ("mlp", "binary", lambda p: two_columns(p).flatten(0, 1)),
        ("flat", "binary", two_columns),
    ],
)
def test_scores_of_classification(network, likelihood, rows, predictive):
    made = problem(network, likelihood)
    posterior = made.fitted(prior_precision=0.5)
    report = posterior.report(made.data(size=100), predictive=predictive)
    f = made.model(made.inputs).detach()
    options = dataclasses.asdict(predictive or kl.Predictive())
    axis = 1 if network == "segmentation" else -1
    p = {
        "map": torch.sigmoid(f) if likelihood == "binary" else torch.softmax(f, axis),
        "posterior": posterior.predict(made.inputs, **options),
    }
    labels = made.targets.flatten().long()
    assert [row.name for row in report.rows] == CLASSIFICATION
    for method, probabilities in p.items():
        given = rows(probabilities), labels
        assert getattr(report["NLL"], method) == pytest.approx(metrics.negative_log_likelihood(*given))
        assert getattr(report["Brier score"], method) == pytest.approx(metrics.brier_score(*given))
        assert getattr(report["ECE"], method) == pytest.approx(metrics.expected_calibration_error(*given))
        assert getattr(report["accuracy"], method) == pytest.approx(metrics.accuracy(*given))
    assert report.n_examples == len(f)
    assert report.unit == ("example" if labels.numel() == len(f) else "target")
    assert not report.regression
    for row in report.rows:
        assert row.difference == pytest.approx(row.posterior - row.map)


@pytest.mark.parametrize("network", ["mlp", "flat", "heteroscedastic"])
def test_scores_of_regression(network):
    likelihood = "heteroscedastic" if network == "heteroscedastic" else "regression"
    made = problem("mlp" if network == "heteroscedastic" else network, likelihood)
    posterior = made.fitted(prior_precision=0.5)
    report = posterior.report(made.data(size=100))
    f = made.model(made.inputs).detach()
    prediction = posterior.predict(made.inputs)
    noise = f[:, 2:].exp() if likelihood == "heteroscedastic" else torch.full_like(f, 0.36)
    gaussians = {
        "map": (f[:, :2] if likelihood == "heteroscedastic" else f, noise, made.targets),
        "posterior": (prediction.mean, prediction.total_variance, made.targets),
    }
    assert [row.name for row in report.rows] == REGRESSION
    assert report.regression
    for method, given in gaussians.items():
        assert getattr(report["NLL"], method) == pytest.approx(-metrics.gaussian_log_likelihood(*given))
        assert getattr(report["CRPS"], method) == pytest.approx(metrics.gaussian_crps(*given))
        assert getattr(report["RMSE"], method) == pytest.approx(metrics.rmse(given[0], given[2]))
        covered = metrics.interval_coverage(*given)
        found = [getattr(report[name], method) for name in REGRESSION[3:]]
        np.testing.assert_allclose(found, covered)


def test_batches_do_not_matter():
    made = problem("mlp")
    posterior = made.fitted()
    one, several = posterior.report(made.data(size=100)), posterior.report(made.data(size=3))
    for a, b in zip(one.rows, several.rows, strict=True):
        assert dataclasses.astuple(a)[1:] == pytest.approx(dataclasses.astuple(b)[1:])


def test_ignored_targets_do_not_count():
    """One example has no label at all, another only one."""
    made = problem("tokens")
    posterior = made.fitted()
    y = made.targets.clone()
    y[0], y[1, 1:] = -100, -100
    report = posterior.report([(made.inputs, y)])
    assert report.n_examples == len(y) - 1
    keep = y.flatten() != -100
    p = posterior.predict(made.inputs).flatten(0, 1)[keep]
    assert report["NLL"].posterior == pytest.approx(metrics.negative_log_likelihood(p, y.flatten()[keep]))


@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression"])
def test_foreign_inputs(likelihood):
    made = problem("mlp", likelihood)
    posterior = made.fitted(prior_precision=0.5)
    foreign = 3 * made.inputs[:5] + 1
    report = posterior.report(made.data(), foreign)
    from_loader = posterior.report(made.data(), DataLoader(TensorDataset(foreign), 2))
    name = "standard deviation" if likelihood == "regression" else "entropy"
    assert [row.name for row in report.rows][-3:] == [f"mean {name}", f"mean {name}, foreign", "AUROC"]
    assert report.n_foreign == from_loader.n_foreign == 5

    def spread(x):
        p = posterior.predict(x)
        if likelihood == "classification":
            return torch.special.entr(p).sum(1)
        if likelihood == "binary":
            return torch.special.entr(two_columns(p)).sum(-1).mean(1)
        return p.total_variance.sqrt().mean(1)

    inside, outside = spread(made.inputs), spread(foreign)
    for found in (report, from_loader):
        assert found[f"mean {name}"].posterior == pytest.approx(float(inside.mean()))
        assert found[f"mean {name}, foreign"].posterior == pytest.approx(float(outside.mean()))
        assert found["AUROC"].posterior == pytest.approx(metrics.ood_auroc(inside, outside))
    if likelihood == "regression":  # the MAP's standard deviation is the noise, everywhere
        assert report["AUROC"].map == 0.5
        assert report["AUROC"].map_error == 0


def test_probabilities_of_zero_are_clamped_as_in_the_likelihood():
    model = nn.Linear(1, 2).eval()
    model.weight.data = torch.tensor([[0.0], [1e4]])
    x, y = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([0, 1, 0])
    posterior = kl.KronLaplace(model, "classification").fit([(x, y)])
    p = torch.softmax(model(x), 1).detach()
    total, count = posterior.likelihood.predictive_nll(p, y).tolist()
    assert posterior.report([(x, y)])["NLL"].map == pytest.approx(total / count)


# -- standard errors -----------------------------------------------------------------------------------------


@pytest.fixture
def data():
    """Probabilities of two methods that are alike, and labels."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(600, 3))
    labels = np.array([rng.choice(3, p=row) for row in softmax(0.6 * logits)])
    return softmax(logits), softmax(0.7 * logits + 0.1 * rng.normal(size=logits.shape)), labels


def softmax(f):
    return torch.softmax(torch.as_tensor(f), 1).numpy()


def bootstrapped(statistic, n, repetitions=600):
    rng = np.random.default_rng(1)
    return np.std([statistic(rng.integers(n, size=n)) for _ in range(repetitions)])


TERMS = {
    "NLL": (_scores.log_losses, metrics.negative_log_likelihood),
    "Brier score": (_scores.brier_losses, metrics.brier_score),
    "ECE": (lambda p, y: _scores.calibration_terms(p, y, 15), metrics.expected_calibration_error),
}


@pytest.mark.parametrize("name", TERMS)
def test_errors_and_paired_errors_equal_the_bootstrap(name, data):
    terms, metric = TERMS[name]
    first, second, y = data
    example = np.arange(len(y))
    a, b = mean_of(terms(first, y), example), mean_of(terms(second, y), example)
    assert a.value == pytest.approx(metric(first, y))
    assert a.error == pytest.approx(bootstrapped(lambda i: metric(first[i], y[i]), len(y)), rel=0.15)
    paired = bootstrapped(lambda i: metric(second[i], y[i]) - metric(first[i], y[i]), len(y))
    assert (b - a).error == pytest.approx(paired, rel=0.15)
    assert (b - a).value == pytest.approx(metric(second, y) - metric(first, y))


def test_error_of_a_mean_is_that_of_the_textbook():
    values = np.random.default_rng(0).normal(size=50)
    assert mean_of(values, np.arange(50)).error == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_targets_of_one_example_are_not_independent():
    """Every target twice: the error stays. And with different numbers of targets, as the bootstrap over examples."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=80)
    once, twice = mean_of(values, np.arange(80)), mean_of(np.repeat(values, 2), np.repeat(np.arange(80), 2))
    assert (twice.value, twice.error) == pytest.approx((once.value, once.error))
    count = rng.integers(1, 6, size=80)
    example = np.repeat(np.arange(80), count)
    terms = values[example] + 0.5 * rng.normal(size=len(example)) + 0.3 * count[example]
    sums = np.bincount(example, weights=terms)
    expected = bootstrapped(lambda i: sums[i].sum() / count[i].sum(), 80)
    assert mean_of(terms, example).error == pytest.approx(expected, rel=0.15)


def test_error_of_a_root():
    errors = np.random.default_rng(0).normal(size=300) ** 2
    found = mean_of(errors, np.arange(300)).root()
    assert found.value == pytest.approx(math.sqrt(errors.mean()))
    assert found.error == pytest.approx(bootstrapped(lambda i: math.sqrt(errors[i].mean()), 300), rel=0.15)
    assert Statistic(0.0, (np.zeros(3),)).root().error == 0


def test_error_of_an_auroc():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=150).round(1), 0.8 + rng.normal(size=90).round(1)
    terms = _scores.auroc_terms(inside, outside)
    wins = (outside[:, None] > inside) + 0.5 * (outside[:, None] == inside)
    np.testing.assert_allclose(terms[0], wins.mean(0))
    np.testing.assert_allclose(terms[1], wins.mean(1))
    found = two_samples(*terms)
    assert found.value == pytest.approx(wins.mean())
    rng = np.random.default_rng(1)
    resampled = [wins[rng.integers(90, size=90)][:, rng.integers(150, size=150)].mean() for _ in range(600)]
    assert found.error == pytest.approx(np.std(resampled), rel=0.15)


def test_errors_in_a_report():
    made = problem("mlp")
    row = made.fitted().report(made.data())["NLL"]
    f, y = made.model(made.inputs).detach(), made.targets
    p = made.fitted().predict(made.inputs)
    at_map = nn.functional.cross_entropy(f, y, reduction="none")
    of_posterior = nn.functional.nll_loss(p.log(), y, reduction="none")
    for found, losses in (
        (row.map_error, at_map),
        (row.posterior_error, of_posterior),
        (row.difference_error, of_posterior - at_map),
    ):
        assert found == pytest.approx(float(losses.std() / math.sqrt(len(y))))


# -- the verdict ---------------------------------------------------------------------------------------------


def row(name, at_map, of_posterior, error):
    return kl.Comparison(name, at_map, 0.02, of_posterior, 0.02, of_posterior - at_map, error)


def made_report(*rows, regression=False, n_foreign=0, unit="example"):
    return Report(rows, 500, n_foreign, regression, unit, {})


ECE_BETTER, ECE_WORSE = row("ECE", 0.042, 0.011, 0.005), row("ECE", 0.011, 0.042, 0.005)
ECE_SAME = row("ECE", 0.011, 0.012, 0.005)
ADVICE = 'use the MAP, or tune on validation data with tune("validation", data=...).'
VERDICTS = [
    (
        [row("NLL", 0.2, 0.169, 0.0041), ECE_BETTER],
        True,
        "The posterior improves the NLL by 0.0310 ± 0.0041 nats per example and the ECE from 0.042 to 0.011.",
    ),
    (
        [row("NLL", 0.2, 0.169, 0.0141), ECE_WORSE],
        True,
        "The posterior improves the NLL by 0.031 ± 0.014 nats per example, but it worsens the ECE from 0.011 to 0.042.",
    ),
    (
        [row("NLL", 0.2, 0.5, 0.1), ECE_WORSE],
        False,
        "The posterior does not help here: it worsens the NLL by 0.30 ± 0.10 nats per example and the ECE from 0.011 to "
        f"0.042; {ADVICE}",
    ),
    (
        [row("NLL", 0.2, 0.5, 0.1), ECE_BETTER],
        False,
        "The posterior does not help here: it worsens the NLL by 0.30 ± 0.10 nats per example, but it improves the ECE "
        f"from 0.042 to 0.011; {ADVICE}",
    ),
    (
        [row("NLL", 0.2, 0.21, 0.1), ECE_SAME],
        None,
        "The posterior neither improves nor worsens the NLL measurably (+0.01 ± 0.10 nats per example).",
    ),
    (
        [row("NLL", 0.2, 0.19, 0.1), ECE_BETTER],
        None,
        "The posterior neither improves nor worsens the NLL measurably (-0.01 ± 0.10 nats per example), but it improves "
        "the ECE from 0.042 to 0.011.",
    ),
]


@pytest.mark.parametrize(("rows", "helps", "verdict"), VERDICTS)
def test_verdicts(rows, helps, verdict):
    report = made_report(*rows)
    assert report.helps is helps
    assert report.verdict == verdict
    assert str(report).splitlines()[-1] == verdict


@pytest.mark.parametrize(
    ("auroc", "words"),
    [
        (row("AUROC", 0.7, 0.9, 0.02), "better (AUROC 0.900, MAP 0.700)"),
        (row("AUROC", 0.9, 0.7, 0.02), "worse (AUROC 0.700, MAP 0.900)"),
        (row("AUROC", 0.7, 0.71, 0.02), "no better and no worse (AUROC 0.710, MAP 0.700)"),
    ],
)
def test_verdict_on_foreign_inputs(auroc, words):
    good = made_report(row("NLL", 0.2, 0.1, 0.01), ECE_SAME, auroc, n_foreign=9).verdict
    assert good.endswith(f"nats per example; it recognizes foreign inputs {words}.")
    bad = made_report(row("NLL", 0.1, 0.2, 0.01), ECE_SAME, auroc, n_foreign=9).verdict
    assert bad.endswith(f"; it recognizes foreign inputs {words}; {ADVICE}")


def test_verdict_in_regression():
    rows = row("NLL", 1.0, 0.5, 0.01), row("coverage 90 %", 0.6, 0.884, 0.01)
    assert made_report(*rows, regression=True, unit="target").verdict == (
        "The posterior improves the NLL by 0.500 ± 0.010 nats per target, and its 90 % intervals cover 88 % of the targets "
        "(MAP: 60 %)."
    )


@pytest.mark.parametrize("likelihood", ["classification", "binary", "regression", "heteroscedastic"])
def test_a_certain_posterior_is_the_map(likelihood):
    made = problem("mlp", likelihood)
    report = made.fitted(prior_precision=1e14).report(made.data())
    for row in report.rows:
        assert row.difference == pytest.approx(0, abs=1e-9)
        assert row.direction == 0 or row.difference != 0


def test_a_posterior_that_helps_is_recognized():
    """An overfitted network on noisy labels."""
    torch.manual_seed(0)
    x, y = torch.randn(400, 5).double(), torch.randint(3, (400,))
    model = nn.Sequential(nn.Linear(5, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
        optimizer.step()
    posterior = kl.KronLaplace(model.eval(), "classification").fit([(x[:200], y[:200])])
    report = posterior.report([(x[200:], y[200:])])
    assert report.helps
    assert report.verdict.startswith("The posterior improves the NLL by ")
    assert " and the ECE from 0." in report.verdict


# -- the table and the picture -------------------------------------------------------------------------------


def test_the_table_is_aligned_and_the_numbers_can_be_had():
    made = problem("mlp")
    report = made.fitted().report(made.data(), made.inputs + 1)
    *table, verdict = str(report).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["7", "examples,", "7", "foreign", "ones", "MAP", "posterior", "difference"]
    assert len(table) == 1 + len(report.rows)
    assert verdict == report.verdict
    assert repr(report) == str(report)
    values = report.to_dict()
    assert list(values) == [row.name for row in report.rows]
    assert values["NLL"]["difference_error"] == report["NLL"].difference_error
    assert set(values["NLL"]) == {"map", "map_error", "posterior", "posterior_error", "difference", "difference_error"}
    with pytest.raises(KeyError, match=r"there is no row 'loss'; there are \['NLL', 'Brier score'"):
        report["loss"]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_picture(likelihood, tmp_path):
    """A file; or somebody else's axes, in which the legend is outside and covers nothing."""
    made = problem("mlp", likelihood)
    report = made.fitted().report(made.data())
    path = tmp_path / "report.png"
    own = report.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    assert report.plot(axes) is axes
    for drawn in (own, axes):
        drawn.figure.canvas.draw()
        legend = drawn.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == ["calibrated", "MAP", "posterior"]
        assert not legend.get_window_extent().overlaps(drawn.get_window_extent())
    extent = own.get_legend().get_window_extent()
    assert own.figure.bbox.contains(extent.x0, extent.y0)
    assert own.figure.bbox.contains(extent.x1, extent.y1)


def test_few_targets_are_one_point():
    confidence, accuracy = np.array([0.1, 0.2, 0.5, 0.8, 0.9]), np.array([0.0, 0.5, 1.0, 1.0, 0.5])
    found = pooled(CalibrationCurve(confidence, accuracy, np.array([4, 8, 30, 20, 2])))
    assert found.count.tolist() == [12, 30, 22]
    np.testing.assert_allclose(found.predicted, [2 / 12, 0.5, 17.8 / 22])
    np.testing.assert_allclose(found.observed, [4 / 12, 1, 21 / 22])
    few = CalibrationCurve(np.array([0.1, 0.9]), np.array([0.0, 1.0]), np.array([1, 2]))
    assert pooled(few).count.tolist() == [3]


def test_without_matplotlib(monkeypatch):
    made = problem("mlp")
    report = made.fitted().report(made.data())
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r"needs matplotlib, which is not installed: pip install 'kronlaplace\[exper"):
        report.plot("report.png")


# -- refusals ------------------------------------------------------------------------------------------------


def test_refusals():
    made = problem("mlp")
    posterior, x, y = made.fitted(), made.inputs, made.targets
    with pytest.raises(TypeError, match="a report needs data with targets"):
        posterior.report([x])
    with pytest.raises(ValueError, match="at least two examples with targets, for standard errors; got 1"):
        posterior.report([(x[:1], y[:1])])
    with pytest.raises(ValueError, match="at least two examples with targets, for standard errors; got 0"):
        posterior.report([(x, torch.full_like(y, -100))])
    with pytest.raises(ValueError, match="foreign needs at least two examples, for standard errors; got 1"):
        posterior.report([(x, y)], x[:1])
    with pytest.raises(ValueError, match=r"batch 1: class labels must lie in 0 … 3"):
        posterior.report([(x, y), (x, y + 9)])
    with pytest.raises(TypeError, match=r"predictive must be a kl\.Predictive"):
        posterior.report([(x, y)], predictive="mc")
    with pytest.raises(TypeError, match=r"plot takes a path, such as 'report\.png', or matplotlib axes; got int"):
        posterior.report([(x, y)]).plot(3)
    with pytest.raises(RuntimeError, match="fit"):
        made.posterior().report([(x, y)])
    binary = problem("mlp", "binary")
    with pytest.raises(ValueError, match=r"needs labels 0 and 1 with Bernoulli\(\)"):
        binary.fitted().report([(binary.inputs, 0.7 * binary.targets)])
    with pytest.raises(ValueError, match="link 'bridge' is not for"):
        binary.fitted().report(binary.data(), predictive=kl.Predictive(link="bridge"))
    plain = problem("mlp", "regression")
    with pytest.raises(NotImplementedError, match="Euclidean has no noise model"):
        kl.KronLaplace(plain.model, "euclidean").fit(plain.data()).report(plain.data())


def test_nothing_random_changes():
    made = problem("mlp")
    posterior = made.fitted()
    loader = DataLoader(TensorDataset(made.inputs, made.targets), 3, shuffle=True)
    before = torch.get_rng_state()
    assert posterior.report(loader)["NLL"].posterior == pytest.approx(posterior.report(loader)["NLL"].posterior)
    assert torch.equal(torch.get_rng_state(), before)
