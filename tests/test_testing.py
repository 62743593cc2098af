"""The checks of `kronlaplace.testing` pass for the package's own classes and fail for wrong ones, naming the law."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace.layers import LinearLayer
from kronlaplace.testing import check_damping, check_layer, check_likelihood, temporary_registrations
from kronlaplace.testing.laws import law, require, require_equal

LIKELIHOODS = {
    "categorical": (kl.Categorical(), None, None),
    "bernoulli": (kl.Bernoulli(), None, None),
    "gaussian": (kl.Gaussian(noise_std=0.5), None, None),
    "euclidean": (kl.Euclidean(), None, None),
    "heteroscedastic": (kl.HeteroscedasticGaussian(), None, None),
    "images": (kl.Categorical(class_axis=1), torch.randn(4, 3, 2), torch.tensor([[0, 1], [2, -100], [1, 1], [0, 2]])),
    "tokens": (kl.Categorical(ignore_index=0), torch.randn(4, 2, 3), torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]])),
    "soft": (kl.Bernoulli(), torch.randn(5), torch.rand(5)),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_of_the_package(name):
    check_likelihood(*LIKELIHOODS[name])


DAMPINGS = {
    "tikhonov": kl.damping.Tikhonov(0.1),
    "none": kl.damping.Tikhonov(0.0),
    "by weight": kl.damping.Tikhonov(torch.rand(4, 3, generator=torch.Generator().manual_seed(0))),
    "factored": kl.damping.FactoredTikhonov(torch.tensor(0.1)),
    "trace restricted": kl.damping.TraceRestricted(0.1),
    "automatic": kl.damping.TraceRestrictedAuto(1e-3),
    "automatic, linear": kl.damping.TraceRestrictedAuto(1e-3, linear=0.1),
}


@pytest.mark.parametrize("name", DAMPINGS)
def test_dampings_of_the_package(name):
    check_damping(DAMPINGS[name])


LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), (5, 3)),
    "no bias": (lambda: nn.Linear(3, 4, bias=False), (5, 2, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), (3, 2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2), (3, 2, 4, 4)),
    "groups": (lambda: nn.Conv2d(2, 4, (2, 3), groups=2, bias=False), (3, 2, 3, 4)),
    "layer norm": (lambda: nn.LayerNorm((2, 3)), (4, 2, 3)),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 2, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 2)),
    "batch norm": (lambda: nn.BatchNorm2d(2), (3, 2, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_package(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    check_layer(make(), torch.randn(shape))


def test_embeddings_of_the_package():
    check_layer(nn.Embedding(5, 3, padding_idx=1), torch.tensor([[0, 1], [2, 2], [4, 0]]))


# -- likelihoods that break one law each -------------------------------------------------------------------------


class Scaled(kl.Gaussian):
    def _gradient(self, outputs, targets):
        return 2 * super()._gradient(outputs, targets)


class TooManyDirections(kl.Gaussian):
    def _exact_directions(self, outputs, targets):
        yield from super()._exact_directions(outputs, targets)
        yield torch.zeros_like(outputs)


class WrongMetric(kl.Bernoulli):
    def _exact_directions(self, outputs, targets):
        for d in super()._exact_directions(outputs, targets):
            yield 1.001 * d


class WrongMetricThatNoHessianTells(kl.HeteroscedasticGaussian):
    def _exact_directions(self, outputs, targets):
        for d in super()._exact_directions(outputs, targets):
            yield 1.1 * d


class Biased(kl.Gaussian):
    def _sampled_direction(self, outputs, targets, generator):
        return super()._sampled_direction(outputs, targets, generator) + 0.2


class TooNarrow(kl.Categorical):
    def _sampled_direction(self, outputs, targets, generator):
        return super()._sampled_direction(1.3 * outputs, targets, generator)


class Unseeded(kl.Gaussian):
    def _sampled_direction(self, outputs, targets, generator):
        return super()._sampled_direction(outputs, targets, None)


class Mean(kl.Gaussian):
    def statistics(self, outputs, targets):
        return super().statistics(outputs, targets) / outputs.numel()


class OneStatistic(kl.Gaussian):
    def statistics(self, outputs, targets):
        return super().statistics(outputs, targets)[:1]


class NotLinear(kl.Bernoulli):
    def log_likelihood(self, statistics):
        return -statistics[0] / statistics[1]


class OtherDivergence(kl.Categorical):
    def _divergence(self, outputs, new_outputs, targets):
        return 2 * super()._divergence(outputs, new_outputs, targets)


class NegativeDivergence(kl.Categorical):
    def _divergence(self, outputs, new_outputs, targets):
        return -super()._divergence(outputs, new_outputs, targets)


class RefusesItsGradient(kl.Categorical):
    def _gradient_error(self, outputs, gradient):
        return gradient.abs()


class OtherProduct(kl.Bernoulli):
    def _metric_product(self, outputs, vectors, targets):
        return 2 * super()._metric_product(outputs, vectors, targets)


class NoiseInStatistics(kl.Gaussian):
    def statistics(self, outputs, targets):
        return super().statistics(outputs, targets) / torch.tensor([self.noise_std**2, 1.0])

    def log_likelihood(self, statistics, noise_std=None):
        return super().log_likelihood(statistics * torch.tensor([self.noise_std**2, 1.0]), noise_std)


class OtherExponent(kl.Gaussian):
    def noise_exponent(self, sampling):
        return -1


class NoiseIgnored(kl.Gaussian):
    def log_likelihood(self, statistics, noise_std=None):
        return super().log_likelihood(statistics)


class OtherShape(kl.Bernoulli):
    def predictive(self, mean, covariance, link, n_samples, generator):
        return super().predictive(mean, covariance, link, n_samples, generator)[..., :1]


class OtherDtype(kl.Gaussian):
    def _exact_directions(self, outputs, targets):
        for d in super()._exact_directions(outputs, targets):
            yield d.float()


class Unnormalized(kl.Categorical):
    def predictive(self, mean, covariance, link, n_samples, generator):
        return 0.9 * super().predictive(mean, covariance, link, n_samples, generator)


class OutOfRange(kl.Bernoulli):
    def predictive(self, mean, covariance, link, n_samples, generator):
        return 2 * super().predictive(mean, covariance, link, n_samples, generator)


class NegativeVariance(kl.Gaussian):
    def predictive(self, mean, covariance, link, n_samples, generator):
        prediction = super().predictive(mean, covariance, link, n_samples, generator)
        return replace(prediction, variance=-prediction.variance)


class OtherMean(kl.Bernoulli):
    def sample_mean(self, outputs):
        return super().sample_mean(2 * outputs)


class MeanNll(kl.Bernoulli):
    def predictive_nll(self, prediction, targets):
        return super().predictive_nll(prediction, targets) / torch.tensor([len(targets), 1])


class CovarianceIgnored(kl.Gaussian):
    def predictive(self, mean, covariance, link, n_samples, generator):
        return super().predictive(mean, covariance * (covariance.ndim - 1), link, n_samples, generator)


@dataclass(frozen=True)
class Tuple(kl.Gaussian):
    powers: tuple[int, ...] = (1, 2)


BROKEN_LIKELIHOODS = {
    Scaled: r"empirical direction is the gradient .*; at \(\d, \d\) it is -?[\d.]+ instead of -?[\d.]+",
    TooManyDirections: r"n_directions is the number of directions \(sampling='exact'\); .*: it is 3, but there are 4",
    WrongMetric: r"sum of d dᵀ over exact directions is the Hessian",
    WrongMetricThatNoHessianTells: r"sum of d dᵀ over drawn directions is that over exact ones .*may deviate by",
    Biased: r"drawn directions are zero on average; the mean of \d+ draws",
    TooNarrow: r"drawn directions are zero on average|sum of d dᵀ over drawn directions",
    Unseeded: r"equal generators give equal draws",
    Mean: r"statistics add up over examples",
    OneStatistic: r"statistics are two float64 numbers; .*shape \(1,\)",
    NotLinear: r"log_likelihood adds up over examples",
    OtherDtype: r"directions have the outputs' shape \(6, 3\) and dtype torch.float64.*torch.float32",
    NoiseInStatistics: r"statistics do not depend on the noise",
    OtherExponent: r"the metric scales as the power noise_exponent of the noise",
    NoiseIgnored: r"log_likelihood\(statistics, noise_std\) is that of a likelihood with that noise",
    OtherShape: r"predictions have the shape of the outputs",
    OtherDivergence: r"divergence is half the metric's square of a small change",
    NegativeDivergence: r"divergence is not negative",
    RefusesItsGradient: r"check_gradient accepts the gradient of the negative log-likelihood without targets",
    OtherProduct: r"metric_product is the sum of d dᵀ over exact directions times a vector",
    Unnormalized: r"probabilities of the classes sum to one \(with link='margin'\)",
    OutOfRange: r"probabilities lie between 0 and 1",
    NegativeVariance: r"variances are not negative",
    OtherMean: r"a prediction without covariance is sample_mean",
    MeanNll: r"predictive_nll is the negative log-likelihood|predictive_nll adds up",
    CovarianceIgnored: r"variances alone give the same result as a diagonal covariance",
    Tuple: r"JSON restores Tuple",
}


@pytest.mark.quick(5)
@pytest.mark.parametrize("broken", BROKEN_LIKELIHOODS, ids=lambda cls: cls.__name__)
def test_a_likelihood_that_breaks_a_law(broken):
    with temporary_registrations():
        kl.register_likelihood(broken)
        with pytest.raises(AssertionError, match=BROKEN_LIKELIHOODS[broken]):
            check_likelihood(broken(noise_std=2.0) if issubclass(broken, kl.Gaussian) else broken())


def test_a_likelihood_that_is_not_registered_or_takes_no_targets():
    class Unregistered(kl.Gaussian):
        pass

    class Picky(kl.Gaussian):
        def check_targets(self, outputs, targets):
            raise ValueError("never")

    with pytest.raises(AssertionError, match=r"Unregistered is registered.*@kl\.register_likelihood"):
        check_likelihood(Unregistered())
    with pytest.raises(ValueError, match=r"none of the targets that were tried; pass outputs and targets"):
        check_likelihood(Picky())
    with pytest.raises(AssertionError, match=r"check_targets accepts the given targets; it raised: never"):
        check_likelihood(Picky(), torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(AssertionError, match=r"check_targets accepts the given targets; it returned False"):
        check_likelihood(kl.Categorical(), torch.randn(3, 2), torch.tensor([0, 1, 5]))
    with pytest.raises(TypeError, match=r"check_likelihood takes a kl.Likelihood"):
        check_likelihood(kl.Gaussian)


# -- dampings -------------------------------------------------------------------------------------------------------


class OwnDamping(kl.damping.Damping):
    def eigenvalues(self, block):
        return block.eigenvalues() + 0.1


class Negative(OwnDamping):
    def eigenvalues(self, block):
        return super().eigenvalues(block) - 1


class Flat(OwnDamping):
    def eigenvalues(self, block):
        return super().eigenvalues(block).flatten()


class Single(OwnDamping):
    def eigenvalues(self, block):
        return super().eigenvalues(block).float()


class Infinite(OwnDamping):
    def eigenvalues(self, block):
        return super().eigenvalues(block) / 0


class Growing(OwnDamping):
    calls = 0

    def eigenvalues(self, block):
        self.calls += 1
        return super().eigenvalues(block) + self.calls


class Other(OwnDamping):
    def invert(self, block):
        return kl.damping.Tikhonov(0.2).invert(block)


class InPlace(OwnDamping):
    def eigenvalues(self, block):
        values = super().eigenvalues(block)
        for tensor in block.to_tensors().values():
            if tensor.is_floating_point() and tensor.ndim == 2:
                tensor.mul_(1.5)
        return values if not isinstance(block, (kl.DiagonalBlock, kl.EigenBlock)) else values.clone()


class DoubleInverse(kl.damping.DampedInverse):
    def sqrt_solve(self, matrices):
        return self.solve(matrices)


class NoRoot(OwnDamping):
    def invert(self, block):
        return DoubleInverse(block, self.eigenvalues(block))


class Together(OwnDamping):
    def invert_all(self, blocks):
        return {name: kl.damping.Tikhonov(0.3).invert(block) for name, block in blocks.items()}


class WrongFactors(OwnDamping):
    def damped_factors(self, block):
        return kl.damping.FactoredTikhonov(0.3).damped_factors(block)


BROKEN_DAMPINGS = {
    Negative: r"eigenvalues are positive; .*the smallest is -0\.",
    Flat: r"is a float64 tensor of the shape of block.eigenvalues\(\), \(4, 3\); .*float64 of shape \(12,\)",
    Single: r"eigenvalues\(block\) is a float64 tensor of the shape of block.eigenvalues",
    Infinite: r"eigenvalues are finite",
    Growing: r"eigenvalues are the same at every call",
    Other: r"the inverse has the eigenvalues that eigenvalues\(block\) returns",
    InPlace: r"eigenvalues are the same at every call|is left unchanged",
    NoRoot: r"sqrt_solve twice is solve",
    Together: r"invert_all gives what invert gives",
    WrongFactors: r"a solver solves as the inverse does",
}


@pytest.mark.parametrize("broken", BROKEN_DAMPINGS, ids=lambda cls: cls.__name__)
def test_a_damping_that_breaks_a_law(broken):
    with pytest.raises(AssertionError, match=BROKEN_DAMPINGS[broken]):
        check_damping(broken())


def test_a_damping_that_keeps_them():
    check_damping(OwnDamping())
    with pytest.raises(TypeError, match=r"check_damping takes a kl.damping.Damping"):
        check_damping(0.1)


@pytest.mark.parametrize("broken", [Negative, Flat, Single, Infinite], ids=lambda cls: cls.__name__)
def test_a_wrong_damping_is_refused_where_it_is_used(broken):
    message = "float64 tensor of the shape of block.eigenvalues|must be larger than 0|NaN or infinite eigenvalues"
    with pytest.raises(ValueError, match=message):
        broken().invert(kl.DiagonalBlock(torch.full((2, 3), 0.5), "0"))


# -- layers ---------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Squashed(Plain):
    def forward(self, x):
        return super().forward(x).tanh()


class TwiceAsLarge(LinearLayer):
    def weight_gradients(self, x, grad):
        return 2 * super().weight_gradients(x, grad)


class WrongTotal(LinearLayer):
    def total_weight_gradient(self, x, grad):
        return super().total_weight_gradient(x, grad) / len(x)


class WrongSquares(LinearLayer):
    def squared_weight_gradients(self, calls, out):
        out += 1
        return True


class WrongPositions(LinearLayer):
    def positions(self, x, grad):
        return 1


class WrongMoment(LinearLayer):
    def add_activation_moment(self, x, sums):
        super().add_activation_moment(x / len(x), sums)


class WrongGradientMoment(LinearLayer):
    def add_gradient_moment(self, grad, out, positions):
        super().add_gradient_moment(grad, out, 1)


class WrongProjection(LinearLayer):
    def project(self, x, basis):
        return super().project(x + 1, basis)


class WrongOrder(LinearLayer):
    def assemble(self, values):
        return super().assemble(values).flip(0)


class WrongInput(LinearLayer):
    def is_input(self, x):
        return x.ndim == 7


BROKEN_LAYERS = {
    TwiceAsLarge: r"weight_gradients are each example's own, by autograd; at",
    WrongTotal: r"total_weight_gradient is their sum",
    WrongSquares: r"squared_weight_gradients is the sum of their squares",
    WrongPositions: r"positions is their number 2; .*1",
    WrongMoment: r"the activation moment is the sum of a aᵀ",
    WrongGradientMoment: r"the gradient moment is the sum of g gᵀ",
    WrongProjection: r"project is the activations in another basis",
    WrongOrder: r"assembling the parts of a matrix restores it",
    WrongInput: r"is_input accepts the inputs",
}


@pytest.mark.parametrize("broken", BROKEN_LAYERS, ids=lambda cls: cls.__name__)
def test_a_layer_that_breaks_a_law(broken):
    torch.manual_seed(0)
    with temporary_registrations():
        kl.register_layer(Plain, broken)
        with pytest.raises(AssertionError, match=BROKEN_LAYERS[broken]):
            check_layer(Plain(), torch.randn(3, 2, 4))


def test_a_module_that_does_something_else_than_its_family():
    torch.manual_seed(0)
    with temporary_registrations():
        kl.register_layer(Plain, "linear")
        check_layer(Plain(), torch.randn(3, 4))
        kl.register_layer(Plain, "linear", transposed=True)
        with pytest.raises(
            AssertionError, match=r"weight_gradients are each example's own|outputs are the matrix times"
        ):
            check_layer(Plain(), torch.randn(3, 4))
        kl.register_layer(Squashed, "linear")
        with pytest.raises(AssertionError, match=r"weight_gradients are each example's own, by autograd"):
            check_layer(Squashed(), torch.randn(3, 4))


def test_what_check_layer_cannot_check():
    with pytest.raises(AssertionError, match=r"PReLU is registered \(kl\.register_layer\).*NotImplementedError"):
        check_layer(nn.PReLU(), torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"LSTM is written out"):
        check_layer(nn.LSTM(3, 4), torch.randn(3, 2, 3))
    with pytest.raises(ValueError, match=r"at least two examples on the first axis; got shape \(1, 3\)"):
        check_layer(nn.Linear(3, 4), torch.randn(1, 3))
    with pytest.raises(TypeError, match=r"takes a module and a tensor"):
        check_layer(nn.Linear, torch.randn(3, 4))


def test_the_module_is_left_as_it_was():
    module = nn.Linear(3, 4)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    check_layer(module, torch.randn(5, 3))
    assert module.training and module.weight.dtype == torch.float32 and module.weight.grad is None
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


# -- how laws read ---------------------------------------------------------------------------------------------------


def test_how_laws_read():
    with pytest.raises(AssertionError, match=r"^1 is 2; it does not hold: 3$"):
        require(False, "1 is 2", 3)
    with pytest.raises(AssertionError, match=r"^a is b; got shape \(2,\) instead of \(3,\)\.$"):
        require_equal(torch.ones(2), torch.ones(3), "a is b")
    with pytest.raises(AssertionError, match=r"a is b; at \(1,\) it is nan instead of 1\."):
        require_equal(torch.tensor([1.0, torch.nan]), torch.ones(2), "a is b")
    with pytest.raises(AssertionError, match=r"it runs; it raised KeyError: 'x'"), law("it runs"):
        json.loads("{}")["x"]
    require_equal(torch.ones(0), torch.ones(0), "nothing is nothing")
