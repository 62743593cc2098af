"""A likelihood of the user's own with a noise: what tuning needs of it has defaults in the base class."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import kronlaplace as kl


@dataclass(frozen=True)
class Own(kl.Likelihood):
    """A Gaussian written by an outsider, without anything that has a default in `Likelihood`."""

    noise_std: float = 1.0

    def check_targets(self, outputs, targets):
        return torch.isfinite(targets).all(), "targets must be finite."

    def statistics(self, outputs, targets):
        error = (outputs - targets).double()
        return torch.stack([error.square().sum(), torch.tensor(float(error.numel()), dtype=torch.float64)])

    def log_likelihood(self, statistics, noise_std=None):
        noise = torch.as_tensor(self.noise_std if noise_std is None else noise_std, dtype=torch.float64)
        return -statistics[0] / (2 * noise**2) - statistics[1] * (noise.log() + 0.5 * math.log(2 * math.pi))

    def _exact_directions(self, outputs, targets):
        for column in torch.eye(outputs.shape[1], dtype=outputs.dtype):
            yield column.expand_as(outputs) / self.noise_std

    def _sampled_direction(self, outputs, targets, generator):
        raise NotImplementedError

    def _gradient(self, outputs, targets):
        return (outputs - targets) / self.noise_std**2

    @property
    def links(self):
        return ()

    def sample_mean(self, outputs):
        return outputs

    def noise_variance(self, outputs):
        return outputs.new_tensor(self.noise_std**2)

    def predictive(self, mean, covariance, link, n_samples, generator):
        return kl.Prediction(mean, covariance, mean.new_tensor(self.noise_std**2))

    def predictive_nll(self, prediction, targets):
        normal = torch.distributions.Normal(prediction.mean, prediction.total_variance.sqrt())
        nll = -normal.log_prob(targets).double()
        return torch.stack([nll.sum(), torch.tensor(float(nll.numel()), dtype=torch.float64)])


def posteriors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double().eval()
    x = torch.randn(30, 3).double()
    data = [(x, model(x).detach() + 0.3 * torch.randn(30, 2).double())]
    return [kl.KronLaplace(model, likelihood).fit(data) for likelihood in (Own(0.7), kl.Gaussian(0.7, False))], data


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:the (validation loss|evidence) is")
@pytest.mark.parametrize("method", ["evidence", "validation"])
def test_prior_and_noise_are_tuned_as_of_a_gaussian(method):
    (own, gaussian), data = posteriors()
    start = own.log_marginal_likelihood(noise_std=0.4)
    torch.testing.assert_close(start, gaussian.log_marginal_likelihood(noise_std=0.4), rtol=1e-9, atol=0)
    for posterior in (own, gaussian):
        posterior.tune(method, data=data if method == "validation" else None)
    assert isinstance(own.likelihood, Own)
    # On validation data the grid is tried around another noise, since an outsider's training error is not known.
    assert own.likelihood.noise_std == pytest.approx(
        gaussian.likelihood.noise_std, rel=1e-3 if method == "evidence" else 0.1
    )
    if method == "evidence":
        torch.testing.assert_close(own.prior_precision, gaussian.prior_precision, rtol=1e-3, atol=0)


@pytest.mark.parametrize("noise", [0.2, 1.0, 3.0])
def test_derivatives_in_the_noise(noise):
    (own, gaussian), _ = posteriors()
    statistics = own.fisher.statistics
    expected = gaussian.likelihood.noise_derivatives(statistics, noise)
    assert own.likelihood.noise_derivatives(statistics, noise) == pytest.approx(expected, rel=1e-9)


def test_a_likelihood_without_noise():
    likelihood = kl.Categorical()
    assert likelihood.noise_std is None
    assert likelihood.noise_exponent(kl.Sampling.EXACT) == 0
    assert [Own().noise_exponent(kl.Sampling(s)) for s in ("exact", "mc", "empirical")] == [-2, -2, -4]
    assert likelihood.has_normalizer
    assert not kl.Euclidean().has_normalizer
    with pytest.raises(ValueError, match="noise_std only applies to the Gaussian likelihood"):
        likelihood.with_noise_std(1.0)
    assert kl.Categorical().completed_by(kl.Categorical(class_axis=-1)) == kl.Categorical(class_axis=-1)
