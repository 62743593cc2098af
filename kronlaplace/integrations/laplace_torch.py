"""Curvature backend for laplace-torch 0.3 with the Kronecker estimators of this package.

    la = Laplace(
        model, "classification", subset_of_weights="all", hessian_structure="kron",
        backend=KroneckerBackend, backend_kwargs={"estimator": "tkfac"},
    )

laplace-torch requests one Kronecker product per parameter and batch from its backend, and adds the products up factor by
factor. This suits K-FAC, but not estimators whose factors are not sums over batches (TKFAC's unit traces, K-FOC's running
sum). Therefore a single pass of this package continues over all batches of a fit, and for each batch the backend returns
the change in the factors of everything seen so far: the sum is the result of one pass over all of the data, whatever the
estimator.

| laplace-torch | kronlaplace |
| --- | --- |
| sum over the data | mean over examples: multiplied by ``N``, in the first of the two factors, the gradient's |
| weight and bias separate | joint, ``scale · G ⊗ A``: each takes its columns of ``A``, the cross terms are dropped |
| regression: unit noise; ``sigma_noise`` enters later | ``Gaussian(1.0)`` |
"""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kronlaplace._arguments import choice
from kronlaplace._precision import without_autocast
from kronlaplace.blocks import Block, DiagonalBlock, KroneckerBlock
from kronlaplace.data.device import device_of, preserved_random_state
from kronlaplace.data.loader import iterate
from kronlaplace.estimators import EKFAC, Estimator, resolve_estimator
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.curvature_pass import CurvaturePass
from kronlaplace.layers import Layer, Unsupported, find_layers
from kronlaplace.likelihoods import Categorical, Gaussian, Likelihood, Sampling
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.preconditions import check_model

try:
    from laplace.curvature import GGNInterface
    from laplace.utils import Kron
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "laplace":
        raise  # laplace-torch is installed but lacks one of its own dependencies
    raise ImportError(
        "kronlaplace.integrations.laplace_torch needs laplace-torch: pip install 'laplace-torch==0.3'."
    ) from error

__all__ = ["KroneckerBackend"]


