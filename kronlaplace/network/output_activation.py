"""Refusal of outputs that are already probabilities, for likelihoods that compute probabilities from logits.

``softmax(softmax(f))`` is also a probability vector, so nothing else would reveal the mistake: predictions, curvature and
evidence would be computed, but wrong.
"""

from __future__ import annotations

from torch import Tensor, nn

from kronlaplace.data.inputs import Inputs
from kronlaplace.likelihoods import Likelihood
from kronlaplace.network.last_layer import LOG_SOFTMAX, maker_of, module_of_outputs, operation

__all__ = ["check_outputs_are_logits", "unwanted_activation"]

_ACTIVATIONS: dict[str, tuple[str, tuple[type[nn.Module], ...]]] = {
    "SoftmaxBackward": ("softmax", (nn.Softmax, nn.Softmax2d)),
    "SigmoidBackward": ("sigmoid", (nn.Sigmoid,)),
    "LogSigmoidBackward": ("log-sigmoid", (nn.LogSigmoid,)),
    LOG_SOFTMAX: ("log-softmax", (nn.LogSoftmax,)),
}
"""The name of each activation and the modules that compute it, by autograd node."""


def unwanted_activation(outputs: Tensor, likelihood: Likelihood) -> str | None:
    """Return the name of the softmax or sigmoid that the outputs come from, if the likelihood takes logits, or None."""
    kind = _unwanted(outputs, likelihood)
    return None if kind is None else _ACTIVATIONS[kind][0]


def _unwanted(outputs: Tensor, likelihood: Likelihood) -> str | None:
    """Return the autograd node of such an activation by its name in `_ACTIVATIONS`, or None."""
    maker = maker_of(outputs) if likelihood.accepts_logits else None
    kind = None if maker is None else operation(maker)
    if kind not in _ACTIVATIONS or (kind == LOG_SOFTMAX and likelihood.accepts_log_softmax):
        return None
    return kind


def check_outputs_are_logits(model: nn.Module, inputs: Inputs, outputs: Tensor, likelihood: Likelihood) -> None:
    """Refuse outputs of a softmax or sigmoid if the likelihood takes logits.

    A log-softmax is accepted with `Categorical`: ``softmax(log_softmax(f)) = softmax(f)``, and the curvature is the same,
    since ``(diag(π) − ππᵀ) (I − 1πᵀ) = diag(π) − ππᵀ``. The outputs, whose variances enter predictions, are then
    log-probabilities.

    Args:
        model: The network.
        inputs: The inputs with which the network was called, used only for the error.
        outputs: The outputs of the network, with their graph.
        likelihood: The likelihood.

    Raises:
        ValueError: If the outputs come from such an activation, naming the module and what to do.
    """
    kind = _unwanted(outputs, likelihood)
    if kind is None:
        return
    name, types = _ACTIVATIONS[kind]
    modules = {n: module for n, module in model.named_modules() if isinstance(module, types)}
    found = module_of_outputs(model, inputs, modules).module if modules else None
    if found is None:
        where, cure = f"a {name} in its forward", f"Return the input of the {name} from the forward instead"
    else:
        where = f"module {found!r} ({type(modules[found]).__name__})"
        cure = f"Remove {found!r} from the model (replace it with torch.nn.Identity())"
    raise ValueError(
        f"the network ends with {where}, and {likelihood} takes logits: it computes the probabilities itself, so that they "
        f"would be computed twice. {cure}; predictions are still probabilities."
    )
