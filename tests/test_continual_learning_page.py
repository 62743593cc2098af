"""The code of the page on continual learning runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = Path(__file__).parent.parent / "docs" / "continual_learning.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    tasks = [TensorDataset(torch.randn(40, 8), torch.randint(3, (40,))) for _ in range(3)]
    names = {
        "torch": torch,
        "model": model,
        "task_loaders": [DataLoader(task, batch_size=20) for task in tasks],
        "x_test": torch.randn(8, 8),
    }
    exec(compile(BLOCKS[block], str(PAGE), "exec"), names)
    assert all(p.isfinite().all() for p in model.parameters())
    if "posterior" in names:
        assert names["probabilities"].shape == (8, 3)


def test_there_are_all_of_them():
    assert len(BLOCKS) == 6
