"""Training a network with its prior and noise, by the marginal likelihood (Immer et al. 2021, Algorithm 1).

The weights go down the gradient of the negative log-posterior; every few epochs the Laplace evidence at the present weights
sets the prior precision(s) and the noise. The weights with the largest evidence are kept: no validation data are needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from kronlaplace._arguments import choice, positive_integer
from kronlaplace._wrappers import unwrapped
from kronlaplace.data.deferred_checks import DeferredChecks
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.loader import Rewind, iterate, warn_of_share
from kronlaplace.estimators import Estimator
from kronlaplace.fisher.curvature_pass import check_batch
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.laplace.calibration import has_logit_scale
from kronlaplace.laplace.evidence import check_has_evidence
from kronlaplace.laplace.posterior import KronLaplace
from kronlaplace.laplace.posterior_tuning import TuningMethod
from kronlaplace.laplace.tuning import NEGLIGIBLE, NoiseTuning, ScaleTuning, known_noise
from kronlaplace.layers import Layer, Unsupported, find_layers
from kronlaplace.likelihoods import Likelihood, Sampling, resolve_likelihood
from kronlaplace.network.alignment import Alignment
from kronlaplace.network.forward_errors import explained_errors
from kronlaplace.priors.precision import Precision
from kronlaplace.priors.prior import Prior, PriorStructure

__all__ = ["EvidenceRecord", "EvidenceTraining", "train_by_evidence"]


@dataclass(frozen=True)
class EvidenceRecord:
    """The evidence and the hyperparameters at one epoch of training.

    Attributes:
        epoch: Number of epochs before it.
        log_marginal_likelihood: The evidence in nats, at the hyperparameters that maximize it.
        log_likelihood: Its first term, of the training data at the weights.
        prior: The prior that training goes on with.
        likelihood: The likelihood, with its noise.
    """

    epoch: int
    log_marginal_likelihood: float
    log_likelihood: float
    prior: Prior
    likelihood: Likelihood

    @property
    def prior_precision(self) -> Tensor:
        """Precision(s) of the prior, as in `KronLaplace.prior_precision`."""
        return self.prior.precisions


@dataclass(frozen=True)
class EvidenceTraining:
    """The result of `train_by_evidence`.

    Attributes:
        posterior: The posterior at the best weights, tuned.
        history: All looks at the evidence.
        best: The one with the largest.
    """

    posterior: KronLaplace
    history: tuple[EvidenceRecord, ...] = field(repr=False)
    best: EvidenceRecord


def train_by_evidence(
    model: nn.Module,
    data: Iterable[Any],
    likelihood: Likelihood | str,
    estimator: Estimator | str = "kfac",
    *,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    epochs: int = 100,
    every: int = 5,
    burn_in: int = 0,
    patience: int | None = None,
    structure: PriorStructure | str = PriorStructure.LAYERWISE,
    noise: NoiseTuning | str | None = None,
    prior_precision: Prior | Precision = 1.0,
    temperature: float = 1.0,
    unsupported: Unsupported | str = Unsupported.DIAGONAL,
    sampling: Sampling | str = Sampling.EXACT,
    mc_samples: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> EvidenceTraining:
    """Train a network, and its prior precision(s) and noise with it, by the Laplace evidence.

    **The model is trained**: it ends with the weights of the largest evidence, in evaluation mode.

    Args:
        model: The network, at its initialisation or trained already.
        data: Batches ``(inputs, targets)`` of the training data, readable again and again, such as a DataLoader.
        likelihood: As in `KronLaplace`; a Gaussian's noise is where training begins, and stays unless it is tuned.
        estimator: As in `KronLaplace`; one that makes a single pass is the natural choice.
        optimizer: For the weights, without weight decay, which the prior replaces. None is ``Adam(lr=1e-3)``.
        scheduler: Of the optimizer; it makes one step after every epoch.
        epochs: At most so many passes over the data.
        every: Epochs between two looks at the evidence.
        burn_in: Epochs before the first.
        patience: Looks in a row without a larger evidence (by 1e-3 nats) after which training stops; None never stops early.
        structure: What has a prior precision of its own: ``"scalar"``, ``"layerwise"`` or ``"diagonal"``.
        noise: As in `KronLaplace.tune`: ``"tuned"``, ``"fixed"``, or None: a Gaussian likelihood's is tuned unless stated.
        prior_precision: Until the first look.
        temperature: As in `KronLaplace`; it also divides the log-likelihood in training.
        unsupported: As in `KronLaplace`. Parameters without a block are trained without a prior.
        sampling: As in `KronLaplace.fit`.
        mc_samples: As in `KronLaplace.fit`.
        seed: As in `KronLaplace.fit`.
        progress: Whether to show a progress bar.

    Returns:
        The posterior, and the history of the evidence.

    Raises:
        ValueError, TypeError, NotImplementedError: As `KronLaplace` and `KronLaplace.fit`; for an optimizer with weight
            decay; for data without targets or that can be read only once.
        FloatingPointError: If the training loss is NaN or infinite.
    """
    epochs, every = positive_integer(epochs, "epochs"), positive_integer(every, "every")
    burn_in = burn_in if burn_in == 0 else positive_integer(burn_in, "burn_in")
    patience = None if patience is None else positive_integer(patience, "patience")
    structure = choice(PriorStructure, structure, "structure")
    likelihood = resolve_likelihood(likelihood)
    check_has_evidence(likelihood)
    known_noise(noise, likelihood)  # for its check
    if isinstance(data, Iterator):
        raise TypeError("data must be readable again and again, such as a DataLoader or a list; got an iterator.")
    if burn_in >= epochs:
        raise ValueError(
            f"burn_in must be less than epochs, or the evidence is never looked at; got {burn_in}, {epochs}."
        )
    if optimizer is None:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch optimizer of this model's parameters, such as torch.optim.Adam(model.parameters()); "
            f"got {optimizer!r}."
        )
    if any(group.get("weight_decay") for group in optimizer.param_groups):
        raise ValueError("the optimizer has weight decay, and the prior would count twice; set weight_decay=0.")
    model = unwrapped(model)
    model.eval()
    posterior = KronLaplace(
        model,
        likelihood,
        estimator,
        prior_precision=prior_precision,
        temperature=temperature,
        unsupported=unsupported,
    )
    layers = find_layers(model, unsupported=Unsupported(unsupported))
    _check_parameters(optimizer, layers)
    alignment = Alignment(model, likelihood)
    warn_of_share(data)
    n_examples = _look_through(model, data, likelihood, alignment)
    history: list[EvidenceRecord] = []
    best: tuple[EvidenceRecord, dict[str, Tensor], KroneckerFisher] | None = None
    since_gain = 0
    with tqdm(total=epochs, desc="Training", leave=False, disable=None if progress else True) as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            with torch.inference_mode(False), torch.enable_grad():  # wherever the caller is
                _epoch(model, data, alignment, posterior, optimizer, layers, n_examples, epoch)
            if scheduler is not None:
                scheduler.step()
            model.eval()
            bar.update()
            if epoch <= burn_in or ((epoch - burn_in) % every and epoch < epochs):
                continue
            posterior.fit(data, sampling=sampling, mc_samples=mc_samples, seed=seed).tune(
                TuningMethod.EVIDENCE, structure, noise=noise, logit_scale=ScaleTuning.FIXED
            )
            record = _record(epoch, posterior)
            history.append(record)
            bar.set_postfix(evidence=f"{record.log_marginal_likelihood:.4g}")
            gain = record.log_marginal_likelihood - (best[0].log_marginal_likelihood if best else -math.inf)
            if best is None or gain > 0:
                best = record, copy.deepcopy(model.state_dict()), posterior.fisher
            layers = [layer for layer in layers if layer.name in posterior.layers]
            since_gain = 0 if gain > NEGLIGIBLE else since_gain + 1
            if patience is not None and since_gain >= patience:
                break
    assert best is not None
    record, weights, fisher = best
    model.load_state_dict(weights)
    posterior.likelihood = record.likelihood
    posterior.prior = record.prior
    posterior.fit(fisher=fisher)
    if has_logit_scale(posterior.likelihood):
        posterior.logit_scale = posterior._calibrated_scale(posterior._state, posterior.hyperparameters, data)
    return EvidenceTraining(posterior, tuple(history), record)


def _check_parameters(optimizer: Optimizer, layers: list[Layer]) -> None:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for layer in layers for name, p in layer.parameters.items() if id(p) not in known]
    if missing:
        raise ValueError(
            f"the optimizer does not have these parameters of the model: {missing}. Make it of model.parameters() (of this "
            "model, not of a copy), or freeze them."
        )


def _epoch(
    model: nn.Module,
    data: Iterable[Any],
    alignment: Alignment,
    posterior: KronLaplace,
    optimizer: Optimizer,
    layers: list[Layer],
    n_examples: int,
    epoch: int,
) -> None:
    """Make one pass of gradient steps on the negative log-posterior per example."""
    total: Tensor | None = None
    for batch in iterate(data, device_of(model), alignment=alignment, progress=False, description=""):
        assert batch.targets is not None
        optimizer.zero_grad()
        outputs = batch.inputs.map(_ordinary).run(model)
        log_likelihood = posterior.likelihood.log_likelihood(
            posterior.likelihood.statistics(outputs, _ordinary(batch.targets))
        )
        penalty = posterior.prior.penalty({layer.name: layer.matrix(detach=False) for layer in layers})
        loss = -log_likelihood / (len(outputs) * posterior.temperature) + 0.5 * penalty / n_examples
        loss.backward()
        optimizer.step()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    if not math.isfinite(float(total)):
        raise FloatingPointError(
            f"the training loss is {float(total)} in epoch {epoch}: the training diverged. Take a smaller learning rate, or "
            "a burn_in, so that the evidence is not evaluated before the network has learned anything."
        )


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd can keep."""
    return tensor.clone() if tensor.is_inference() else tensor


def _look_through(model: nn.Module, data: Iterable[Any], likelihood: Likelihood, alignment: Alignment) -> int:
    """Check outputs and targets of all batches before any training, and count the examples."""
    count = 0
    device = device_of(model)
    checks = DeferredChecks()
    with preserved_random_state(device), Rewind(data), torch.no_grad():
        for batch in iterate(data, device, alignment=alignment, progress=False, description=""):
            if batch.targets is None:
                raise TypeError("training needs batches of (inputs, targets); some come without targets.")
            with explained_errors(model, batch.inputs.value, batch.index):
                outputs = batch.inputs.run(model)
            check_batch(likelihood, outputs, batch, checks, Sampling.EXACT)
            count += len(outputs)
    checks.settle()
    return count


def _record(epoch: int, posterior: KronLaplace) -> EvidenceRecord:
    fisher = posterior.fisher
    statistics = fisher.statistics
    assert statistics is not None
    return EvidenceRecord(
        epoch,
        float(posterior.log_marginal_likelihood()),
        float(posterior.likelihood.log_likelihood(statistics)),
        posterior.prior,
        posterior.likelihood,
    )
