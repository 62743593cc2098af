"""Names that laplace-torch uses for features of `KronLaplace`: errors that point to the names here.

These names have no function of their own, and they are not part of any signature.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

__all__ = ["VALUES", "LaplaceTorchNames", "told_of"]

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

KEYWORDS: Mapping[str, Mapping[str, str]] = {
    "__init__": {
        "subset_of_weights": 'layers=, "last" for the last layer, None for all',
        "last_layer_name": 'layers=["its name"]',
        "hessian_structure": 'estimator=, "kfac" for "kron", "diagonal" for "diag", "exact" for "full" (by layer)',
        "backend": "estimator=, such as kl.KFAC()",
        "backend_kwargs": "estimator=, such as kl.KFAC(...), and the options of fit",
        "sigma_noise": "the likelihood, kl.Gaussian(noise_std=...)",
        "enable_backprop": "predict(x, differentiable=True)",
        "dict_key_x": "a batch (inputs, targets), or a mapping with the targets under 'labels'",
        "dict_key_y": "a batch (inputs, targets), or a mapping with the targets under 'labels'",
    },
    "fit": {
        "override": "add=True for override=False",
        "progress_bar": "progress=",
        "train_loader": "data, the first argument",
    },
    "predict": {
        "pred_type": 'method=, "glm" or, for "nn", "sample"',
        "link_approx": 'link=, "probit" (the default there; here it is "margin" for several classes), "mc" or "bridge"',
        "diagonal_output": "diagonal=",
    },
    "draw": {
        "pred_type": 'method=, "glm" or, for "nn", "sample"',
        "n_samples": "n, the second argument",
    },
    "uncertainty": {
        "pred_type": 'method=, "glm" or, for "nn", "sample"',
        "diagonal_output": "diagonal=",
    },
    "functional_variance": {"diagonal_output": "diagonal="},
    "sample": {"n_samples": "n, the first argument"},
    "log_marginal_likelihood": {"sigma_noise": "noise_std="},
    "tune": {
        "pred_type": "predictive=kl.Predictive(method=...)",
        "link_approx": "predictive=kl.Predictive(link=...)",
        "n_samples": "predictive=kl.Predictive(n_samples=...)",
        "prior_structure": "structure=",
        "val_loader": "data=",
        "grid_size": "grid=, the values themselves",
        "log_prior_prec_min": "grid=, the values themselves",
        "log_prior_prec_max": "grid=, the values themselves",
        "progress_bar": "progress=",
        "verbose": "progress=",
        "n_steps": "not needed: the optimum is found from anywhere",
        "lr": "not needed: the optimum is found from anywhere",
        "init_prior_prec": "not needed: the optimum is found from anywhere",
    },
    "load": {
        "device": "the model's: move the model first, model.to(device)",
        "map_location": "the model's: move the model first, model.to(device)",
        "dtype": "the model's, which must be that of the fit; afterwards posterior.to(dtype)",
    },
}
"""By method the keywords of laplace-torch (of `load` those of torch) and what they are here."""

ATTRIBUTES: Mapping[str, str] = {
    "optimize_prior_precision": "tune()",
    "sigma_noise": "likelihood.noise_std",
    "prior_structure": "prior_precision.shape",
    "posterior_precision": "covariance(), whose DampedInverse objects solve, sample and have log determinants",
    "posterior_covariance": "covariance()",
    "functional_covariance": "functional_variance(x, joint=True)",
    "predictive_samples": "draw(x, n).predictions",
    "functional_samples": "draw(x, n).outputs",
    "log_likelihood": "likelihood.log_likelihood(fisher.statistics)",
    "n_data": "fisher.n_examples",
    "H": "fisher, a mean over the examples",
    "state_dict": "save(path)",
    "load_state_dict": "KronLaplace.load(path, model)",
}
"""Attributes and methods of laplace-torch and what they are here."""

VALUES: Mapping[str, str] = {
    "marglik": "evidence",
    "gridsearch": "validation",
    "nn": "sample",
}
"""Values of options of laplace-torch and what they are here."""


def told_of(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Make a method raise a `TypeError` that names the equivalent of a keyword of laplace-torch."""
    names = KEYWORDS[function.__name__]

    @functools.wraps(function)
    def method(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        for name in kwargs.keys() & names.keys():
            owner = args[0] if isinstance(args[0], type) else type(args[0])
            raise TypeError(f"{owner.__name__}.{function.__name__} has no {name}=; here it is {names[name]}.")
        return function(*args, **kwargs)

    return method


class LaplaceTorchNames:
    """Raises errors that name the equivalent of an attribute of laplace-torch's posteriors, or of a call."""

    if not TYPE_CHECKING:  # a type checker should go on to refuse them

        def __getattr__(self, name: str) -> Any:
            hint = f"; here it is {ATTRIBUTES[name]}." if name in ATTRIBUTES else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise TypeError(f"a {type(self).__name__} is not callable; use posterior.predict(x).")
