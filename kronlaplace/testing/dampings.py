"""Laws of a damping."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kronlaplace.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    EigenBlock,
    KroneckerBlock,
    Truncation,
    truncated,
)
from kronlaplace.damping import Damping
from kronlaplace.testing.laws import law, require, require_equal, standard_normal

__all__ = ["check_damping"]


def check_damping(damping: Damping, blocks: Sequence[Block] | None = None) -> None:
    """Check that a damping obeys its laws on blocks of every kind.

    - `Damping.eigenvalues` are float64, of the shape of `Block.eigenvalues`, finite, positive, and the same at every call;
      the block is left unchanged.
    - With the matrix ``D`` that has these eigenvalues in the block's eigenbasis, the ``solve`` of the inverse applies
      ``D⁻¹``, ``sqrt_solve`` its symmetric root, ``diagonal`` is its diagonal, and ``logdet`` is that of ``D``.
    - `Damping.invert_all` agrees with `Damping.invert`, and the ``solve`` of `Damping.solvers` with both.

    Args:
        damping: The damping.
        blocks: Float64 blocks to check it on, nonsingular if the damping may be zero; None uses Kronecker blocks with and
            without groups and truncated, an eigenvalue-corrected block, a diagonal block and a dense block, of ``4 x 3``
            weights.

    Raises:
        AssertionError: If a law does not hold; the message names it.
        TypeError: If it is not a damping.
    """
    if not isinstance(damping, Damping):
        raise TypeError(f"check_damping takes a kl.damping.Damping, got {damping!r}.")
    blocks = _blocks() if blocks is None else blocks
    for block in blocks:
        _check(damping, block)
    named = {f"{i}": block for i, block in enumerate(blocks)}
    matrices = {name: standard_normal(*block.shape, seed=3) for name, block in named.items()}
    with law(f"{damping!r}: invert_all takes all blocks at once"):
        inverses = damping.invert_all(named)
    for name, block in named.items():
        require_equal(
            inverses[name].solve(matrices[name]),
            damping.invert(block).solve(matrices[name]),
            f"{damping!r} on {block!r}: invert_all gives what invert gives",
        )
    with law(f"{damping!r}: solvers takes all blocks at once"):
        solvers = damping.solvers(named)
    for name, block in named.items():
        require_equal(
            solvers[name].solve(matrices[name]),
            inverses[name].solve(matrices[name]),
            f"{damping!r} on {block!r}: a solver solves as the inverse does",
            1e-6,
        )


def _check(damping: Damping, block: Block) -> None:
    where = f"{damping!r} on {block!r}"
    before = {name: tensor.clone() for name, tensor in block.to_tensors().items()}
    with law(f"{where}: eigenvalues(block) returns a tensor"):
        values = damping.eigenvalues(block)
    shape = block.multiplicities().shape
    require(
        isinstance(values, Tensor) and values.shape in (shape, block.shape) and values.dtype == torch.float64,
        f"{where}: eigenvalues(block) is a float64 tensor of the shape of block.eigenvalues(), {tuple(shape)}",
        f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values),
    )
    smallest = values.min().item()
    require(bool(torch.isfinite(values).all()), f"{where}: eigenvalues are finite", values)
    require(smallest > 0, f"{where}: eigenvalues are positive", f"the smallest is {smallest:.6g}")
    require_equal(damping.eigenvalues(block), values, f"{where}: eigenvalues are the same at every call")
    with law(f"{where}: invert(block) returns a damped inverse"):
        inverse = damping.invert(block)
    require_equal(
        inverse.eigenvalues, values, f"{where}: the inverse has the eigenvalues that eigenvalues(block) returns"
    )
    size = math.prod(block.shape)
    unit = torch.eye(size, dtype=torch.float64).unflatten(1, block.shape)
    basis = inverse.block.from_eigenbasis(unit).flatten(1).T
    damped = (basis * inverse.expand(values).flatten()) @ basis.T
    exact = torch.linalg.inv(damped)
    solved, root = (apply(unit).flatten(1) for apply in (inverse.solve, inverse.sqrt_solve))
    require_equal(
        damped @ solved, torch.eye(size, dtype=torch.float64), f"{where}: the damped block times solve is 1", 1e-6
    )
    require_equal(root @ root, exact, f"{where}: sqrt_solve twice is solve", 1e-6)
    require_equal(root, root.T, f"{where}: sqrt_solve is symmetric")
    require_equal(inverse.diagonal().flatten(), exact.diagonal(), f"{where}: diagonal is that of the inverse", 1e-6)
    require_equal(
        inverse.logdet(), torch.linalg.slogdet(damped).logabsdet, f"{where}: logdet is that of the damped block"
    )
    for name, tensor in block.to_tensors().items():
        require_equal(tensor, before[name], f"{where}: the block's {name} is left unchanged", 0.0)


def _blocks() -> list[Block]:
    def moment(*shape: int, seed: int) -> Tensor:
        x = standard_normal(*shape[:-1], 2 * shape[-1], seed=seed)
        return x @ x.mT / x.shape[-1]

    gradient, activation = moment(4, 4, seed=0), moment(3, 3, seed=1)
    groups = moment(2, 2, 2, seed=2), moment(2, 3, 3, seed=3)
    values = standard_normal(4, 3, seed=4).square() + 0.01
    left, right = (torch.linalg.eigh(factor).eigenvectors.unsqueeze(0) for factor in (gradient, activation))
    return [
        KroneckerBlock(gradient, activation, 0.5, "kronecker"),
        KroneckerBlock(*groups, torch.tensor([0.5, 2.0]), "groups"),
        truncated([KroneckerBlock(gradient, activation, 0.5, "truncated")], Truncation(limit=2, rank=2))[0],
        EigenBlock(left, right, values, "eigen"),
        DiagonalBlock(values, "diagonal"),
        DenseBlock(moment(12, 12, seed=5), (4, 3), 2.0, "dense"),
    ]
