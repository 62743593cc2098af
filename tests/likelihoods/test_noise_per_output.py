"""One noise for each output of a regression: the same as whitened outputs and targets."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronlaplace as kl
from kronlaplace.testing import check_likelihood
from tests.support.assertions import assert_close

NOISES = (0.3, 1.5, 0.8)


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    return model, x, torch.randn(7, 3, generator=generator, dtype=torch.float64)


class Whitened(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) / torch.tensor(NOISES, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3)])
@pytest.mark.parametrize("likelihood", [kl.Gaussian(NOISES), kl.Gaussian(0.7, relative_noise=NOISES)])
def test_the_laws(likelihood, shape):
    f, y = torch.randn(shape).double(), torch.randn(shape).double()
    check_likelihood(likelihood, f, y)
    std = likelihood.noise_std * torch.tensor(likelihood.relative_noise, dtype=torch.float64)
    expected = -F.gaussian_nll_loss(f, y, std.square().expand(shape), full=True, reduction="sum")
    assert_close(likelihood.log_likelihood(likelihood.statistics(f, y)), expected, 1e-12)


def test_the_forms_of_a_noise():
    of_tensor = kl.Gaussian(torch.tensor(NOISES, dtype=torch.float64))
    assert of_tensor == kl.Gaussian(list(NOISES)) and of_tensor.noise_known
    assert of_tensor.noise_std == pytest.approx(math.prod(NOISES) ** (1 / 3))
    assert [r * of_tensor.noise_std for r in of_tensor.relative_noise] == pytest.approx(NOISES)
    assert not kl.Gaussian(relative_noise=NOISES).noise_known
    assert repr(kl.Gaussian(0.5)) == "Gaussian(noise_std=0.5, noise_known=True)"
    assert kl.Likelihood.from_json({"name": "Gaussian", "noise_std": 0.5}) == kl.Gaussian(0.5)


def test_a_posterior_is_that_of_whitened_outputs():
    """The evidence too, but for the change of units; the tuned noise is a multiple of those that were given."""
    model, x, y = problem()
    std = torch.tensor(NOISES, dtype=torch.float64)
    own = kl.KronLaplace(model, kl.Gaussian(relative_noise=NOISES)).fit([(x, y)])
    plain = kl.KronLaplace(Whitened(model), kl.Gaussian()).fit([(x, y / std)])
    for tuned in (False, True):
        if tuned:
            own.tune()
            plain.tune()
        assert_close(own.log_marginal_likelihood(), plain.log_marginal_likelihood() - 7 * std.log().sum(), 1e-9)
        assert_close(torch.tensor(own.likelihood.noise_std), torch.tensor(plain.likelihood.noise_std), 1e-6)
        a, b = own.predict(x), plain.predict(x)
        assert_close(a.mean, b.mean * std, 1e-10)
        assert_close(a.variance, b.variance * std.square(), 1e-6)
        assert a.noise_variance.shape == a.mean.shape
        assert_close(a.noise_variance, b.noise_variance * std.square().expand(7, 3), 1e-6)
    assert_close(own.functional_variance(x), plain.functional_variance(x) * torch.outer(std, std), 1e-6)
    joint = own.predict(x, joint=True)
    assert_close((joint.total_covariance - joint.covariance).diagonal(), a.noise_variance.flatten(), 1e-10)
    assert own.predict([(x[:3],), (x[3:],)]).noise_variance.shape == (7, 3)
    assert own.predict(x, method="sample", n_samples=3).noise_variance.shape == (7, 3)
    assert own.uncertainty(x).aleatoric.shape == (7, 3)
    assert own.draw(x, 2).observations().shape == (2, 7, 3)


def test_it_is_tuned_on_validation_data_and_saved(tmp_path):
    model, x, y = problem()
    posterior = kl.KronLaplace(model, kl.Gaussian(relative_noise=NOISES)).fit([(x, y)])
    posterior.tune("validation", data=[(x, y)], grid=[1.0])
    posterior.save(tmp_path / "posterior")
    loaded = kl.KronLaplace.load(tmp_path / "posterior", model)
    assert loaded.likelihood == posterior.likelihood
    torch.testing.assert_close(loaded.predict(x).total_variance, posterior.predict(x).total_variance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_std": [1.0, 0.0]}, r"noise_std must be a positive finite number, or one for each output; got \[1.0"),
        ({"relative_noise": []}, "relative_noise must be a positive finite number, or one for each output"),
        ({"noise_std": [1.0], "relative_noise": [1.0]}, "noise_std is one number if relative_noise is given"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        kl.Gaussian(**arguments)


def test_noises_of_other_outputs():
    model, x, y = problem()
    with pytest.raises(ValueError, match="there are 2 noises, one for each output on the last axis"):
        kl.KronLaplace(model, kl.Gaussian([1.0, 2.0])).fit([(x, y)])
