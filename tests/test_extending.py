"""The code of the page on classes of one's own runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import kronlaplace as kl
from kronlaplace.testing import temporary_registrations

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.quick(3)
@pytest.mark.parametrize("block", range(len(BLOCKS)))
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_code_runs(block, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    train_loader = [(torch.randn(20, 8), torch.randint(3, (20,)))]
    posterior = kl.KronLaplace(model, "classification").fit(train_loader)
    names = {"__name__": "page", "model": model, "train_loader": train_loader, "posterior": posterior}
    with temporary_registrations():
        exec(compile(BLOCKS[block], str(PAGE), "exec"), names)
    shown = re.search(r"^print\(.*\)  # (.*)$", BLOCKS[block], flags=re.MULTILINE)
    assert capsys.readouterr().out == (f"{shown[1]}\n" if shown else "")


def test_there_is_one_of_each():
    assert len(BLOCKS) == 5
