"""Laws of an estimator."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kronlaplace.blocks import Block
from kronlaplace.estimators import Estimator, ExactBlock
from kronlaplace.estimators.registry import ESTIMATORS
from kronlaplace.fisher.accumulation import Accumulation
from kronlaplace.fisher.estimation import estimate_fisher
from kronlaplace.fisher.fisher import KroneckerFisher
from kronlaplace.fisher.merging import merge_fishers
from kronlaplace.fisher.one_batch import accumulate_batch
from kronlaplace.layers import find_layers
from kronlaplace.likelihoods import Categorical, Gaussian, Sampling
from kronlaplace.likelihoods.sampling import DirectionSampling
from kronlaplace.network.observer import NetworkObserver
from kronlaplace.testing.laws import generator, law, require, require_equal, standard_normal

__all__ = ["check_estimator"]

_EXACTLY = DirectionSampling(Sampling.EXACT)


def check_estimator(
    estimator: Estimator, *, sums: bool = True, keeps_trace: bool = False, tolerance: float = 1e-6
) -> None:
    """Check that an estimator obeys its laws on two small networks.

    The networks are a perceptron with a normalization layer, and a grouped convolution followed by a layer on tokens. The
    laws, with exact sampling:

    - The estimator is registered, and JSON restores it; it holds only settings, so it is the same after use.
    - A block has its layer's shape, dtype and device, and is symmetric positive semidefinite; a saved Fisher can be loaded.
    - A metric that is four times as large makes the block four times as large.
    - `Accumulation.so_far` and `Accumulation.finish` agree, and the former leaves the accumulation unchanged.
    - An accumulation restored from `Accumulation.state_dict` continues as the original does.
    - If its states are sums over examples, neither the size nor the order of batches matters; `Estimator.merge` returns the
      state of both data sets; `Estimator.decay` reduces the weight of the data accordingly; and `Estimator.combine` and
      `Estimator.state_from`, if they are defined, give the block of both data sets.
    - If it preserves the trace, the block's trace is that of the exact block.

    Args:
        estimator: The estimator, an instance.
        sums: Whether its states are sums over examples; False for an estimator that keeps a summary of limited size.
        keeps_trace: Whether its blocks are guaranteed to have the trace of the exact blocks on every layer.
        tolerance: Difference, relative to the largest entry of a block, that counts as rounding.

    Raises:
        AssertionError: If a law does not hold; the message names the law and the layer.
        TypeError: If it is not an estimator.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"check_estimator takes a kl.Estimator, got {estimator!r}.")
    _check_json(estimator)
    for problem in _problems():
        _Checks(estimator, problem, tolerance).run(sums, keeps_trace)


def _check_json(estimator: Estimator) -> None:
    require(
        ESTIMATORS.knows(estimator),
        f"{type(estimator).__name__} is registered, so that files can name it: @kl.register_estimator above the class",
    )
    with law("the settings can be converted to JSON and back"):
        restored = ESTIMATORS.from_json(json.loads(json.dumps(ESTIMATORS.to_json(estimator))))
    require(restored == estimator, f"JSON restores {estimator!r}", restored)


@dataclass(frozen=True)
class _Problem:
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    def batches(self, *sizes: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(sizes), self.y.split(sizes), strict=True))


def _problems() -> list[_Problem]:
    perceptron = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    convolution = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    problems = []
    for name, model, shape in (("perceptron", perceptron, (4,)), ("convolution", convolution, (2, 3, 3))):
        model = model.double().eval()
        for seed, parameter in enumerate(model.parameters()):
            with torch.no_grad():
                parameter.copy_(0.7 * standard_normal(*parameter.shape, seed=seed))
        labels = torch.randint(0, 3, (8,), generator=generator(9))
        problems.append(_Problem(name, model, standard_normal(8, *shape, seed=7), labels))
    return problems


