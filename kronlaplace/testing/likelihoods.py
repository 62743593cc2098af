"""Laws of a likelihood."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from kronlaplace.likelihoods import Likelihood, Prediction, Sampling
from kronlaplace.likelihoods.base import LIKELIHOODS
from kronlaplace.likelihoods.links import Link
from kronlaplace.testing.laws import generator, law, require, require_equal, standard_normal

__all__ = ["check_likelihood"]

_DRAWS = 20_000
"""Number of label draws per example in the statistical laws."""

_STEP = 1e-4
"""Size of the small change of outputs at which divergences are compared with the metric."""

_STANDARD_ERRORS = 6.0
"""Allowed error of a mean over draws, in standard errors; a normal mean exceeds it once in five hundred million."""


def check_likelihood(likelihood: Likelihood, outputs: Tensor | None = None, targets: Tensor | None = None) -> None:
    """Check that a likelihood obeys its laws on a batch of outputs and targets.

    The laws, for the negative log-likelihood of one example ``L(f, y)``, summed over its positions:

    - The likelihood is registered, and JSON restores it.
    - `statistics` are two float64 numbers that add up over examples, and `log_likelihood` adds up as well.
    - With empirical sampling the only direction is ``∂L/∂f`` by autograd.
    - With exact sampling there are `n_directions` directions, and ``Σ d dᵀ`` is the Hessian ``∂²L/∂f²`` by autograd, unless
      the Hessian depends on the targets (then the Fisher is a different matrix, and only the next law applies);
      `metric_product` multiplies by it.
    - `divergence` is zero at equal outputs, never negative, adds up over examples, and its second-order expansion is half
      the metric. `check_gradient` accepts ``∂L/∂f`` with and without targets.
    - With Monte Carlo sampling ``Σ d dᵀ`` is on average that of exact sampling and the mean of ``d`` is zero, within
      six standard errors, and equal generators give equal draws.
    - Directions have the outputs' shape and dtype.
    - If it has a ``noise_std``, `with_noise_std` changes it, the statistics do not depend on it,
      ``log_likelihood(statistics, noise_std)`` is that with a different noise, and the metric scales as its power
      `noise_exponent`.
    - Predictions are probabilities (which sum to one if there is a class axis) or have positive variances. Without
      covariance their mean is `sample_mean`, and for probabilities `predictive_nll` is then the negative log-likelihood.
      A diagonal covariance gives the same result as a full one. `predictive_nll` adds up over examples.

    The laws of predictions are skipped if `predictive` raises NotImplementedError.

    Args:
        likelihood: The likelihood, an instance.
        outputs: Network outputs, shape ``(N, ...)``; None uses six examples with three or four normal outputs.
        targets: Targets that fit the outputs; None tries real numbers, class indices, zeros and ones, and counts.

    Raises:
        AssertionError: If a law does not hold; the message names it.
        TypeError: If it is not a likelihood.
        ValueError: If no targets are given and none of those tried are accepted.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"check_likelihood takes a kl.Likelihood, got {likelihood!r}.")
    f, y = _batch(likelihood, outputs, targets)
    likelihood = likelihood.informed_by(f, y)
    require(isinstance(likelihood, Likelihood), "informed_by returns a likelihood", likelihood)
    _check_json(likelihood)
    _check_statistics(likelihood, f, y)
    exact = _check_exact(likelihood, f, y)
    _check_draws(likelihood, f, y, exact)
    vectors = standard_normal(*f.shape, seed=11)
    require_equal(
        likelihood.metric_product(f, vectors, y).reshape(len(f), -1),
        (exact @ vectors.reshape(len(f), -1, 1)).squeeze(-1),
        "metric_product is the sum of d dᵀ over exact directions times a vector",
    )
    _check_divergence(likelihood, f, y)
    _check_noise(likelihood, f, y, exact)
    _check_predictions(likelihood, f, y)


