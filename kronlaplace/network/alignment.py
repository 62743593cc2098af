"""Alignment of labels with outputs: language models predict the *next* token.

Causal language models in Hugging Face's transformers take the tokens themselves as labels and shift them inside their own
loss: the output at position ``t`` is compared with the label at ``t + 1``, and the last output with nothing. Code that works
on the outputs has to do the same. Neither names nor configurations reliably show which models shift (`GPT2LMHeadModel` does,
`XLNetLMHeadModel` and `BartForCausalLM` do not), so the model itself is tested once: a loss that shifts never looks at the
label of the first position.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronlaplace._precision import callers_autocast
from kronlaplace.likelihoods import Likelihood

__all__ = ["Alignment"]

_IGNORED_BY_THE_MODEL = -100  # what transformers' own losses ignore

_AS_PAIRS = (
    "Pass pairs (inputs, targets) with the target of every position, from a generator over the loader; for the next token: "
    "(({k: v for k, v in batch.items() if k != 'labels'}, F.pad(batch['labels'][:, 1:], (0, 1), value=-100)) "
    "for batch in loader)."
)


class Alignment:
    """Alignment of the labels of causal language models with the outputs they belong to, as decided by the first labels.

    Labels in a mapping are treated as the model's own loss treats them, unless they have already been shifted. Targets in a
    pair ``(inputs, targets)`` are used as they are.

    Args:
        model: The network.
        likelihood: The likelihood; only likelihoods that ignore some targets can have token labels.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood) -> None:
        self._model = model
        self._ignore_index = likelihood.ignored_target
        self._shift: dict[bool, bool] = {}  # by whether targets come in pairs

    def __call__(self, inputs: Any, targets: Tensor, *, in_pair: bool, batch: int) -> Tensor:
        """Return the targets, aligned with the outputs.

        Args:
            inputs: The inputs of the batch, on the model's device.
            targets: The targets of the batch, also on the model's device.
            in_pair: Whether inputs and targets came in a pair ``(inputs, targets)`` rather than in one mapping.
            batch: The index of the batch, for errors.

        Raises:
            ValueError: If the targets are the input tokens themselves and must not be, or if that cannot be determined.
        """
        if self._ignore_index is None or targets.ndim != 2 or targets.is_floating_point():
            return targets
        if in_pair not in self._shift:
            try:
                self._shift[in_pair] = self._must_shift(inputs, targets, in_pair)
            except ValueError as error:
                raise ValueError(f"batch {batch}: {error}") from None
        return F.pad(targets[:, 1:], (0, 1), value=self._ignore_index) if self._shift[in_pair] else targets

    def _must_shift(self, inputs: Any, labels: Tensor, in_pair: bool) -> bool:
        tokens = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
        if not isinstance(tokens, Tensor) or tokens.shape != labels.shape or tokens.is_floating_point():
            tokens = None
        copied = tokens is not None and self._agree(labels, tokens)
        if in_pair and not copied:
            return False
        shifts = _loss_skips_first(self._model, inputs, labels)
        if in_pair:
            if shifts:
                raise ValueError(
                    "the targets are the input tokens themselves, but the model predicts the next ones: its own loss "
                    "shifts its labels, whereas targets in a pair are used as they are. Shift them, "
                    "F.pad(targets[:, 1:], (0, 1), value=-100), or pass mappings with 'labels', which are shifted as in "
                    "the model's own loss."
                )
            return False
        if shifts is None:
            if copied:
                raise ValueError(
                    "the labels are the input tokens themselves. A causal language model predicts the next ones, and "
                    "whether this model does cannot be determined: its forward takes no labels, or returns no loss. "
                    + _AS_PAIRS
                )
            return False
        already = tokens is not None and not copied and self._agree(labels[:, :-1], tokens[:, 1:])
        return shifts and not already

    def _agree(self, labels: Tensor, tokens: Tensor) -> bool:
        """Return whether there are labels that are not ignored, and all of these are equal to the tokens."""
        counts = (labels != self._ignore_index) & (labels != _IGNORED_BY_THE_MODEL)
        return bool(counts.any() & ((labels == tokens) | ~counts).all())


@torch.no_grad()
def _loss_skips_first(model: nn.Module, inputs: Any, labels: Tensor) -> bool | None:
    """Return whether the model's own loss ignores the labels at the first position, or None if there is no such loss."""
    accepted = inspect.signature(model.forward).parameters
    if "labels" not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return None
    args, keywords = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    if isinstance(mask := keywords.get("attention_mask"), Tensor):
        keywords["attention_mask"] = torch.ones_like(mask)  # some losses skip what is masked
    first = torch.full_like(labels, _IGNORED_BY_THE_MODEL)
    first[:, 0] = 0  # any class will do
    try:
        with _evaluating(model), callers_autocast():
            outputs = model(*args, **keywords, labels=first)
    except Exception:  # whatever the model raises: it is about to be called without labels, and may raise it again
        return None
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    return not (torch.isfinite(loss) & (loss != 0)).any()  # a mean of nothing is NaN, a sum zero


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