class _Checks:
    """Laws of an estimator on one network."""

    def __init__(self, estimator: Estimator, problem: _Problem, tolerance: float) -> None:
        self.estimator = estimator
        self.problem = problem
        self.tolerance = tolerance
        self.layers = find_layers(problem.model)
        self.whole = self.estimate([(problem.x, problem.y)])

    def run(self, sums: bool, keeps_trace: bool) -> None:
        settings = copy.deepcopy(self.estimator)
        self.blocks_are_blocks()
        self.compare(self.estimate(self.problem.batches(8)), "the same data give the same block again")
        self.scales_with_the_metric()
        self.a_file_gives_it_back()
        self.can_be_looked_at_on_the_way()
        self.goes_on_from_a_checkpoint()
        if sums:
            self.compare(self.estimate(self.problem.batches(3, 5)), "the size of batches does not matter")
            self.compare(self.estimate(self.problem.batches(3, 5)[::-1]), "the order of batches does not matter")
            self.states_merge()
            self.states_decay()
            self.finished_blocks_combine()
            self.goes_on_from_blocks()
        if keeps_trace:
            exact = self.estimate([(self.problem.x, self.problem.y)], ExactBlock())
            for name, block in self.whole.items():
                require_equal(block.trace(), exact[name].trace(), self.of(name, "the trace is that of the exact block"))
        require(
            self.estimator == settings, "an estimator holds only settings: it is the same after use", self.estimator
        )

    def of(self, layer: str, statement: str) -> str:
        return f"{self.estimator!r} on layer {layer!r} of the {self.problem.name}: {statement}"

    def estimate(self, data: Sequence[tuple[Tensor, Tensor]], estimator: Estimator | None = None) -> KroneckerFisher:
        with law(f"{self.estimator!r}: estimate_fisher works on the {self.problem.name}"):
            return estimate_fisher(
                self.problem.model, data, Categorical(), estimator or self.estimator, sampling=Sampling.EXACT
            )

    def compare(self, blocks: Mapping[str, Block], statement: str) -> None:
        for name, block in self.whole.items():
            expected = block.to_dense()
            scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            require_equal(blocks[name].to_dense() / scale, expected / scale, self.of(name, statement), self.tolerance)

    def blocks_are_blocks(self) -> None:
        for layer in self.layers:
            block = self.whole[layer.name]
            require(isinstance(block, Block), self.of(layer.name, "finish returns a block"), block)
            require(block.shape == layer.shape, self.of(layer.name, f"the block's shape is {layer.shape}"), block.shape)
            same = block.dtype == layer.dtype and block.device == layer.device
            found = f"{block.dtype} on {block.device}"
            require(same, self.of(layer.name, f"the block is in {layer.dtype} on {layer.device}"), found)
            require(block.name == layer.name, self.of(layer.name, "the block has the layer's name"), block.name)
            dense = block.to_dense()
            require_equal(dense, dense.T, self.of(layer.name, "the block is symmetric"), self.tolerance)
            values = torch.linalg.eigvalsh(dense)
            require(
                bool(torch.isfinite(values).all()) and bool(values[0] >= -self.tolerance * values[-1]),
                self.of(layer.name, "the block is positive semidefinite"),
                f"its eigenvalues go from {values[0].item():.6g} to {values[-1].item():.6g}",
            )

    def scales_with_the_metric(self) -> None:
        data = [self.problem.x]
        model = self.problem.model
        one, four = (
            estimate_fisher(model, data, Gaussian(noise_std=s), self.estimator, sampling=Sampling.EXACT)
            for s in (1.0, 0.5)
        )
        for name, block in one.items():
            expected = 4 * block.to_dense()
            scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
            statement = self.of(name, "a metric four times as large makes the block four times as large")
            require_equal(four[name].to_dense() / scale, expected / scale, statement, self.tolerance)

    def a_file_gives_it_back(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "fisher.safetensors"
            self.whole.save(path)
            self.compare(KroneckerFisher.load(path), "a saved Fisher can be loaded")

    def show(self, accumulation: Accumulation, data: Sequence[tuple[Tensor, Tensor]]) -> None:
        with NetworkObserver(self.problem.model, self.layers) as observer:
            for x, y in data:
                outputs = self.problem.model(x)
                accumulate_batch(observer, outputs, Categorical(), _EXACTLY, accumulation, targets=y)

    def all_passes(self, *parts: Sequence[tuple[Tensor, Tensor]]) -> Accumulation:
        """Return an accumulation at the end of its last pass; in each pass the accumulations of the parts are merged."""
        first = Accumulation(self.estimator, self.layers)
        for i in range(self.estimator.passes):
            if i:
                first.next_pass()
            accumulations = [first, *(copy.deepcopy(first) for _ in parts[1:])]
            for accumulation, part in zip(accumulations, parts, strict=True):
                self.show(accumulation, part)
            for other in accumulations[1:]:
                first.merge(other)
        return first

    def can_be_looked_at_on_the_way(self) -> None:
        accumulation = self.all_passes(self.problem.batches(8))
        with law(f"{self.estimator!r}: so_far returns the blocks"):
            self.compare(accumulation.so_far(), "so_far returns the blocks of a Fisher of these data")
        self.compare(accumulation.so_far(), "so_far leaves the accumulation unchanged")
        self.compare(accumulation.finish(), "finish returns the same blocks as so_far")

    def goes_on_from_a_checkpoint(self) -> None:
        first, second = self.problem.batches(3, 5)
        straight, restored = (Accumulation(self.estimator, self.layers) for _ in range(2))
        for i in range(self.estimator.passes):
            if i:
                straight.next_pass()
            self.show(straight, [first])
            with law(f"{self.estimator!r}: to_plain and from_plain work"), tempfile.TemporaryFile() as file:
                torch.save(straight.state_dict(), file)
                file.seek(0)
                restored.load_state_dict(torch.load(file, weights_only=True))
            for accumulation in (straight, restored):
                self.show(accumulation, [second])
        blocks = restored.finish()
        for name, block in straight.finish().items():
            statement = self.of(name, "an accumulation restored from a checkpoint continues as the original does")
            require_equal(blocks[name].to_dense(), block.to_dense(), statement, self.tolerance)

    def states_merge(self) -> None:
        first, second = self.problem.batches(3, 5)
        with law(f"{self.estimator!r}: states of two data sets can be merged"):
            merged = self.all_passes([first], [second])
        self.compare(merged.finish(), "merge returns the state of both data sets")

    def states_decay(self) -> None:
        accumulation = self.all_passes(self.problem.batches(8))
        blocks = {}
        for layer in self.layers:
            estimator = accumulation.estimators[layer.name]
            if estimator.passes < self.estimator.passes:  # finished in an earlier pass
                blocks[layer.name] = self.whole[layer.name]
                continue
            state = copy.deepcopy(accumulation.state(layer.name))
            with law(self.of(layer.name, "decay works")):
                estimator.decay(state, 0.25)
                blocks[layer.name] = estimator.finish(state, layer, 0.25 * accumulation.weight)
        self.compare(blocks, "data decayed to a quarter, with a quarter of the weight, give the same block")

    def finished_blocks_combine(self) -> None:
        if type(self.estimator).combine is Estimator.combine:
            return
        first, second = self.problem.batches(3, 5)
        with law(f"{self.estimator!r}: finished Fishers can be combined"):
            both = merge_fishers(self.estimate([first]), self.estimate([second]))
        self.compare(both, "combine returns the block of both data sets")

    def goes_on_from_blocks(self) -> None:
        if type(self.estimator).state_from is Estimator.state_from:
            return
        first, second = self.problem.batches(3, 5)
        accumulation = Accumulation(self.estimator, self.layers)
        with law(f"{self.estimator!r}: an accumulation can start from blocks"):
            accumulation.start_from(self.estimate([first]), 3)
        self.show(accumulation, [second])
        self.compare(accumulation.finish(), "state_from returns the state that data with a known block would have left")
