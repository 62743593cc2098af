"""`SynapticIntelligence`: the baseline whose importances are integrals along the path of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike

import torch
from torch import Tensor, nn

from kronlaplace._arguments import positive_integer, positive_number
from kronlaplace._precision import in_full_precision, wide, wide_dtype
from kronlaplace._storage import load_tensors, save_tensors
from kronlaplace._wrappers import unwrapped
from kronlaplace.continual.files import check_tasks
from kronlaplace.continual.state import Task, name_of_new_task
from kronlaplace.data.device import device_of

__all__ = ["SynapticIntelligence"]

_KIND = "synaptic intelligence"


@dataclass
class _Path:
    """What a parameter did since the task began.

    Attributes:
        start: Its value at the first step.
        weights: Its value at the latest step.
        gradient: The gradient of the task's loss there.
        integral: ``ω = −∫ g dθ`` up to the latest step.
    """

    start: Tensor
    weights: Tensor
    gradient: Tensor
    integral: Tensor

    @classmethod
    def begin(cls, parameter: Tensor) -> _Path:
        start = wide(parameter.detach()).clone()
        return cls(start, start.clone(), torch.zeros_like(start), torch.zeros_like(start))

    def integral_to(self, weights: Tensor) -> Tensor:
        return self.integral - self.gradient * (weights - self.weights)


class SynapticIntelligence:
    """The baseline of Zenke, Poole and Ganguli (2017): each weight is as important as it was for lowering the loss.

    While a task is trained, ``ω_k = −∫ g_k dθ_k`` is the part of weight ``k`` in the decrease of the loss (Eq. 3), a sum
    over the steps of minus the gradient times the change. At the end of the task, the importance grows by it over the
    squared distance ``Δ_k`` that the weight went (Eq. 5):

        Ω_k ← max(0, Ω_k + N ω_k / (Δ_k² + ξ))

    and the penalty of the next task is ``c Σ_k Ω_k (θ_k − θ*_k)²`` around the weights ``θ*`` at its end (Eq. 4). ``N`` is
    the number of the task's examples, so that the penalty belongs to the **sum** of the loss over the data, like that of
    `ContinualLaplace`; for tasks of one size ``c`` is the paper's. The maximum is in the authors' program, not in the paper;
    without it, the penalty may have no minimum.

    Unlike `ContinualLaplace`, it must see every step, between the backward pass of the task's loss and that of the penalty:

        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        memory.observe()
        (memory.penalty() / n_examples).backward()
        optimizer.step()

    and ``memory.consolidate(n_examples)`` ends the task. Parameters without a gradient, such as other tasks' heads, keep
    their importance; frozen ones have no penalty as long as they are frozen, and the network may grow. There is no prior:
    before the first task the penalty is zero. The network is held by reference and never changed.

    Args:
        model: The network.
        strength: ``c``; may be set at any time.
        damping: ``ξ``, which bounds the importance of weights that hardly moved.

    Raises:
        TypeError, ValueError: If an argument is not what it should be.
    """

    def __init__(self, model: nn.Module, *, strength: float = 1.0, damping: float = 0.1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = model = unwrapped(model)
        device_of(model)
        self.strength = strength
        self.damping = positive_number(damping, "damping")
        self._tasks: tuple[Task, ...] = ()
        self._importances: dict[str, Tensor] = {}
        self._centers: dict[str, Tensor] = {}
        self._paths: dict[str, _Path] = {}

    @property
    def strength(self) -> float:
        """``c``; may be set at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = positive_number(value, "strength")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that have been consolidated, in their order."""
        return self._tasks

    @property
    def n_bytes(self) -> int:
        """Size of all that is kept, in bytes; during a task that includes the path."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def __repr__(self) -> str:
        names = [task.name for task in self.tasks]
        return f"{type(self).__name__}(strength={self.strength:g}, damping={self.damping:g}, tasks={names})"

    @torch.no_grad()
    def observe(self) -> None:
        """See a step: the weights now, and the gradients of the task's loss in ``.grad``, without the penalty's.

        Gradients must be unscaled (`torch.amp.GradScaler.unscale_`) and not yet clipped, of the mean loss of the batch.

        Raises:
            ValueError: If the network has lost a parameter of the memory, or has changed its shape.
        """
        for name, parameter in self._parameters().items():
            if parameter.grad is None or not parameter.requires_grad:
                continue
            path = self._paths.get(name)
            if path is None:
                path = self._paths[name] = _Path.begin(parameter)
            else:
                path.integral.copy_(path.integral_to(parameter))
                path.weights.copy_(parameter)
            path.gradient.copy_(parameter.grad)

    @in_full_precision
    def penalty(self) -> Tensor:
        """Return the penalty of the network's weights, 0-dim, differentiable in its trainable parameters.

        Raises:
            ValueError: As `observe`.
        """
        parts = [
            (self._importances[name] * (parameter - self._centers[name]).square()).sum()
            for name, parameter in self._parameters().items()
            if parameter.requires_grad and name in self._importances
        ]
        if not parts:
            parameter = next(self.model.parameters())
            return torch.zeros((), dtype=wide_dtype(parameter.dtype), device=parameter.device, requires_grad=True)
        return self.strength * torch.stack(parts).sum()

    @torch.no_grad()
    def consolidate(self, n_examples: int, *, task: str | None = None) -> SynapticIntelligence:
        """Add the task whose steps were observed, and go on to the next.

        The memory changes only if everything succeeds.

        Args:
            n_examples: Number of the task's training examples, ``N``.
            task: A name for the task, by default ``"task 1"``, ``"task 2"``, ...

        Returns:
            The memory itself.

        Raises:
            TypeError: If an argument is not what it should be.
            ValueError: If no step of this task was observed; if weights or gradients were not finite; if the memory has a
                task of that name already; or as `observe`.
        """
        n_examples = positive_integer(n_examples, "n_examples")
        name = name_of_new_task(task, self.tasks)
        if not self._paths:
            raise ValueError(
                "no step of this task was observed: call observe() in every step, between the backward pass of the "
                "task's loss and that of the penalty."
            )
        weights_now = {key: wide(parameter.detach()) for key, parameter in self._parameters().items()}
        importances = dict(self._importances)
        for key, path in self._paths.items():
            weights = weights_now[key]
            grown = n_examples * path.integral_to(weights) / ((weights - path.start).square() + self.damping)
            importances[key] = (importances[key] + grown if key in importances else grown).clamp_min(0.0)
            if not importances[key].isfinite().all():
                raise ValueError(
                    f"the path of {key!r} is not finite: weights or gradients became NaN or infinite in this task. Go back "
                    "to the weights and the memory before it, and train with smaller steps."
                )
        used = tuple(dict.fromkeys(key.rpartition(".")[0] for key in weights_now if key in self._paths))
        self._centers = {key: weights_now[key].clone() for key in importances}
        self._importances, self._paths = importances, {}
        self._tasks = (*self.tasks, Task(name, n_examples, used))
        return self

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file with everything but the network, also in the middle of a task.

        Raises:
            FileNotFoundError: If the folder is not there.
        """
        values = {
            "strength": self.strength,
            "damping": self.damping,
            "tasks": [task.to_json() for task in self.tasks],
        }
        save_tensors(path, _KIND, self._tensors(), values)

    @classmethod
    def load(
        cls, path: str | PathLike[str], model: nn.Module, *, tasks: Sequence[str] | None = None
    ) -> SynapticIntelligence:
        """Read a file that `save` wrote; nothing is unpickled.

        Args:
            path: The file.
            model: The network, with the weights at which training shall go on, on any device.
            tasks: Names of the tasks that the memory must be of, in their order; None accepts any.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or something else; if it is of other tasks, or in another order; or if the
                network does not have the memory's parameters, in their shapes.
        """
        tensors, values = load_tensors(path, _KIND, device_of(model))
        memory = cls(model, strength=values["strength"], damping=values["damping"])
        memory._tasks = tuple(Task.from_json(task) for task in values["tasks"])
        if tasks is not None:
            check_tasks(path, memory.tasks, tasks)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            what, name = key.split("/", 1)
            parts.setdefault(what, {})[name] = tensor
        memory._importances, memory._centers = parts.get("importance", {}), parts.get("center", {})
        names = [field.name for field in fields(_Path)]
        memory._paths = {key: _Path(*(parts[name][key] for name in names)) for key in parts.get("start", {})}
        memory._parameters()
        return memory

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        tensors = {f"importance/{name}": tensor for name, tensor in self._importances.items()}
        tensors |= {f"center/{name}": tensor for name, tensor in self._centers.items()}
        for name, path in self._paths.items():
            tensors |= {f"{field.name}/{name}": getattr(path, field.name) for field in fields(path)}
        return tensors

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Return the network's parameters, after a check that those of the memory are still there."""
        parameters = dict(self.model.named_parameters())
        known = {name: path.start for name, path in self._paths.items()} | self._importances
        for name, tensor in sorted(known.items()):
            if name not in parameters:
                raise ValueError(
                    f"the memory has a parameter {name!r}, and the model has none of that name. Use the model that the "
                    "memory belongs to, with all heads of earlier tasks (they may be frozen)."
                )
            if parameters[name].shape != tensor.shape:
                raise ValueError(
                    f"the memory's parameter {name!r} has the shape {tuple(tensor.shape)}, and the model's "
                    f"{tuple(parameters[name].shape)}. For new outputs add a layer beside the old one."
                )
        return parameters