class KroneckerBackend(GGNInterface):  # type: ignore[misc]  # laplace-torch may be absent
    """Backend for ``Laplace(..., hessian_structure="kron")``, over all weights or the last layer.

    Every example of the data set must occur exactly once in a fit (no ``drop_last``, no subsampling): a pass is over when
    as many examples have been seen as the data set has, and the next batch begins a new one. Every batch finishes a copy
    of the accumulated state, which for `KFOC` costs an eigendecomposition.

    The scale and shift of normalization layers have diagonal blocks. Jacobians, ``full`` and ``diag`` are those of
    laplace-torch.

    Args:
        model: The network. This and all arguments up to ``dict_key_y`` are passed by laplace-torch.
        likelihood: ``"classification"`` or ``"regression"``.
        last_layer: Whether ``model`` is a ``FeatureExtractor`` and only its last layer counts.
        subnetwork_indices: Indices for ``full`` and ``diag``.
        dict_key_x: Key of the inputs in a batch that is a dict.
        dict_key_y: Key of the targets in a batch that is a dict.
        estimator: Estimator of the blocks that makes one pass over the data: `KFAC`, `SUA`, `TKFAC`, `KFOC` with one
            sweep, ``"running"``, ``"approx"`` or ``"full"``, or a shorthand for one of these.
        sampling: Rule that picks the directions, as in `estimate_fisher`, but with ``"exact"`` as the default.
        mc_samples: Number of label draws per example, in ``"mc"``.
        seed: Seed of the draws. Batch ``i`` of a pass draws from a generator seeded with ``(seed, i)``.

    Raises:
        ValueError: For estimators that need several passes or make no Kronecker factors, and for unknown options.
        TypeError: For options of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: torch.LongTensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        *,
        estimator: Estimator | str = "kfac",
        sampling: Sampling | str = Sampling.EXACT,
        mc_samples: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        self._estimator = resolve_estimator(estimator)
        _check_estimator(self._estimator)
        self._sampling = DirectionSampling(choice(Sampling, sampling, "sampling"), mc_samples, seed)
        if self._sampling.kind is Sampling.EMPIRICAL:
            warnings.warn(
                'sampling="empirical" uses the labels in the data: this gives the empirical Fisher, not the Fisher.',
                stacklevel=2,
            )
        self._pass: _Pass | None = None

    def kron(self, x: Tensor | MutableMapping[str, Any], y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Return what one batch adds to the Kronecker factors of everything seen in this fit.

        Args:
            x: Inputs of the batch.
            y: Targets of the batch.
            N: Number of examples in the data set.
            **kwargs: Must be empty; laplace-torch passes its ``asdl_fisher_kwargs`` here.

        Returns:
            The loss of the batch, a sum over examples, and the change in the factors for each trainable parameter:
            ``[N · scale · G, A]`` for weights, one dense matrix for parameters with one axis.

        Raises:
            ValueError: If there are more than ``N`` examples; and as `estimate_fisher`.
            NotImplementedError: For layers without a Kronecker product per parameter; the message names them.
            TypeError: For options in ``kwargs``, and as `estimate_fisher`.
        """
        if kwargs:
            raise TypeError(
                f"KroneckerBackend does not accept options per batch, but got {sorted(kwargs)}. Leave asdl_fisher_kwargs "
                'out; pass the options of the backend as backend_kwargs={"estimator": ..., "sampling": ..., '
                '"mc_samples": ..., "seed": ...}.'
            )
        running, self._pass = self._pass, None  # restored only on success
        if running is None:
            check_model(self.model)
            accumulation = Accumulation(self._estimator, self._find_layers())
            likelihood = self._kronlaplace_likelihood()
            curvature = CurvaturePass(self.model, likelihood, accumulation, self._sampling)
            running = _Pass(accumulation, curvature, self.params)
        if running.n_examples + len(y) > N:
            raise ValueError(
                f"{running.n_examples} examples have been seen and this batch has {len(y)} more, but the data set has only "
                f"{N}. Every example must occur exactly once in a fit: do not use a sampler that repeats examples. If an "
                "earlier fit was interrupted or did not see its whole data set (drop_last=True), fit once more, or create a "
                "new Laplace object."
            )
        with preserved_random_state(device_of(self.model)):
            running.add(x, y)
        with without_autocast():
            difference = running.difference()
        if running.n_examples < N:
            self._pass = running
        with torch.no_grad():
            loss = self.factor * self.lossfunc(self.model(x), y)
        return loss, Kron(difference)

    def _kronlaplace_likelihood(self) -> Likelihood:
        return Categorical() if self.likelihood == "classification" else Gaussian(1.0)

    def _find_layers(self) -> list[Layer]:
        names = (
            [name for name, module in self.model.named_modules() if module is self._model] if self.last_layer else None
        )
        try:
            return find_layers(self.model, names, Unsupported.ERROR)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{error}\nWith laplace-torch, of these only freezing is possible, before the Laplace object is created; or "
                'use subset_of_weights="last_layer".'
            ) from None


def _check_estimator(estimator: Estimator) -> None:
    if isinstance(estimator, EKFAC) or estimator.for_any_layer:
        raise ValueError(
            f"{estimator!r} does not make Kronecker factors, but laplace-torch accepts nothing else. Use KFAC(), TKFAC() or "
            'KFOC(aggregation="running") here, or kronlaplace.KronLaplace, which accepts every estimator.'
        )
    if estimator.passes > 1:
        raise ValueError(
            f"{estimator!r} needs {estimator.passes} passes over the data, but laplace-torch makes only one. Use "
            'KFOC(aggregation="running"), KFOC(sweeps=1), TKFAC() or KFAC() here, or kronlaplace.KronLaplace.'
        )


