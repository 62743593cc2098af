"""Benchmarks of scikit-learn's digits in memory, and strategies, of Avalanche."""

import pytest

from experiments.peers import avalanche

try:
    avalanche()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
import torch
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
