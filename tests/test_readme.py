"""The README's code runs as it stands there, on somebody's own model."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kronlaplace as kl
from experiments import peers

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_main_path_is_short():
    assert len(BLOCKS) >= 1
    assert len(BLOCKS[0].strip().splitlines()) < 20


NETWORKS = {
    "plain": lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 3)),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("block", range(len(BLOCKS)))
@pytest.mark.filterwarnings(
    "ignore:the validation loss is smallest at the edge", "ignore:the evidence is largest at the edge"
)
def test_code_runs(block, tmp_path, monkeypatch):
    """Labels without a pattern may well want an endless prior precision."""
    if "from laplace" in BLOCKS[block]:
        try:
            peers.laplace_torch()
        except ImportError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    network = "batch norm" if "coverage" in BLOCKS[block] else "plain"
    torch.manual_seed(0)
    x, y = torch.randn(60, 8), torch.randint(3, (60,))
    model = NETWORKS[network]().eval()
    loader = DataLoader(TensorDataset(x, y), batch_size=20)
    names = {
        "model": model,
        **dict.fromkeys(("train_loader", "validation_loader", "test_loader", "more_data"), loader),
        "x_test": torch.randn(8, 8),
        "posterior": kl.KronLaplace(model, "classification").fit(loader),
    }
    exec(compile(BLOCKS[block], str(README), "exec"), names)
