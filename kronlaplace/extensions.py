"""BackPACK extensions, which provide the blocks of this package in ``with backpack(...)``.

    >>> from backpack import backpack, extend
    >>> from kronlaplace.extensions import TKFAC
    >>> model, loss = extend(model), extend(torch.nn.CrossEntropyLoss())
    >>> with backpack(TKFAC(sampling="exact")):
    ...     loss(model(x), y).backward()
    >>> model[0].tkfac  # the block of this layer on this batch, a KroneckerBlock

They are second-order extensions like BackPACK's own `KFAC` and `KFLR`: instead of the gradient of the loss, they propagate
back a square root of the Fisher information of the network's outputs, either exact or from drawn labels. The loss
determines the likelihood: `torch.nn.CrossEntropyLoss` is `Categorical`, `torch.nn.BCEWithLogitsLoss` is `Bernoulli`,
`torch.nn.MSELoss` is `Euclidean` (the metric of ``½ ‖f − y‖²``). A block is the mean over the examples of the batch,
whatever the ``reduction`` of the loss, and equals that of `estimate_fisher` on the same batch.

The network must be one that BackPACK's `SqrtGGNExact` can propagate through; `estimate_fisher` and `accumulate_batch` have
no such restriction. Linear layers and convolutions have joint blocks of weight and bias, batch norms (in evaluation mode)
and embeddings have diagonal blocks. Following BackPACK, blocks are saved on the modules and on their weights.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from backpack.core.derivatives.batchnorm_nd import BatchNormNdDerivatives
from backpack.core.derivatives.conv1d import Conv1DDerivatives
from backpack.core.derivatives.conv2d import Conv2DDerivatives
from backpack.core.derivatives.conv3d import Conv3DDerivatives
from backpack.core.derivatives.conv_transpose1d import ConvTranspose1DDerivatives
from backpack.core.derivatives.conv_transpose2d import ConvTranspose2DDerivatives
from backpack.core.derivatives.conv_transpose3d import ConvTranspose3DDerivatives
from backpack.core.derivatives.embedding import EmbeddingDerivatives
from backpack.core.derivatives.linear import LinearDerivatives
from backpack.extensions.mat_to_mat_jac_base import MatToJacMat
from backpack.extensions.module_extension import ModuleExtension
from backpack.extensions.secondorder.sqrt_ggn import SqrtGGN
from torch import Tensor, nn

from kronlaplace import estimators
from kronlaplace._precision import in_full_precision
from kronlaplace.blocks import Block
from kronlaplace.estimators import Estimator, resolve_estimator
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.layers import LayerBatch, LayerCall, Unsupported, find_layers
from kronlaplace.likelihoods import Bernoulli, Categorical, Euclidean, Likelihood, Sampling
from kronlaplace.likelihoods.sampling import DirectionSampling

__all__ = ["EKFAC", "KFAC", "KFOC", "SUA", "TKFAC", "BlockExtension", "Diagonal", "ExactBlock"]


class BlockExtension(SqrtGGN):  # type: ignore[misc]  # BackPACK is not typed
    """BackPACK extension that saves an estimator's block of one batch on every module that has one.

    Args:
        estimator: Any estimator, including one of your own, or a shorthand. If it needs several passes over the data, they
            are made over the batch.
        sampling: ``"mc"`` (labels drawn from the model's own predictive distribution, like BackPACK's `KFAC`) or
            ``"exact"`` (like BackPACK's `KFLR`; one propagated vector per output).
        mc_samples: Number of label draws per example, for ``"mc"`` only.
        seed: Seed of the draws; backward pass ``i`` of this object draws from a generator seeded with ``(seed, i)``. None
            draws from torch's global generator, as BackPACK does.
        savefield: Attribute of the module that holds its block; None uses the estimator's name.

    Raises:
        ValueError: For options that `estimate_fisher` also rejects, or ``sampling="empirical"``.
        TypeError: For options of the wrong type.
    """

    def __init__(
        self,
        estimator: Estimator | str,
        *,
        sampling: Sampling | str = Sampling.MC,
        mc_samples: int = 1,
        seed: int | None = None,
        savefield: str | None = None,
    ) -> None:
        self.estimator = resolve_estimator(estimator)
        self._sampling = DirectionSampling(sampling, mc_samples, 0 if seed is None else seed)  # type: ignore[arg-type]
        if self._sampling.kind is Sampling.EMPIRICAL:
            raise ValueError(
                'sampling must be "mc" or "exact" here; for products of gradients at the labels in the data use '
                'estimate_fisher(..., sampling="empirical").'
            )
        self._seeded = seed is not None
        self._step = 0
        super().__init__(
            loss_hessian_strategy=self._sampling.kind.value,
            savefield=self.estimator.name if savefield is None else savefield,
            subsampling=None,
        )
        for module_type, extension in _extensions().items():
            self.set_module_extension(module_type, extension, overwrite=True)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.estimator!r}, sampling={self._sampling.kind!r}, savefield={self.savefield!r})"
        )

    def directions(self, likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the vectors that are propagated back from the network's outputs, shape ``(V, N, ...)``."""
        sampling = self._sampling
        generator = sampling.generator(self._step, outputs.device) if self._seeded else None
        self._step += 1
        return torch.stack(
            list(
                likelihood.directions(
                    outputs, sampling.kind, mc_samples=sampling.mc_samples, targets=targets, generator=generator
                )
            )
        )

    @in_full_precision
    def block(self, module: nn.Module, x: Tensor, gradients: Tensor) -> Block:
        """Return the block of one module.

        Args:
            module: The module.
            x: Input of the module, with the examples on the first axis.
            gradients: Vectors that were propagated back to its output, shape ``(V, N, ...)``.
        """
        (layer,) = find_layers(module, unsupported=Unsupported.ERROR)
        layer.name = type(module).__name__
        batch = LayerBatch(layer, [LayerCall(x)])
        accumulation = Accumulation(self.estimator, [layer])
        for i in range(accumulation.passes):
            if i:
                accumulation.next_pass()
            accumulation.begin_batch({layer.name: batch})
            for gradient in gradients:
                accumulation.add_gradients(batch.along([gradient]))
            accumulation.end_batch({layer.name: batch}, len(x))
        return accumulation.finish()[layer.name]


class _Blocks(MatToJacMat):  # type: ignore[misc]  # BackPACK is not typed
    """BackPACK rule for a type of layer: save its block, and propagate the incoming vectors to its input."""

    def __init__(self, derivatives: Any) -> None:
        super().__init__(derivatives, params=["weight"])

    def weight(self, extension: BlockExtension, module: nn.Module, g_inp: Any, g_out: Any, arrived: Tensor) -> Block:
        with torch.no_grad():
            block = extension.block(module, module.input0.detach(), arrived.detach())  # type: ignore[operator]
        setattr(module, extension.savefield, block)
        return block


class _NoBlock(MatToJacMat):  # type: ignore[misc]  # BackPACK is not typed
    """BackPACK rule for layers that have no block."""

    def __init__(self, derivatives: Any) -> None:
        super().__init__(derivatives, params=["weight", "bias"])

    def weight(self, extension: BlockExtension, module: nn.Module, g_inp: Any, g_out: Any, arrived: Tensor) -> None:
        raise NotImplementedError(
            f"{type(module).__name__} cannot have a block; freeze it with requires_grad_(False) on its parameters."
        )

    bias = weight


class _Loss(ModuleExtension):  # type: ignore[misc]  # BackPACK is not typed
    """BackPACK rule for a loss: propagate a square root of the Fisher information of the network's outputs."""

    def backpropagate(self, extension: BlockExtension, module: Any, g_inp: Any, g_out: Any, arrived: None) -> Tensor:
        outputs, targets = module.input0.detach(), module.input1
        likelihood = likelihood_of(module, outputs)
        likelihood.check_outputs(outputs)
        with torch.no_grad():
            return extension.directions(likelihood, outputs, targets)


def likelihood_of(loss: nn.Module, outputs: Tensor) -> Likelihood:
    """Return the likelihood whose negative logarithm is the loss, up to scale.

    Raises:
        NotImplementedError: If the loss weights or smooths labels.
    """
    unequal = [name for name in ("weight", "pos_weight") if getattr(loss, name, None) is not None]
    if getattr(loss, "label_smoothing", 0) > 0:
        unequal.append("label_smoothing")
    if unequal:
        raise NotImplementedError(
            f"{type(loss).__name__} with {unequal[0]} is not the negative log-likelihood of a model, so it has no Fisher; "
            "leave that option out."
        )
    if isinstance(loss, nn.CrossEntropyLoss):
        return Categorical(loss.ignore_index, 1 if outputs.ndim > 2 else None)
    return Bernoulli() if isinstance(loss, nn.BCEWithLogitsLoss) else Euclidean()


def _extensions() -> dict[type[nn.Module], ModuleExtension]:
    """Return the rules that replace those of `SqrtGGN`, by type of module."""
    return {
        nn.CrossEntropyLoss: _Loss(),
        nn.BCEWithLogitsLoss: _Loss(),
        nn.MSELoss: _Loss(),
        nn.Linear: _Blocks(LinearDerivatives()),
        nn.Conv1d: _Blocks(Conv1DDerivatives()),
        nn.Conv2d: _Blocks(Conv2DDerivatives()),
        nn.Conv3d: _Blocks(Conv3DDerivatives()),
        nn.BatchNorm1d: _Blocks(BatchNormNdDerivatives()),
        nn.BatchNorm2d: _Blocks(BatchNormNdDerivatives()),
        nn.BatchNorm3d: _Blocks(BatchNormNdDerivatives()),
        nn.Embedding: _Blocks(EmbeddingDerivatives()),
        nn.ConvTranspose1d: _NoBlock(ConvTranspose1DDerivatives()),
        nn.ConvTranspose2d: _NoBlock(ConvTranspose2DDerivatives()),
        nn.ConvTranspose3d: _NoBlock(ConvTranspose3DDerivatives()),
    }


class _Named(BlockExtension):
    """Extension for one of the package's estimators, which takes the estimator's own settings."""

    _kind: ClassVar[type[Estimator]]

    def __init__(
        self,
        *settings: Any,
        sampling: Sampling | str = Sampling.MC,
        mc_samples: int = 1,
        seed: int | None = None,
        savefield: str | None = None,
        **named_settings: Any,
    ) -> None:
        estimator = self._kind(*settings, **named_settings)
        super().__init__(estimator, sampling=sampling, mc_samples=mc_samples, seed=seed, savefield=savefield)


class KFAC(_Named):
    """`kronlaplace.KFAC` as an extension, saved as ``kfac``; settings first, then options as in `BlockExtension`."""

    _kind = estimators.KFAC


class SUA(_Named):
    """`kronlaplace.SUA` as an extension, saved as ``sua``; settings first, then options as in `BlockExtension`."""

    _kind = estimators.SUA


class TKFAC(_Named):
    """`kronlaplace.TKFAC` as an extension, saved as ``tkfac``; settings first, then options as in `BlockExtension`."""

    _kind = estimators.TKFAC


class KFOC(_Named):
    """`kronlaplace.KFOC` as an extension, saved as ``kfoc``; settings first, then options as in `BlockExtension`."""

    _kind = estimators.KFOC


class EKFAC(_Named):
    """`kronlaplace.EKFAC` as an extension, saved as ``ekfac``; settings first, then options as in `BlockExtension`."""

    _kind = estimators.EKFAC


class Diagonal(_Named):
    """`kronlaplace.Diagonal` as an extension, saved as ``diagonal``; options as in `BlockExtension`."""

    _kind = estimators.Diagonal


class ExactBlock(_Named):
    """`kronlaplace.ExactBlock` as an extension, saved as ``exact``; settings first, then options as in `BlockExtension`."""

    _kind = estimators.ExactBlock


def __dir__() -> list[str]:
    return sorted(__all__)
