"""Metrics against scikit-learn, scipy and counting by hand."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from kronlaplace import metrics


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def predictions(rng):
    """Probabilities `(200, 4)` and labels that are neither perfect nor random."""
    logits = 2.0 * rng.normal(size=(200, 4))
    labels = np.array([rng.choice(4, p=row) for row in softmax(0.5 * logits, axis=1)])
    return softmax(logits, axis=1), labels


class TestClassification:
    def test_accuracy_and_nll_equal_scikit_learn(self, predictions):
        p, y = predictions
        assert metrics.accuracy(p, y) == accuracy_score(y, p.argmax(1))
        assert metrics.negative_log_likelihood(p, y) == pytest.approx(log_loss(y, p, labels=range(4)))

    def test_brier_sums_over_classes(self, predictions):
        p, y = predictions
        by_class = sum(brier_score_loss(y == c, p[:, c]) for c in range(4))
        assert metrics.brier_score(p, y) == pytest.approx(by_class)
        assert metrics.brier_score([[1.0, 0.0]], [1]) == 2.0

    def test_impossible_label_has_infinite_nll(self):
        assert metrics.negative_log_likelihood([[1.0, 0.0]], [1]) == np.inf

    def test_reliability_curve_equals_a_loop_over_bins(self, predictions):
        p, y = predictions
        curve = metrics.reliability_curve(p, y, n_bins=7)
        confidence, right = p.max(1), p.argmax(1) == y
        for b in range(7):
            inside = (confidence > b / 7) & (confidence <= (b + 1) / 7)
            assert curve.count[b] == inside.sum()
            if inside.any():
                assert curve.confidence[b] == pytest.approx(confidence[inside].mean())
                assert curve.accuracy[b] == pytest.approx(right[inside].mean())
            else:
                assert np.isnan(curve.confidence[b])
                assert np.isnan(curve.accuracy[b])
        assert curve.count.sum() == 200

    def test_bins_are_closed_on_the_right(self):
        # 0.75 is the edge between the third and the fourth of four bins, and exact in binary.
        assert metrics.reliability_curve([[0.75, 0.25]], [0], n_bins=4).count.tolist() == [0, 0, 1, 0]
        assert metrics.reliability_curve([[1.0, 0.0]], [0], n_bins=4).count.tolist() == [0, 0, 0, 1]

    def test_expected_calibration_error_by_hand(self):
        # Two examples at 0.9, one right: gap 0.4. Two at 0.6, both right: gap 0.4. One at 1.0, right: no gap.
        p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [1.0, 0.0]])
        assert metrics.expected_calibration_error(p, [0, 1, 0, 0, 0], n_bins=10) == pytest.approx(
            (2 * 0.4 + 2 * 0.4 + 0) / 5
        )

    def test_calibrated_labels_have_a_small_calibration_error(self, rng):
        p = softmax(rng.normal(size=(50_000, 3)), axis=1)
        y = (rng.random((50_000, 1)) > p.cumsum(1)).sum(1)
        assert metrics.expected_calibration_error(p, y) < 0.02  # about √(bins/N), were it exact

    def test_entropy_equals_scipy(self, predictions):
        p, _ = predictions
        np.testing.assert_allclose(metrics.predictive_entropy(p), stats.entropy(p, axis=1))
        np.testing.assert_allclose(metrics.predictive_entropy([[1.0, 0.0], [0.5, 0.5]]), [0.0, np.log(2.0)])

    def test_auroc_is_the_share_of_ordered_pairs(self, rng):
        inside, outside = rng.integers(0, 20, 50), rng.integers(5, 25, 40)  # integers, so that there are ties
        pairs = np.sign(outside[:, None] - inside[None, :])
        assert metrics.ood_auroc(inside, outside) == pytest.approx((0.5 * (1 + pairs)).mean())

    @pytest.mark.parametrize(
        ("probabilities", "labels", "message"),
        [
            (np.ones(3) / 3, [0], r"shape \(N, C\).*got \(3,\)"),
            (np.ones((3, 1)), [0, 0, 0], "np.stack"),
            (np.empty((0, 3)), [], "at least one example"),
            ([[np.nan, 1.0]], [0], "NaN or infinity"),
            ([[2.0, -1.0]], [0], r"\[0, 1\], got values from -1 to 2.*softmax"),
            ([[0.5, 0.4]], [0], "sum to 1 within 0.001, one is off by 0.1"),
            ([[0.5, 0.5]], [[0, 1]], r"labels must have shape \(1,\).*got \(1, 2\).*one-hot"),
            ([[0.5, 0.5]], [0.0], "integers, got dtype float64"),
            ([[0.5, 0.5]], [2], "0 .. 1 for 2 classes, got values from 2 to 2"),
            ([[0.5, 0.5]], [-1], "got values from -1 to -1"),
        ],
    )
    @pytest.mark.parametrize(
        "metric",
        [
            metrics.accuracy,
            metrics.negative_log_likelihood,
            metrics.brier_score,
            metrics.reliability_curve,
            metrics.expected_calibration_error,
        ],
    )
    def test_bad_input_is_refused(self, metric, probabilities, labels, message):
        with pytest.raises(ValueError, match=message):
            metric(probabilities, labels)

    def test_float32_and_half_precision_pass(self, predictions):
        p, y = predictions
        for dtype in (np.float32, np.float16):
            assert metrics.accuracy(p.astype(dtype), y.astype(np.int32)) == pytest.approx(
                metrics.accuracy(p, y), abs=0.01
            )

    def test_no_bins_and_no_scores_are_refused(self):
        with pytest.raises(ValueError, match="n_bins must be at least 1, got 0"):
            metrics.reliability_curve([[0.5, 0.5]], [0], n_bins=0)
        with pytest.raises(ValueError, match="out_scores must be a vector with at least one entry"):
            metrics.ood_auroc([1.0], [])
        with pytest.raises(ValueError, match="in_scores contains NaN"):
            metrics.ood_auroc([np.nan], [1.0])


class TestRegression:
    @pytest.mark.parametrize("shape", [(60,), (20, 3)])
    def test_log_likelihood_equals_scipy(self, rng, shape):
        mean, target = rng.normal(size=shape), rng.normal(size=shape)
        variance = rng.uniform(0.1, 2.0, size=shape)
        expected = stats.norm(mean, np.sqrt(variance)).logpdf(target).mean()
        assert metrics.gaussian_log_likelihood(mean, variance, target) == pytest.approx(expected)
        assert metrics.gaussian_log_likelihood(mean, 0.3, target) == pytest.approx(
            stats.norm(mean, np.sqrt(0.3)).logpdf(target).mean()
        )

    def test_crps_equals_the_integral_of_its_definition(self, rng):
        mean, variance, target = rng.normal(size=5), rng.uniform(0.1, 2, size=5), 2 * rng.normal(size=5)
        grid = np.linspace(-20, 20, 40_001)
        cdf = stats.norm.cdf(grid, mean[:, None], np.sqrt(variance)[:, None])
        squares = np.square(cdf - (grid >= target[:, None]))
        expected = squares.sum(axis=1).mean() * (grid[1] - grid[0])
        assert metrics.gaussian_crps(mean, variance, target) == pytest.approx(expected, abs=1e-3)
        assert metrics.gaussian_crps(mean, 1e-16, target) == pytest.approx(np.abs(mean - target).mean())

    def test_rmse(self):
        assert metrics.rmse([[1.0], [2.0]], [[4.0], [6.0]]) == pytest.approx(np.sqrt((9 + 16) / 2))

    def test_coverage_equals_scipy_intervals(self, rng):
        mean, variance = rng.normal(size=500), rng.uniform(0.5, 2.0, size=500)
        target = mean + 1.3 * rng.normal(size=500)
        levels = (0.5, 0.9, 0.95)
        expected = []
        for level in levels:
            low, high = stats.norm(mean, np.sqrt(variance)).interval(level)
            expected.append(np.mean((low <= target) & (target <= high)))
        np.testing.assert_allclose(metrics.interval_coverage(mean, variance, target, levels), expected)

    def test_right_noise_covers_the_nominal_share(self, rng):
        levels = np.linspace(0.1, 0.9, 9)
        covered = metrics.interval_coverage(np.zeros(100_000), 4.0, 2.0 * rng.normal(size=100_000), levels)
        np.testing.assert_allclose(covered, levels, atol=0.01)

    def test_broadcasting_by_accident_is_refused(self):
        with pytest.raises(ValueError, match=r"mean \(3,\), target \(3, 1\)"):
            metrics.rmse(np.zeros(3), np.zeros((3, 1)))
        with pytest.raises(ValueError, match=r"variance \(3, 1\)"):
            metrics.gaussian_log_likelihood(np.zeros(3), np.ones((3, 1)), np.zeros(3))

    def test_bad_values_are_refused(self):
        with pytest.raises(ValueError, match="variance must be positive, its smallest value is 0"):
            metrics.gaussian_log_likelihood([0.0], [0.0], [1.0])
        with pytest.raises(ValueError, match="target contains NaN"):
            metrics.rmse([0.0], [np.nan])
        with pytest.raises(ValueError, match="mean is empty"):
            metrics.rmse([], [])
        with pytest.raises(ValueError, match=r"between 0 and 1, got \[90.0\]. Write 90 % as 0.9"):
            metrics.interval_coverage([0.0], [1.0], [0.0], levels=[90])
