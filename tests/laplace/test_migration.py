"""Names that come from laplace-torch are answered with ours, and all of ours that are named work."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.laplace import migration

X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
MODEL = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


@pytest.fixture
def posterior():
    return kl.KronLaplace(MODEL, "classification").fit([(X, Y)])


CALLS = {
    "subset_of_weights": (
        lambda p: kl.KronLaplace(MODEL, "classification", subset_of_weights="all"),
        r"here it is layers=",
    ),
    "hessian_structure": (
        lambda p: kl.KronLaplace(MODEL, "classification", hessian_structure="kron"),
        r'here it is estimator=, "kfac" for "kron"',
    ),
    "override": (lambda p: p.fit([(X, Y)], override=False), "here it is add=True for override=False"),
    "pred_type": (lambda p: p.predict(X, pred_type="glm"), r'here it is method=, "glm"'),
    "link_approx": (lambda p: p.predict(X, link_approx="probit"), r'here it is link=, "probit"'),
    "sigma_noise": (lambda p: p.log_marginal_likelihood(1.0, sigma_noise=1.0), "here it is noise_std="),
    "val_loader": (lambda p: p.tune("validation", val_loader=[(X, Y)]), "here it is data="),
    "prior_structure": (lambda p: p.tune(prior_structure="layerwise"), "here it is structure="),
    "dtype": (lambda p: kl.KronLaplace.load("file", MODEL, dtype=torch.float64), r"afterwards posterior\.to\(dtype\)"),
    "device": (lambda p: kl.KronLaplace.load("file", MODEL, device="cpu"), r"model\.to\(device\)"),
}


@pytest.mark.parametrize("name", CALLS)
def test_keywords(name, posterior):
    call, message = CALLS[name]
    with pytest.raises(TypeError, match=rf"KronLaplace\.\w+ has no {name}=; .*{message}"):
        call(posterior)


def test_calling_the_posterior(posterior):
    with pytest.raises(TypeError, match=r"a KronLaplace is not callable; use posterior\.predict\(x\)"):
        posterior(X)


@pytest.mark.parametrize("name", migration.ATTRIBUTES)
def test_attributes(name, posterior):
    """What is named in their place is there."""
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'; here it is ") as error:
        getattr(posterior, name)
    ours = re.search(r"here it is (?:KronLaplace\.)?([\w.]+)", str(error.value))[1].strip(".")
    if ours != "likelihood.noise_std":  # of a Gaussian
        for attribute in ours.split("."):
            posterior = getattr(posterior, attribute)


@pytest.mark.parametrize("method", migration.KEYWORDS)
def test_signatures_have_ours_and_not_theirs(method):
    parameters = inspect.signature(getattr(kl.KronLaplace, method)).parameters
    assert not migration.KEYWORDS[method].keys() & parameters.keys()
    for ours in migration.KEYWORDS[method].values():
        named = re.match(r"(\w+)=", ours)
        assert named is None or named[1] in parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_values(posterior):
    with pytest.raises(
        ValueError, match=r"unknown method 'marglik'; allowed are .*\. What is 'marglik' elsewhere is 'evidence' h"
    ):
        posterior.tune("marglik")
    with pytest.raises(ValueError, match=r"What is 'gridsearch' elsewhere is 'validation' here"):
        posterior.tune("gridsearch")
    with pytest.raises(ValueError, match="What is 'nn' elsewhere is 'sample' here"):
        posterior.predict(X, method="nn")


def test_everything_else_is_as_ever(posterior):
    """Unknown names, copies, pickles."""
    with pytest.raises(AttributeError, match=r"'KronLaplace' object has no attribute 'colour'$"):
        posterior.colour  # noqa: B018
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        posterior.predict(X, colour=1)
    assert not hasattr(posterior, "optimize_prior_precision")
    for copied in (copy.copy(posterior), copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert torch.equal(copied.predict(X), posterior.predict(X))