class _Pass:
    """One pass over the data of a fit.

    Args:
        accumulation: Accumulation of the factors.
        curvature: Pass that feeds the accumulation.
        parameters: Parameters of the network, in laplace-torch's order.

    Raises:
        NotImplementedError: If a parameter has no Kronecker product.
    """

    def __init__(self, accumulation: Accumulation, curvature: CurvaturePass, parameters: list[nn.Parameter]) -> None:
        parts = [part for layer in accumulation.layers for part in _parts(layer)]
        by_parameter = {id(part.parameter): part for part in parts}
        self._parts = [by_parameter[id(parameter)] for parameter in parameters]
        self._accumulation = accumulation
        self._curvature = curvature
        self._device = parameters[0].device
        self._n_batches = 0
        self._returned: list[list[Tensor]] | None = None

    @property
    def n_examples(self) -> int:
        """Number of examples seen."""
        return self._curvature.n_examples

    def add(self, x: Any, y: Tensor) -> None:
        """Accumulate a batch."""
        for batch in iterate([(x, y)], self._device, alignment=None, progress=False, description=""):
            self._curvature.add(replace(batch, index=self._n_batches))
        self._curvature.settle()
        self._n_batches += 1

    def difference(self) -> list[list[Tensor]]:
        """Return the change in the factors of all parameters since the last call."""
        blocks = self._accumulation.so_far()
        factors = [part.factors(blocks[part.layer.name], self.n_examples) for part in self._parts]
        before = self._returned or [[torch.zeros_like(f) for f in some] for some in factors]
        self._returned = factors
        return [[new - old for new, old in zip(*some, strict=True)] for some in zip(factors, before, strict=True)]


class _Part:
    """One parameter of a layer's block.

    Args:
        layer: The layer.
        name: Name of the parameter in the layer.
        parameter: The parameter named ``name``, or one that acts only through its sum with that parameter.
    """

    def __init__(self, layer: Layer, name: str, parameter: nn.Parameter) -> None:
        self.layer = layer
        self.name = name
        self.parameter = parameter
        if layer.has_kronecker_factors:
            index = torch.arange(layer.shape[1], dtype=torch.float64, device=layer.device).expand(layer.shape)
            self._columns = layer.split_directions(index)[name].reshape(layer.shape[0], -1)[0].round().long()

    def factors(self, block: Block, n_examples: int) -> list[Tensor]:
        """Return the parameter's part of the sum over examples: ``[N · scale · G, A]``, or one dense matrix.

        Raises:
            TypeError: If the estimator made a block of a different kind.
        """
        if isinstance(block, DiagonalBlock) and not self.layer.has_kronecker_factors:
            return [torch.diag(n_examples * self.layer.split_directions(block.values)[self.name].flatten())]
        if not isinstance(block, KroneckerBlock):
            raise TypeError(
                f"the estimator made a {type(block).__name__} for layer {self.layer.name!r}; laplace-torch only accepts "
                "Kronecker products. Use an estimator such as KFAC() or TKFAC()."
            )
        gradient = n_examples * block.scale * block.gradient_factor
        activation = block.activation_factor[self._columns.unsqueeze(1), self._columns]
        return [gradient, activation] if self.parameter.ndim > 1 else [activation * gradient]


def _parts(layer: Layer) -> list[_Part]:
    """Return the parts of all parameters of a layer.

    Raises:
        NotImplementedError: If laplace-torch cannot represent their blocks.
    """
    reason = None
    if layer.groups > 1:
        reason = f"its block is block diagonal over {layer.groups} groups of rows"
    elif not layer.has_kronecker_factors and any(p.ndim != 1 for p in layer.parameters.values()):
        reason = "its block is diagonal, and its weight has more than one axis"
    if reason is not None:
        raise NotImplementedError(
            f"layer {layer.name!r} ({type(layer.module).__name__}) cannot be passed to laplace-torch: {reason}, so it is "
            "not a Kronecker product of two matrices. Freeze it with requires_grad_(False) before the Laplace object is "
            'created, use subset_of_weights="last_layer", or use kronlaplace.KronLaplace.'
        )
    last = layer.parameter_names[-1]
    own = [_Part(layer, name, parameter) for name, parameter in layer.parameters.items()]
    return own + [_Part(layer, last, parameter) for parameter in layer.merged_parameters.values()]
