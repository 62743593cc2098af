"""The code of the page on natural gradients runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = Path(__file__).parent.parent / "docs" / "natural_gradients.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.quick(3)
@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(60, 8), torch.randint(3, (60,)))
    names = {
        "model": model,
        "train_loader": DataLoader(data, batch_size=20),
        "x_test": torch.randn(8, 8),
        "device": torch.device("cpu"),
    }
    exec(compile(BLOCKS[block], str(PAGE), "exec"), names)
    assert all(p.isfinite().all() for p in model.parameters())
    names["optimizer"].close()


def test_there_are_all_of_them():
    assert len(BLOCKS) == 7
