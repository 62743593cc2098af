"""The main job on real data: train a network, fit the Laplace posterior, tune it, compare MAP with Laplace.

`kronlaplace demo` on the command line runs `run_demo`. The parts, in the order in which the data flows: `datasets`
(with `data`, `images`, `embedded`, `files`), `networks`, `training`, `fitting`, `classification` and `regression`,
`report`, `pictures`, `job`.
"""

from kronlaplace.demo.datasets import DATASETS
from kronlaplace.demo.errors import CorruptDataError, DemoError, MissingDataError, UnknownDatasetError
from kronlaplace.demo.job import run_demo

__all__ = ["run_demo", "DATASETS", "DemoError", "UnknownDatasetError", "MissingDataError", "CorruptDataError"]