def _batch(likelihood: Likelihood, outputs: Tensor | None, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return outputs in float64 and targets that fit, either the given ones or ones that were found."""
    batches = [outputs.detach().double()] if outputs is not None else [standard_normal(6, c, seed=0) for c in (3, 4)]
    for f in batches:
        for y in [targets] if targets is not None else list(_candidates(f)):
            try:
                likelihood.check_outputs(f)
                allowed, _ = likelihood.check_targets(f, y)
                accepted = bool(allowed)
            except (ValueError, TypeError) as error:
                if targets is not None:
                    raise AssertionError(f"check_targets accepts the given targets; it raised: {error}") from error
                continue
            if accepted:
                return f, y
    if targets is not None:
        raise AssertionError("check_targets accepts the given targets; it returned False.")
    raise ValueError(f"{likelihood!r} accepts none of the targets that were tried; pass outputs and targets that fit.")


def _candidates(f: Tensor) -> Iterator[Tensor]:
    half = (*f.shape[:-1], f.shape[-1] // 2)
    yield standard_normal(*f.shape, seed=1)
    yield standard_normal(*half, seed=1)
    for shape in (f.shape[:-1], (f.shape[0], *f.shape[2:])):
        yield torch.randint(0, 2, shape, generator=generator(1))
    for high in (2, 5):
        for shape in (f.shape, half, (len(f),)):
            yield torch.randint(0, high, shape, generator=generator(1)).double()


def _check_json(likelihood: Likelihood) -> None:
    require(
        LIKELIHOODS.knows(likelihood),
        f"{type(likelihood).__name__} is registered, so that files can name it: @kl.register_likelihood above the class",
    )
    with law("to_json and from_json work"):
        restored = Likelihood.from_json(json.loads(json.dumps(likelihood.to_json())))
    require(restored == likelihood, f"JSON restores {likelihood!r}", restored)


def _check_statistics(likelihood: Likelihood, f: Tensor, y: Tensor) -> None:
    statistics = likelihood.statistics(f, y)
    require(
        statistics.shape == (2,) and statistics.dtype == torch.float64,
        "statistics are two float64 numbers",
        f"{statistics.dtype} of shape {tuple(statistics.shape)}",
    )
    parts = [likelihood.statistics(f[rows], y[rows]) for rows in (slice(0, 2), slice(2, None))]
    require_equal(parts[0] + parts[1], statistics, "statistics add up over examples")
    total = likelihood.log_likelihood(statistics)
    require(total.ndim == 0, "log_likelihood is one number", f"shape {tuple(total.shape)}")
    by_part = sum(likelihood.log_likelihood(part) for part in parts)
    require_equal(torch.as_tensor(by_part), total, "log_likelihood adds up over examples")


def _nll(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    return -likelihood.log_likelihood(likelihood.statistics(f, y))


def _gradient(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    f = f.detach().requires_grad_()
    nll = _nll(likelihood, f, y)
    require(nll.requires_grad, "the log-likelihood can be differentiated with respect to the outputs")
    (gradient,) = torch.autograd.grad(nll, f)
    return gradient


def _directions(likelihood: Likelihood, f: Tensor, y: Tensor, sampling: Sampling, **options: object) -> Tensor:
    """Return all directions, shape ``(V, N, C)``, with the outputs of an example flattened."""
    with law(f"directions are yielded with sampling={sampling.value!r}"):
        found = list(likelihood.directions(f, sampling, targets=y, **options))  # type: ignore[arg-type]
    for d in found:
        require(
            d.shape == f.shape and d.dtype == f.dtype,
            f"directions have the outputs' shape {tuple(f.shape)} and dtype {f.dtype} (sampling={sampling.value!r})",
            f"{d.dtype} of shape {tuple(d.shape)}",
        )
    expected = likelihood.n_directions(f, sampling, int(str(options.get("mc_samples", 1))), y)
    require(
        len(found) == expected,
        f"n_directions is the number of directions (sampling={sampling.value!r})",
        f"it is {expected}, but there are {len(found)}",
    )
    return torch.stack(found).reshape(len(found), len(f), -1)


def _check_exact(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """Check empirical and exact directions, and return ``Σ d dᵀ`` of each example, shape ``(N, C, C)``."""
    (empirical,) = _directions(likelihood, f, y, Sampling.EMPIRICAL)
    gradient = _gradient(likelihood, f, y)
    require_equal(
        empirical, gradient.view_as(empirical), "the empirical direction is the gradient of the negative log-likelihood"
    )
    d = _directions(likelihood, f, y, Sampling.EXACT)
    exact = torch.einsum("vni,vnj->nij", d, d)
    _directions(likelihood, f.float(), y, Sampling.EXACT)
    hessian, other = (_hessian(likelihood, f, targets) for targets in (y, y.roll(1, 0)))
    if torch.allclose(hessian, other, rtol=1e-8, atol=1e-10):
        require_equal(
            exact, hessian, "the sum of d dᵀ over exact directions is the Hessian of the negative log-likelihood"
        )
    return exact


def _check_divergence(likelihood: Likelihood, f: Tensor, y: Tensor) -> None:
    change = standard_normal(*f.shape, seed=12)
    divergence = likelihood.divergence(f, f + change, y)
    require(divergence.ndim == 0, "divergence is one number", f"shape {tuple(divergence.shape)}")
    require(bool(divergence >= 0), "divergence is not negative", divergence)
    zero = likelihood.divergence(f, f, y)
    require_equal(zero, torch.zeros_like(zero), "divergence is zero at equal outputs")
    parts = [likelihood.divergence(f[rows], (f + change)[rows], y[rows]) for rows in (slice(0, 2), slice(2, None))]
    require_equal(parts[0] + parts[1], divergence, "divergence adds up over examples")
    expected = (change * likelihood.metric_product(f, change, y)).sum()
    # Without the odd terms, what is left beside the second order is of the fourth.
    second = sum(likelihood.divergence(f, f + sign * _STEP * change, y) for sign in (-1, 1)) / _STEP**2
    require_equal(
        torch.as_tensor(second), expected, "divergence is half the metric's square of a small change", 100 * _STEP**2
    )
    gradient = _gradient(likelihood, f, y)
    for targets in (None, y):
        allowed, _ = likelihood.check_gradient(f, gradient, targets)
        given = "without" if targets is None else "with"
        require(bool(allowed), f"check_gradient accepts the gradient of the negative log-likelihood {given} targets")


def _hessian(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """Compute the Hessian of each example, shape ``(N, C, C)``."""
    rows = []
    for n in range(len(f)):

        def one(flat: Tensor, n: int = n) -> Tensor:
            return _nll(likelihood, flat.view_as(f[n : n + 1]), y[n : n + 1])

        with law("the log-likelihood can be differentiated twice with respect to the outputs"):
            rows.append(torch.autograd.functional.hessian(one, f[n].flatten()))
    return torch.stack(rows)


def _check_draws(likelihood: Likelihood, f: Tensor, y: Tensor, exact: Tensor) -> None:
    n, c = exact.shape[:2]
    draws = max(100, min(_DRAWS, 2**22 // (n * c * c)))
    many, labels = (t.repeat_interleave(draws, 0) for t in (f, y))
    d = _directions(likelihood, many, labels, Sampling.MC, mc_samples=2, generator=generator(7))
    again = _directions(likelihood, many, labels, Sampling.MC, mc_samples=2, generator=generator(7))
    require(torch.equal(d, again), "equal generators give equal draws")
    _require_mean(d[0].view(n, draws, c), torch.zeros_like(exact[:, 0]), "drawn directions are zero on average")
    products = torch.einsum("vni,vnj->nij", d, d).view(n, draws, c, c)
    _require_mean(products, exact, "the sum of d dᵀ over drawn directions is that over exact ones on average")


def _require_mean(samples: Tensor, expected: Tensor, statement: str) -> None:
    """State that the mean over the second axis is ``expected``, up to statistical error."""
    mean, deviation = samples.mean(1), samples.std(1)
    bound = _STANDARD_ERRORS * deviation / samples.shape[1] ** 0.5 + 1e-8
    excess = (mean - expected).abs() - bound
    if (excess <= 0).all():
        return
    place = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{statement}; the mean of {samples.shape[1]} draws at {place} is {mean[place].item():.6g} instead of "
        f"{expected[place].item():.6g}, and may deviate by {bound[place].item():.2g}."
    )


def _check_noise(likelihood: Likelihood, f: Tensor, y: Tensor, exact: Tensor) -> None:
    if likelihood.noise_std is None:
        return
    factor = 1.5
    with law("with_noise_std returns a likelihood with a different noise"):
        noisier = likelihood.with_noise_std(factor * likelihood.noise_std)
    require_equal(
        torch.tensor(noisier.noise_std or 0.0),
        torch.tensor(factor * likelihood.noise_std),
        "with_noise_std returns a likelihood with that noise",
    )
    statistics = likelihood.statistics(f, y)
    require_equal(noisier.statistics(f, y), statistics, "statistics do not depend on the noise, which may still change")
    log_std = torch.tensor(likelihood.noise_std, dtype=torch.float64).log().requires_grad_()
    at_other = likelihood.log_likelihood_at(statistics, factor * log_std.exp())
    expected = noisier.log_likelihood(statistics)
    require_equal(at_other, expected, "log_likelihood(statistics, noise_std) is that of a likelihood with that noise")
    require(at_other.requires_grad, "log_likelihood(statistics, noise_std) can be differentiated in noise_std")
    d = torch.stack(list(noisier.directions(f, Sampling.EXACT, targets=y))).reshape(-1, *exact.shape[:2])
    require_equal(
        torch.einsum("vni,vnj->nij", d, d),
        exact * factor ** likelihood.noise_exponent(Sampling.EXACT),
        "the metric scales as the power noise_exponent of the noise",
    )


def _check_predictions(likelihood: Likelihood, f: Tensor, y: Tensor) -> None:
    axis = likelihood.class_axis_of(f)
    require(
        axis is None or 0 < axis < f.ndim, "class_axis_of is an axis of the outputs after that of the examples", axis
    )
    mean = f if axis is None else f.movedim(axis, -1)
    several = f.ndim > 1  # outputs of shape (N,) have variances only
    root = standard_normal(*mean.shape, mean.shape[-1], seed=5) / mean.shape[-1]
    variances = root.square().sum(-1)
    covariance = root @ root.mT if several else variances
    means = likelihood.sample_mean(f)
    expected_mean = means if axis is None else means.movedim(axis, -1)
    for link in likelihood.links or (Link.PROBIT,):
        try:
            prediction = likelihood.predictive(mean, covariance, link, 200, generator(8))
        except NotImplementedError:
            return
        where = f"with link={link.value!r}" if likelihood.links else "in closed form"
        if likelihood.predictions_match_outputs:
            shape = (prediction if isinstance(prediction, Tensor) else prediction.mean).shape
            require(shape == mean.shape, f"predictions have the shape of the outputs ({where})", tuple(shape))
        _check_prediction(prediction, axis is not None, where)
        if link is Link.BRIDGE:  # it has no limit without covariance
            continue
        certain = likelihood.predictive(mean, torch.zeros_like(covariance), link, 2, generator(8))
        center = certain if isinstance(certain, Tensor) else certain.mean
        require_equal(center, expected_mean, f"a prediction without covariance is sample_mean ({where})")
        # With a link for differences between outputs, variances are those of the differences.
        if several and link not in (Link.MC, Link.CENTERED_PROBIT, Link.MARGIN):
            full, only_diagonal = (
                likelihood.predictive(mean, s, link, 2, generator(8)) for s in (torch.diag_embed(variances), variances)
            )
            for a, b in zip(_numbers(full), _numbers(only_diagonal), strict=True):
                require_equal(b, a, f"variances alone give the same result as a diagonal covariance ({where})")
        if isinstance(certain, Tensor):
            given = certain if axis is None else certain.movedim(-1, axis)
            require_equal(
                likelihood.predictive_nll(given, y)[0],
                _nll(likelihood, f, y),
                f"without covariance predictive_nll is the negative log-likelihood ({where})",
            )
        _check_predictive_nll(likelihood, prediction, axis, y)


def _numbers(prediction: Tensor | Prediction) -> tuple[Tensor, ...]:
    if isinstance(prediction, Tensor):
        return (prediction,)
    return prediction.mean, prediction.variance, prediction.noise_variance


def _check_prediction(prediction: Tensor | Prediction, classes: bool, where: str) -> None:
    if isinstance(prediction, Tensor):
        inside = torch.isfinite(prediction).all() & (prediction >= 0).all() & (prediction <= 1 + 1e-12).all()
        require(bool(inside), f"probabilities lie between 0 and 1 ({where})", prediction)
        if classes:
            sums = prediction.sum(-1)
            require_equal(sums, torch.ones_like(sums), f"probabilities of the classes sum to one ({where})")
        return
    require(
        bool((prediction.variance >= 0).all()) and bool((prediction.total_variance > 0).all()),
        f"variances are not negative, and positive with the noise ({where})",
        f"the smallest are {prediction.variance.min().item():.6g} and {prediction.total_variance.min().item():.6g}",
    )


def _check_predictive_nll(likelihood: Likelihood, prediction: Tensor | Prediction, axis: int | None, y: Tensor) -> None:
    def of(rows: slice) -> Tensor:
        if isinstance(prediction, Tensor):
            given = prediction if axis is None else prediction.movedim(-1, axis)
            return likelihood.predictive_nll(given[rows], y[rows])
        noise = prediction.noise_variance
        part = Prediction(prediction.mean[rows], prediction.variance[rows], noise if noise.ndim == 0 else noise[rows])
        return likelihood.predictive_nll(part, y[rows])

    whole = of(slice(None))
    require(
        whole.shape == (2,) and whole.dtype == torch.float64,
        "predictive_nll is two float64 numbers, a sum and a count",
        f"{whole.dtype} of shape {tuple(whole.shape)}",
    )
    require_equal(of(slice(0, 2)) + of(slice(2, None)), whole, "predictive_nll adds up over examples")
