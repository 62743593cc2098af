"""Inversion of the damped factors of many blocks at once, which waits for an accelerator once, when it is settled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kronlaplace._precision import wide_dtype
from kronlaplace.blocks import KroneckerBlock
from kronlaplace.damping.cholesky import damped_inverses
from kronlaplace.damping.factor_rules import DampedFactors, grouped_factors
from kronlaplace.damping.solvers import KroneckerSolver, Solver
from kronlaplace.data.arriving import Arriving

__all__ = ["SingularBlockError", "SolversInProgress"]


class SingularBlockError(ValueError):
    """A damped block is singular up to rounding, so that only a larger damping makes it invertible."""


@dataclass(frozen=True, eq=False)
class _Factors:
    """One side of a block: ``c M + s I`` for each of its ``K`` groups.

    Attributes:
        name: The layer's name.
        matrices: Matrices ``M``, shape ``(K, n, n)``.
        scale: Numbers ``c``, shape ``(K,)``.
        shift: Numbers ``s``, shape ``(K,)``.
    """

    name: str
    matrices: Tensor
    scale: Tensor
    shift: Tensor


@dataclass(frozen=True, eq=False)
class _Inverted:
    """The inverses of one side of a block, divided as in `damped_inverses`."""

    inverses: Tensor
    sizes: Tensor


class SolversInProgress:
    """Solvers whose inverses are computed, perhaps not finished, and not yet checked.

    On a CUDA device, everything has been queued on the current stream, and the results of the checks are on their way to the
    host. `ready` tells whether they have arrived; `settle` reads them.

    Made by `kronlaplace.damping.Damping.begin_solvers`.

    Args:
        blocks: Kronecker blocks with the numbers of their damped factors, by layer; they must not change until `settle`.
        done: Solvers that need no inversion, by layer.
        order: All layers, in the order of the result.
        damping: Damping to show in errors.
    """

    def __init__(
        self,
        blocks: Mapping[str, tuple[KroneckerBlock, DampedFactors]],
        done: Mapping[str, Solver],
        order: Sequence[str],
        damping: object,
    ) -> None:
        self._done = dict(done)
        self._order = list(order)
        self._damping = damping
        self._sides = [side for name, (block, numbers) in blocks.items() for side in _sides(name, block, numbers)]
        self._members: list[tuple[int, int]] = []
        """Side and group of each checked matrix, in the order of the checks."""
        self._results: list[_Inverted] = []
        self._begin()

    def _begin(self) -> None:
        alike: dict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
        for index, side in enumerate(self._sides):
            alike[side.matrices.shape[-1], side.matrices.dtype, side.matrices.device].append(index)
        results: dict[int, _Inverted] = {}
        checks: list[Tensor] = []
        for (_, dtype, _), indices in alike.items():
            sides = [self._sides[index] for index in indices]
            counts = [len(side.matrices) for side in sides]
            whole = damped_inverses(
                torch.cat([side.matrices for side in sides]),
                torch.cat([side.scale for side in sides]),
                torch.cat([side.shift for side in sides]),
                wide_dtype(dtype),
            )
            parts = zip(indices, whole.inverses.split(counts), whole.sizes.split(counts), strict=True)
            for index, inverses, sizes in parts:
                results[index] = _Inverted(inverses, sizes)
                self._members.extend((index, group) for group in range(len(inverses)))
            checks.append(whole.right)
        self._results = [results[index] for index in range(len(self._sides))]
        self._checks = [Arriving(right) for right in checks]

    def ready(self) -> bool:
        """Return whether `settle` would not wait for a device; this never waits itself."""
        return all(check.value() is not None for check in self._checks)

    def settle(self) -> dict[str, Solver]:
        """Read the checks, invert the matrices that failed again in float64, and return the solvers by layer.

        This waits for a device if it is not `ready`, and again if a matrix failed.

        Raises:
            ValueError: If a damped block is singular or has NaN or infinite entries, naming its layer.
        """
        right = [flag for check in self._checks for flag in check.wait().tolist()]
        failed = [member for member, flag in zip(self._members, right, strict=True) if not flag]
        self._invert_again(failed)
        self._checks, self._members = [], []
        solvers = {**self._done, **self._made()}
        return {name: solvers[name] for name in self._order}

    def _invert_again(self, failed: Sequence[tuple[int, int]]) -> None:
        again = []
        for index, group in failed:
            side, one = self._sides[index], slice(group, group + 1)
            result = damped_inverses(side.matrices[one], side.scale[one], side.shift[one], torch.float64)
            inverted = self._results[index]
            inverted.inverses[one] = result.inverses.to(inverted.inverses.dtype)
            inverted.sizes[one] = result.sizes
            again.append(result.right)
        if again and not (right := torch.cat([flag.cpu() for flag in again])).all():
            index, _ = failed[int((~right).nonzero()[0])]
            self._refuse(self._sides[index])

    def _refuse(self, side: _Factors) -> None:
        if not all(torch.isfinite(part).all() for part in (side.matrices, side.scale, side.shift)):
            raise ValueError(
                f"NaN or infinite entries in the block of layer {side.name!r}, damped by {self._damping!r}, which therefore "
                "cannot be inverted. They come from activations or gradients that overflowed, or from the damping; look at "
                "the network's outputs on this data."
            )
        if (side.shift > 0).all():
            raise SingularBlockError(
                f"the block of layer {side.name!r}, damped by {self._damping!r}, is singular up to rounding; use a larger "
                "damping."
            )
        raise SingularBlockError(f"the block of layer {side.name!r} is singular; use a damping larger than 0.")

    def _made(self) -> dict[str, Solver]:
        solvers: dict[str, Solver] = {}
        for index in range(0, len(self._sides), 2):
            name = self._sides[index].name
            gradient, activation = self._results[index : index + 2]
            dtype = self._sides[index].matrices.dtype
            size = (gradient.sizes * activation.sizes).reciprocal().to(gradient.inverses.dtype)
            scaled = gradient.inverses * size.view(-1, 1, 1)
            # A part of a batch is copied, so that a solver that is kept does not keep those of all layers.
            solvers[name] = KroneckerSolver(scaled.to(dtype), activation.inverses.clone().to(dtype), name)
        return solvers


def _sides(name: str, block: KroneckerBlock, numbers: DampedFactors) -> tuple[_Factors, _Factors]:
    gradient, activation = (factors.detach() for factors in grouped_factors(block))
    c_G, s_G, c_A, s_A = (number.detach() for number in numbers)
    return _Factors(name, gradient, c_G, s_G), _Factors(name, activation, c_A, s_A)
