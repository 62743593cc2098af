"""Refuses outputs that are probabilities already where the likelihood makes probabilities of logits.

``softmax(softmax(f))`` is a probability vector, too, so nothing else would tell: predictions, curvature and evidence come
out, and are wrong.
"""

from __future__ import annotations

from torch import Tensor, nn

from kronlaplace.data.inputs import Inputs
from kronlaplace.likelihoods import Likelihood
from kronlaplace.network.last_layer import LOG_SOFTMAX, maker_of, module_of_outputs, operation

__all__ = ["check_outputs_are_logits"]

_ACTIVATIONS: dict[str, tuple[str, tuple[type[nn.Module], ...]]] = {
    "SoftmaxBackward": ("softmax", (nn.Softmax, nn.Softmax2d)),
    "SigmoidBackward": ("sigmoid", (nn.Sigmoid,)),
    "LogSigmoidBackward": ("log-sigmoid", (nn.LogSigmoid,)),
    LOG_SOFTMAX: ("log-softmax", (nn.LogSoftmax,)),
}
"""By autograd node what it is called, and the modules that do the same."""


def check_outputs_are_logits(model: nn.Module, inputs: Inputs, outputs: Tensor, likelihood: Likelihood) -> None:
    """Refuse outputs that come out of a softmax or sigmoid, with a likelihood that takes logits.

    A log-softmax is accepted with `Categorical`: ``softmax(log_softmax(f)) = softmax(f)``, and the curvature is the same,
    as ``(diag(π) − ππᵀ) (I − 1πᵀ) = diag(π) − ππᵀ``. The outputs, whose variances predictions start from, are then the
    log-probabilities.

    Args:
        model: The network.
        inputs: The inputs that it was called with; looked at for the error only.
        outputs: What it returned, with its graph.
        likelihood: The likelihood.

    Raises:
        ValueError: Naming the module, with what to do.
    """
    if not likelihood.accepts_logits:
        return
    maker = maker_of(outputs)
    kind = None if maker is None else operation(maker)
    if kind not in _ACTIVATIONS or (kind == LOG_SOFTMAX and likelihood.accepts_log_softmax):
        return
    name, types = _ACTIVATIONS[kind]
    modules = {n: module for n, module in model.named_modules() if isinstance(module, types)}
    found = module_of_outputs(model, inputs, modules).module if modules else None
    if found is None:
        where, cure = f"a {name} in its forward", f"Let the forward return what goes into the {name}"
    else:
        where = f"module {found!r} ({type(modules[found]).__name__})"
        cure = f"Remove {found!r} from the model (put a torch.nn.Identity() in its place)"
    raise ValueError(
        f"the network ends with {where}, and {likelihood} takes logits: it makes the probabilities itself, and would make "
        f"them twice. {cure}; predictions come out as probabilities."
    )
